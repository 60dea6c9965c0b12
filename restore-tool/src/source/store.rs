//! History from a store's files, with or without a server running.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cdp_api::{Kind, PointSpec, Points, ResolvedPoint};
use journal_format::{ByteRange, DiskId, Stamp};
use journal_store::{DiskStore, ExtentKind, Store, StoreError, View};
use serde::Deserialize;

use super::{DiskName, Image, Listing, Source, first_from};
use crate::error::RestoreError;
use crate::limits::{READ_THREADS, WINDOW_BYTES};

/// A store's directory, opened for reading.
pub struct StoreSource {
    store: Store,
    root: PathBuf,
}

impl StoreSource {
    /// Opens the store in `root`.
    ///
    /// # Errors
    /// `Source` when there is none, or it cannot be read.
    pub fn open(root: &Path) -> Result<Self, RestoreError> {
        let store = Store::open_read_only(root).map_err(failed)?;
        Ok(Self { store, root: root.to_owned() })
    }

    fn names(&self) -> Vec<(DiskId, DiskName)> {
        let damaged = self.store.damaged().into_iter().map(|(id, _)| id);
        self.store.disks().into_iter().chain(damaged).map(|id| (id, name_of(&self.root, id))).collect()
    }

    fn opened(&self, id: DiskId) -> Result<Arc<DiskStore>, RestoreError> {
        self.store.disk(id).ok_or_else(|| {
            let damaged = self.store.damaged().into_iter().find(|(disk, _)| *disk == id);
            match damaged {
                Some((_, why)) => RestoreError::Source {
                    what: format!("the journal of disk {id}"),
                    detail: why.to_string(),
                    hint: "put back a copy of what is damaged".to_owned(),
                },
                None => no_such_disk(&id.to_string()),
            }
        })
    }

    /// The disk that `wanted` (UUID or `vm/device`) means.
    fn find(&self, wanted: &str) -> Result<(Arc<DiskStore>, DiskName), RestoreError> {
        let id = wanted.parse::<DiskId>().ok();
        let is_it = |(disk, name): &(DiskId, DiskName)| id == Some(*disk) || name.label() == wanted;
        let mut found: Vec<_> = self.names().into_iter().filter(is_it).collect();
        if found.len() > 1 {
            let each = found.iter().map(|(id, name)| format!("{id} on host {}", name.host));
            let all = each.collect::<Vec<_>>().join(", ");
            let detail = format!("several disks are called '{wanted}': {all}");
            return Err(RestoreError::problem(
                Kind::AmbiguousDisk,
                detail,
                "give the UUID of the one you mean",
            ));
        }
        let (id, name) = found.pop().ok_or_else(|| no_such_disk(wanted))?;
        Ok((self.opened(id)?, name))
    }
}

impl Source for StoreSource {
    fn list(&self, disk: Option<&str>) -> Result<Vec<Listing>, RestoreError> {
        let disks = match disk {
            Some(wanted) => vec![self.find(wanted)?],
            None => {
                let open = |(id, name)| self.opened(id).map(|disk| (disk, name));
                self.names().into_iter().map(open).collect::<Result<_, _>>()?
            }
        };
        Ok(disks.into_iter().map(|(disk, name)| listing(&disk, name)).collect())
    }

    fn open(&self, disk: &str, at: &PointSpec) -> Result<Box<dyn Image>, RestoreError> {
        let (disk, name) = self.find(disk)?;
        let point = disk.resolve(&at.into(), now(), None).map_err(|error| refused(at, error))?;
        let view = disk.view(point.lsn).map_err(failed)?;
        Ok(Box::new(StoreImage {
            view,
            name,
            point: ResolvedPoint::from(point),
            window: 0..0,
            data: Vec::new(),
        }))
    }
}

/// What the server wrote beside the journal of a disk.
#[derive(Default, Deserialize)]
#[serde(default)]
struct NameFile {
    vm: String,
    device: String,
    host: String,
}

/// A disk's names; only its UUID where the server has not written them, or not legibly.
fn name_of(root: &Path, id: DiskId) -> DiskName {
    let path = root.join("disks").join(id.to_string()).join("name.json");
    let file: NameFile =
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    DiskName { id: id.to_string(), vm: file.vm, device: file.device, host: file.host }
}

fn no_such_disk(wanted: &str) -> RestoreError {
    let detail = format!("the store has no disk {wanted}");
    RestoreError::problem(Kind::NoSuchDisk, detail, "'cdp-restore list' shows the disks, with their UUIDs")
}

fn failed(error: StoreError) -> RestoreError {
    let hint = match &error {
        StoreError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            "only the user of the cdp-server and root may read its store; run cdp-restore as one of them, or read \
             through the server, with --server"
        }
        _ => "check --store; 'cdp-restore list --store DIR' shows what can be read",
    };
    RestoreError::Source { what: "the store".to_owned(), detail: error.to_string(), hint: hint.to_owned() }
}

fn listing(disk: &DiskStore, name: DiskName) -> Listing {
    let history = disk.history();
    let newest = history.recoverable.last().and_then(|range| {
        let newest = journal_store::PointSpec::Lsn(range.last.0);
        disk.resolve(&newest, now(), None).ok().map(ResolvedPoint::from)
    });
    let points = Points::of(name.id.clone(), &history, newest);
    Listing { name, disk_bytes: disk.disk_bytes(), points }
}

fn now() -> Stamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn refused(at: &PointSpec, error: StoreError) -> RestoreError {
    match error {
        StoreError::Point(reason) => RestoreError::Problem(Box::new(at.refused(reason))),
        other => failed(other),
    }
}

struct StoreImage {
    view: View,
    name: DiskName,
    point: ResolvedPoint,
    /// Of this range, `data` says what is not zero.
    window: Range<u64>,
    data: Vec<Range<u64>>,
}

impl StoreImage {
    fn look_at(&mut self, from: u64) -> Result<(), RestoreError> {
        let length = WINDOW_BYTES.min(self.view.disk_bytes() - from);
        let Some(range) = ByteRange::new(from, length) else {
            let detail = format!("the disk has {} bytes, more than a disk can have", self.view.disk_bytes());
            return Err(RestoreError::Source { what: "the store".to_owned(), detail, hint: String::new() });
        };
        self.data.clear();
        for extent in self.view.extents(range).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            if extent.kind == ExtentKind::Data {
                self.data.push(extent.range.offset()..extent.range.end());
            }
        }
        self.window = range.offset()..range.end();
        Ok(())
    }
}

impl Image for StoreImage {
    fn disk(&self) -> &DiskName {
        &self.name
    }

    fn point(&self) -> &ResolvedPoint {
        &self.point
    }

    fn disk_bytes(&self) -> u64 {
        self.view.disk_bytes()
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError> {
        let mut from = from;
        while from < self.view.disk_bytes() {
            if !self.window.contains(&from) {
                self.look_at(from)?;
            }
            if let Some(stretch) = first_from(&self.data, from) {
                return Ok(Some(stretch));
            }
            from = self.window.end;
        }
        Ok(None)
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError> {
        self.view.read_with(READ_THREADS, offset, into).map_err(failed)
    }
}
