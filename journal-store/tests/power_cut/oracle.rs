//! What the store may answer after a power cut, and the check that it does.

use std::collections::BTreeMap;
use std::sync::Arc;

use journal_format::Lsn;
use journal_store::io::{MemStorage, Storage, Tearing};
use journal_store::{DiskStore, Store, StoreConfig};

use crate::support::{DISK, Made, Model, ROOT, Random, append, read_all, verify};

/// Size of the disk in bytes: small, so that whole images can be compared thousands of times.
pub const DISK_BYTES: u64 = 48 << 10;

/// The frames of the story, made before it begins, and what the disk holds after each record.
pub struct Oracle {
    pub frames: Vec<Made>,
    images: Vec<Vec<u8>>,
    restorable: Vec<bool>,
    names: BTreeMap<String, Lsn>,
}

/// What somebody outside knows of the disk, when the power fails.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct Known {
    /// The disk was made: `open_or_create` has returned.
    pub made: bool,
    /// This was acknowledged.
    pub acknowledged: Lsn,
    /// This was handed over.
    pub appended: Lsn,
    /// These bookmarks were set.
    pub bookmarks: Vec<(String, Lsn)>,
    /// This one is being set.
    pub setting: Option<(String, Lsn)>,
    /// A file has rotted, and the opening that mends it is not over.
    pub rotten: bool,
}

pub type Verdict = Result<(), String>;

/// `Err` with what is wrong, unless it holds.
pub fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(what()) }
}

pub fn config() -> StoreConfig {
    StoreConfig {
        segment_data_bytes: 200_000,
        segment_meta_bytes: 1 << 20,
        segment_records: 30,
        cache_bytes: 1 << 20,
        sync_threads: 1,
        // Each head, and each page of data, may be lost by itself.
        waiting_bytes: 0,
        piece_bytes: 4 << 10,
        whole_pieces: 1,
        pieces_under_way: 0,
    }
}

pub fn open(storage: Arc<dyn Storage>) -> Result<Store, String> {
    Store::open_with(ROOT, storage, config()).map_err(|error| format!("the store does not open: {error}"))
}

impl Oracle {
    pub fn new(seed: u64, frames: usize) -> Self {
        let random = &mut Random::new(seed);
        let mut model = Model::sized(DISK, DISK_BYTES, [300, 600, 2000, 6000]);
        let mut made = vec![model.begin_epoch(random)];
        for at in 1..frames {
            made.push(if at % 15 == 0 { model.begin_epoch(random) } else { model.random_frame(random) });
        }
        let images = (0..=model.last().0).map(|lsn| model.image(Lsn(lsn))).collect();
        let (restorable, names) = (model.restorable(), model.names());
        Self { frames: made, images, restorable, names }
    }

    /// The frames behind `lsn`.
    pub fn frames_after(&self, lsn: Lsn) -> impl Iterator<Item = &Made> {
        self.frames.iter().filter(move |made| made.last > lsn)
    }

    pub fn is_restorable(&self, lsn: Lsn) -> bool {
        self.restorable[lsn.0 as usize - 1]
    }

    pub fn point(&self, disk: &Arc<DiskStore>, lsn: Lsn) -> Verdict {
        let bytes = disk.view_in_gap(lsn).and_then(|view| read_all(&view));
        let bytes = bytes.map_err(|error| format!("LSN {lsn} cannot be read: {error}"))?;
        ensure(bytes == self.images[lsn.0 as usize], || format!("LSN {lsn} reads wrong"))
    }

    /// Opens what a power cut (or the death of the process) left, and checks everything that `known` promises. Returns what
    /// the disk then calls durable.
    pub fn check(&self, image: &MemStorage, known: &Known, random: &mut Random) -> Result<Lsn, String> {
        let store = open(Arc::new(image.clone()))?;
        ensure(store.damaged().is_empty(), || format!("{:?}", store.damaged()))?;
        let Some(disk) = store.disk(DISK) else {
            return ensure(!known.made, || "the disk is gone".into()).map(|()| Lsn::ZERO);
        };
        let told = disk.durable_lsn();
        ensure(told >= known.acknowledged, || {
            format!("LSN {} was acknowledged, {told} is left", known.acknowledged)
        })?;
        ensure(told <= known.appended, || format!("LSN {told} was never appended"))?;
        ensure(told == Lsn::ZERO || self.frames.iter().any(|made| made.last == told), || {
            format!("half a frame, up to LSN {told}")
        })?;
        if told > Lsn::ZERO {
            self.point(&disk, told)?;
            self.point(&disk, Lsn(1 + random.below(told.0)))?;
        }
        // Pages of indexes are looked at by reading.
        let damage = disk.known_damage();
        ensure(damage.is_empty() || known.rotten, || format!("a power cut looks like damage: {damage:?}"))?;
        self.check_history(&disk, known)?;
        Ok(told)
    }

    fn check_history(&self, disk: &DiskStore, known: &Known) -> Verdict {
        let (history, told) = (disk.history(), disk.durable_lsn());
        let mut good = vec![false; told.0 as usize];
        for range in &history.recoverable {
            good[range.first.0.0 as usize - 1..range.last.0.0 as usize].fill(true);
        }
        ensure(good == self.restorable[..told.0 as usize], || "the gaps are wrong".into())?;
        let mut listed: Vec<_> = history.bookmarks.into_iter().map(|mark| (mark.name, mark.lsn)).collect();
        if let Some(setting) = &known.setting {
            listed.retain(|mark| mark != setting);
        }
        let mut want: Vec<_> = self
            .names
            .iter()
            .filter(|(_, lsn)| **lsn <= told)
            .map(|(name, lsn)| (name.clone(), *lsn))
            .collect();
        want.extend(known.bookmarks.iter().cloned());
        want.sort();
        listed.sort();
        ensure(listed == want, || format!("bookmarks {listed:?}, should be {want:?}"))
    }

    /// What was told after opening is durable, and the journal takes the frames that follow, durably.
    pub fn check_going_on(&self, image: &MemStorage, known: &Known, random: &mut Random) -> Verdict {
        let told = self.check(image, known, random)?;
        if !known.made {
            return Ok(());
        }
        let mended = Known { acknowledged: told, rotten: false, ..known.clone() };
        self.check(&image.crash(Tearing::Whole, |_| 0), &mended, random)
            .map_err(|error| format!("what was told after opening was not durable: {error}"))?;
        let store = open(Arc::new(image.clone()))?;
        let disk = store.disk(DISK).ok_or("the disk is gone")?;
        for made in self.frames_after(told).take(4) {
            append(&store, made).map_err(|error| format!("a frame is refused: {error}"))?;
        }
        let failures = store.commit();
        ensure(failures.is_empty(), || format!("{failures:?}"))?;
        let last = disk.durable_lsn();
        let known = Known { acknowledged: last, appended: last, ..mended };
        let damage = verify(&disk);
        ensure(damage.is_empty(), || format!("after going on: {damage:?}"))?;
        self.check(&image.crash(Tearing::Whole, |_| 0), &known, random)
            .map(drop)
            .map_err(|error| format!("after going on: {error}"))
    }
}
