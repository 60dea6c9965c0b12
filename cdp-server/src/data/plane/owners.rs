//! Who may write which disk: one session of one host.
//!
//! A disk that two hosts claim (a VM cloned with its UUID, or one that is just being moved) stays with the host that
//! has it:
//!
//! | the disk's owner is | a session of the same host | a session of another host |
//! | --- | --- | --- |
//! | nobody: never opened, or given up | gets it | gets it |
//! | a session that lives | gets it; the older session is closed as a whole | is refused |
//! | a host whose session ended, heard less than `keep` ago | gets it | is refused |
//! | a host that was not heard for longer | gets it | gets it, with a new epoch |
//!
//! Of one host's sessions only the newest counts: an open of one that is older than the last to open the disk was sent
//! by an agent that is gone, and arrives late. That session is closed. (Were it obeyed, its successor would lose the disk, and
//! its frames, to nobody.) Should that agent be alive after all, it connects anew and is the newest.
//!
//! The third row lets an agent be restarted, and a connection break, without the disk changing hands: a clone would
//! take it in that moment, and history would follow now one disk, now the other. A server that starts does not know who
//! lives; the catalog has each disk's owner, and the owner counts as heard at the start.

use std::collections::BTreeMap;
use std::time::Duration;

use journal_format::{DiskId, Epoch};

use super::{Host, SessionId};
use crate::catalog::Catalog;
use crate::error::ServerError;

/// Where an owner is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Presence {
    /// On the connection that opened the disk last.
    Here,
    /// On none, or its open failed; it was heard then.
    Away(Duration),
}

#[derive(Debug)]
struct Owner {
    host: Host,
    /// The session that opened the disk last; the default before any did.
    session: SessionId,
    presence: Presence,
    epoch: Epoch,
    /// It was told that its frames are refused; it opens the disk again before it sends more.
    refused: bool,
}

impl Owner {
    fn is_on(&self, session: SessionId) -> bool {
        self.presence == Presence::Here && self.session == session
    }
}

/// Whether a session may open a disk.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Right {
    /// It may.
    Its,
    /// It may, and this session of the same host has to go.
    InPlaceOf(SessionId),
    /// It may not: a newer session of the same host has opened the disk since.
    Overtaken,
    /// It may not: another host has the disk, with this epoch; who, and what to do.
    HeldBy(Epoch, String),
}

/// The owners of all disks that were opened since the server started.
#[derive(Debug)]
pub(super) struct Owners {
    keep: Duration,
    disks: BTreeMap<DiskId, Owner>,
}

impl Owners {
    pub(super) fn new(keep: Duration) -> Self {
        Self { keep, disks: BTreeMap::new() }
    }

    /// Whether a session of that host may open the disk now.
    pub(super) fn right(
        &mut self,
        catalog: &Catalog,
        now: Duration,
        disk: DiskId,
        host: &Host,
        session: SessionId,
    ) -> Result<Right, ServerError> {
        if !self.disks.contains_key(&disk)
            && let Some((host, epoch)) = catalog.owner(disk)?
        {
            let presence = Presence::Away(Duration::ZERO);
            let session = SessionId::default();
            self.disks.insert(disk, Owner { host, session, presence, epoch, refused: true });
        }
        let Some(owner) = self.disks.get(&disk) else { return Ok(Right::Its) };
        Ok(match owner.presence {
            _ if owner.host.id == host.id && session < owner.session => Right::Overtaken,
            Presence::Here if owner.host.id == host.id && session > owner.session => {
                Right::InPlaceOf(owner.session)
            }
            Presence::Here | Presence::Away(_) if owner.host.id == host.id => Right::Its,
            Presence::Here => Right::HeldBy(owner.epoch, held_by(&owner.host)),
            Presence::Away(heard) if now < heard.saturating_add(self.keep) => {
                Right::HeldBy(owner.epoch, kept_for(&owner.host, self.keep))
            }
            Presence::Away(_) => Right::Its,
        })
    }

    /// The session has the disk from now on.
    pub(super) fn insert(&mut self, disk: DiskId, host: Host, session: SessionId, epoch: Epoch) {
        self.disks.insert(disk, Owner { host, session, presence: Presence::Here, epoch, refused: false });
    }

    /// A session of that host could not open a disk to which it has the right: its host's it stays, if it was.
    pub(super) fn failed(&mut self, disk: DiskId, host: &Host, session: SessionId, now: Duration) {
        if let Some(owner) = self.disks.get_mut(&disk).filter(|owner| owner.host.id == host.id) {
            (owner.session, owner.presence) = (session, Presence::Away(now));
        }
    }

    /// The disk is nobody's.
    pub(super) fn remove(&mut self, disk: DiskId) {
        self.disks.remove(&disk);
    }

    /// The session ends; it was heard last at that time.
    pub(super) fn leave(&mut self, session: SessionId, heard: Duration) {
        for owner in self.disks.values_mut().filter(|owner| owner.is_on(session)) {
            owner.presence = Presence::Away(heard);
        }
    }

    /// The session that has the disk.
    pub(super) fn session(&self, disk: DiskId) -> Option<SessionId> {
        let owner = self.disks.get(&disk)?;
        (owner.presence == Presence::Here).then_some(owner.session)
    }

    /// If the session has the disk: its epoch, and whether its frames are refused.
    pub(super) fn granted(&self, disk: DiskId, session: SessionId) -> Option<(Epoch, bool)> {
        let owner = self.disks.get(&disk).filter(|owner| owner.is_on(session))?;
        Some((owner.epoch, owner.refused))
    }

    /// Refuses the frames of a disk until it is opened again; the session to be told, when that is new.
    pub(super) fn refuse(&mut self, disk: DiskId) -> Option<SessionId> {
        let session = self.session(disk)?;
        let owner = self.disks.get_mut(&disk).filter(|owner| !owner.refused)?;
        owner.refused = true;
        Some(session)
    }
}

fn held_by(host: &Host) -> String {
    format!(
        "host {} has this disk, for a VM of the same UUID (or name) and device; one history cannot follow two disks: \
         give the VM its own UUID, or stop the other one. If the VM has moved here, the disk follows once the other \
         host has ended it and shipped its last writes",
        named(host)
    )
}

fn kept_for(host: &Host, keep: Duration) -> String {
    format!(
        "host {} has this disk, and is not connected; {} s after it was last heard, or after the server's start, \
         another host may have it. If both have a VM of this UUID, give one of them its own",
        named(host),
        keep.as_secs()
    )
}

fn named(host: &Host) -> String {
    let id = format!("machine id {:?}", host.id);
    if host.name.is_empty() { format!("with {id}") } else { format!("{} ({id})", host.name) }
}
