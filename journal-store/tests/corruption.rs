//! Bytes that rot: each flipped byte of each file is noticed, named, and costs nothing that does not depend on it.
//!
//! `CDP_FLIP_EVERY=1` flips every single byte; the default leaves some out where many bytes mean the same.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::{Lsn, Stamp};
use journal_store::io::{MemStorage, Tearing};
use journal_store::{
    Damage, DamageKind, DiskStore, PointSpec, Store, StoreConfig, StoreError, StoreErrorKind,
};
use support::{DISK, Made, Model, ROOT, Random, append, read_all, verify};

const DISK_BYTES: u64 = 24 << 10;

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn config() -> StoreConfig {
    StoreConfig { segment_data_bytes: 200_000, segment_records: 25, ..support::config() }
}

/// A small store of some segments, closed: its files, what the disk holds at each LSN, and a frame that would come next.
struct Sample {
    files: Files,
    model: Model,
    images: Vec<Vec<u8>>,
    next: Made,
}

impl Sample {
    fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let mut model = Model::sized(DISK, DISK_BYTES, [300, 500, 700, 900]);
        let storage = MemStorage::new();
        let store = Store::open_with(ROOT, Arc::new(storage.clone()), config()).expect("open");
        let disk = store.open_or_create(DISK, DISK_BYTES).expect("disk");
        let mut made = model.begin_epoch(random);
        for at in 0..14 {
            append(&store, &made).expect("append");
            if at % 3 != 1 {
                assert!(store.commit().is_empty());
            }
            made = model.random_frame(random);
        }
        assert!(store.commit().is_empty());
        // The active segment holds something too.
        let mut segments = 0;
        while disk.stats().segments != segments {
            segments = disk.stats().segments;
            append(&store, &made).expect("append");
            assert!(store.commit().is_empty());
            made = model.random_frame(random);
        }
        let whole = disk.durable_lsn();
        model.cut(whole);
        let good = model.restorable().iter().rposition(|good| *good).expect("a restorable point");
        disk.add_bookmark("by name", Lsn(good as u64 + 1)).expect("bookmark");
        assert!(disk.stats().segments > 2, "{:?}", disk.stats());
        let images = (0..=whole.0).map(|lsn| model.image(Lsn(lsn))).collect();
        Self { files: storage.files(), model, images, next: made }
    }

    fn last(&self) -> Lsn {
        self.model.last()
    }

    fn file(&self, name: &str) -> &PathBuf {
        self.files.keys().find(|path| path.ends_with(name)).unwrap_or_else(|| panic!("no {name}"))
    }

    fn flipped(&self, path: &Path, at: usize, bit: u8) -> Files {
        let mut files = self.files.clone();
        files.get_mut(path).expect("file")[at] ^= 1 << bit;
        files
    }
}

fn open(files: &Files, writable: bool) -> (Store, MemStorage) {
    let storage = MemStorage::with_files(files);
    let shared = Arc::new(storage.clone());
    let store = match writable {
        true => Store::open_with(ROOT, shared, config()),
        false => Store::open_read_only_with(ROOT, shared, config()),
    };
    (store.expect("the store opens, whatever became of a disk"), storage)
}

/// Reads a point: `None` if it is refused for a damage that is named.
fn read(disk: &Arc<DiskStore>, lsn: Lsn, path: &Path, what: &str) -> Option<Vec<u8>> {
    match disk.view_in_gap(lsn).and_then(|view| read_all(&view)) {
        Ok(bytes) => Some(bytes),
        Err(StoreError::Damaged { disk, path: named, first_lsn, last_lsn, .. }) => {
            assert_eq!((disk, &*named), (DISK, path), "{what}: another file is blamed");
            assert!(first_lsn <= lsn && first_lsn <= last_lsn, "{what}: {lsn} is refused for {first_lsn}");
            None
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Opens with one flipped byte and checks everything. Returns what was found.
fn check(
    sample: &Sample,
    path: &Path,
    at: usize,
    bit: u8,
    writable: bool,
    random: &mut Random,
) -> Vec<Damage> {
    let what = format!("{} at {at} bit {bit}, writable {writable}", path.display());
    let files = sample.flipped(path, at, bit);
    let (store, storage) = open(&files, writable);
    assert!(writable || storage.files() == files, "{what}: opened for reading, and changed");
    assert!(store.damaged().is_empty(), "{what}: one byte takes a whole disk");
    let disk = store.disk(DISK).expect("disk");
    let mut damage = disk.known_damage();
    damage.extend(verify(&disk));
    let whole = sample.last();
    let lost = damage.iter().filter(|damage| damage.kind.loses_points()).map(|damage| damage.first_lsn).min();
    let last = disk.durable_lsn();
    assert!(last == whole || lost == Some(last.next()), "{what}: LSNs are missing, {damage:?}");
    let before = lost.map_or(whole, Lsn::prev);
    let chosen = [before, whole, Lsn(1 + random.below(whole.0)), Lsn(1 + random.below(whole.0))];
    for lsn in chosen.into_iter().filter(|lsn| *lsn > Lsn::ZERO) {
        let must = lsn <= before;
        match read(&disk, lsn, path, &what) {
            Some(bytes) => assert!(bytes == sample.images[lsn.0 as usize], "{what}: LSN {lsn} reads wrong"),
            None => assert!(!must, "{what}: LSN {lsn} does not need what is damaged, {damage:?}"),
        }
        match disk.resolve(&PointSpec::Lsn(lsn), Stamp::MAX, None) {
            Ok(point) => {
                assert_eq!(point.stamp, sample.model.records[lsn.0 as usize - 1].record.stamp, "{what}")
            }
            Err(error) if error.kind() == StoreErrorKind::Damaged => {
                assert!(!damage.is_empty(), "{what}: {error}")
            }
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Point, "{what}: {error}"),
        }
    }
    if writable {
        // It goes on, unless where the journal ends is not known.
        let appended = append(&store, &sample.next);
        assert_eq!(appended.is_ok(), last == whole, "{what}: {appended:?}");
        assert!(store.commit().is_empty(), "{what}");
    }
    for damage in &damage {
        assert_eq!(&*damage.path, path, "{what}: another file is blamed");
    }
    damage
}

#[test]
fn a_flipped_byte_anywhere_is_noticed_named_and_costs_only_what_needs_it() {
    let every: usize = std::env::var("CDP_FLIP_EVERY").map_or(17, |text| text.parse().expect("a number"));
    let sample = Sample::new(1);
    let random = &mut Random::new(2);
    let (mut flips, mut kinds) = (0, BTreeMap::<_, usize>::new());
    for (path, bytes) in &sample.files {
        let mark = path.ends_with("durable");
        let mut at = 0;
        while at < bytes.len() {
            // In a header each bit has a meaning of its own.
            let chosen = random.below(8) as u8;
            let bits = if at < 64 && every == 1 { 0..8 } else { chosen..chosen + 1 };
            for bit in bits {
                let told = check(&sample, path, at, bit, false, random);
                let mended = check(&sample, path, at, bit, true, random);
                flips += 1;
                assert!(mark || !told.is_empty(), "{} at {at} bit {bit}: nobody noticed", path.display());
                assert!(
                    mark || !mended.is_empty(),
                    "{} at {at} bit {bit}: a writer kept quiet",
                    path.display()
                );
                told.iter().for_each(|damage| *kinds.entry(damage.kind.as_str()).or_default() += 1);
            }
            // Of zeroes, which are most bytes, one is like the other.
            at += match every {
                1 => 1,
                _ if at < 64 => 3,
                _ if bytes[at] == 0 => every * 4 + random.below(every as u64) as usize,
                _ => 1 + random.below(every as u64 * 2) as usize,
            };
        }
    }
    println!("{flips} flipped bytes, found as {kinds:?}");
    assert!(flips > 300 && kinds.len() > 5, "{flips}: {kinds:?}");
}

#[test]
fn rot_in_the_last_commit_is_told_from_a_tear() {
    let sample = Sample::new(3);
    let path = sample.files.keys().rfind(|path| path.to_string_lossy().contains("/meta-")).expect("meta");
    let at = sample.files[path].len() - 1;
    let (store, _) = open(&sample.flipped(path, at, 0), true);
    let disk = store.disk(DISK).expect("disk");
    let damage = disk.known_damage();
    assert_eq!((damage.len(), damage[0].kind), (1, DamageKind::Records), "{damage:?}");
    assert_eq!((&damage[0].path, damage[0].first_lsn), (path, disk.durable_lsn().next()));
    assert!(disk.durable_lsn() < sample.last());
    let refused = store.open_or_create(DISK, DISK_BYTES).expect_err("nothing is appended behind damage");
    assert_eq!(refused.kind(), StoreErrorKind::Damaged, "{refused}");
}

#[test]
fn without_the_mark_rot_in_the_last_commit_looks_like_a_tear() {
    let sample = Sample::new(3);
    let path = sample.files.keys().rfind(|path| path.to_string_lossy().contains("/meta-")).expect("meta");
    let mut files = sample.flipped(path, sample.files[path].len() - 1, 0);
    files.remove(sample.file("durable"));
    let (store, _) = open(&files, true);
    let disk = store.disk(DISK).expect("disk");
    assert!(disk.durable_lsn() < sample.last());
    assert_eq!(disk.known_damage(), []);
}

#[test]
fn a_torn_tail_is_never_called_damage() {
    let random = &mut Random::new(4);
    for seed in 0..40 {
        let mut model = Model::sized(DISK, DISK_BYTES, [300, 500, 700, 900]);
        let storage = MemStorage::new();
        let store = Store::open_with(ROOT, Arc::new(storage.clone()), config()).expect("open");
        store.open_or_create(DISK, DISK_BYTES).expect("disk");
        append(&store, &model.begin_epoch(random)).expect("append");
        assert!(store.commit().is_empty());
        for _ in 0..4 {
            append(&store, &model.random_frame(random)).expect("append");
        }
        let torn = storage.crash(Tearing::Torn, |n| random.below(n as u64) as usize);
        let store = Store::open_with(ROOT, Arc::new(torn), config()).expect("open");
        let disk = store.disk(DISK).expect("disk");
        assert_eq!((disk.known_damage(), verify(&disk)), (vec![], vec![]), "{seed}");
    }
}

#[test]
fn a_manifest_and_its_copy_that_both_rot_cost_that_disk_only() {
    let sample = Sample::new(5);
    let mut files = sample.files.clone();
    for name in ["manifest", "manifest.copy"] {
        files.get_mut(sample.file(name)).expect("file")[30] ^= 1;
    }
    let (store, _) = open(&files, true);
    assert!(store.disk(DISK).is_none());
    assert_eq!(store.damaged().len(), 1);
    let error = store.open_or_create(DISK, DISK_BYTES).expect_err("damaged");
    assert_eq!(error.kind(), StoreErrorKind::Damaged, "{error}");
    let other = journal_format::DiskId(*b"some-other-disk!");
    store.open_or_create(other, 4096).expect("another disk is as good as ever");
}

#[test]
fn an_old_copy_of_a_manifest_is_not_taken_for_the_manifest() {
    let sample = Sample::new(5);
    let mut files = sample.files.clone();
    // A manifest from before the last seal: made by cutting the history shorter.
    let old = {
        let mut manifest =
            journal_format::manifest::Manifest::parse(&files[sample.file("manifest")]).expect("manifest");
        let last = manifest.segments.pop().expect("active");
        manifest.segments.last_mut().expect("sealed").sealed = None;
        manifest.next_segment = last.segment;
        manifest.encode().expect("manifest")
    };
    files.insert(sample.file("manifest.copy").clone(), old);
    files.get_mut(sample.file("manifest")).expect("file")[30] ^= 1;
    let (store, storage) = open(&files, true);
    assert!(store.disk(DISK).is_none(), "the newest segment would be thrown away");
    assert_eq!(storage.files(), files, "nothing is removed");
}

#[test]
fn bookmarks_that_cannot_be_read_are_said_to_be_so_and_records_still_have_theirs() {
    let sample = Sample::new(5);
    let mut files = sample.files.clone();
    for name in ["bookmarks", "bookmarks.copy"] {
        files.get_mut(sample.file(name)).expect("file")[70] ^= 1;
    }
    let (store, _) = open(&files, true);
    let disk = store.disk(DISK).expect("disk");
    let resolve = |name: &str| disk.resolve(&PointSpec::Bookmark(name.into()), Stamp::MAX, None);
    assert_eq!(resolve("by name").expect_err("damaged").kind(), StoreErrorKind::Damaged);
    let listed = disk.history().bookmarks;
    for (name, lsn) in sample.model.names() {
        assert!(listed.iter().any(|mark| (&mark.name, mark.lsn) == (&name, lsn)), "{name}");
    }
}

/// What `docs/operating/running.md` tells an operator to do when the end of a journal is damaged.
#[test]
fn a_damaged_journal_that_is_set_aside_is_still_read_and_a_new_one_begins() {
    let sample = Sample::new(3);
    let path = sample.files.keys().rfind(|path| path.to_string_lossy().contains("/meta-")).expect("meta");
    let files = sample.flipped(path, sample.files[path].len() - 1, 0);
    let moved = files.into_iter().map(|(path, bytes)| {
        (Path::new("/aside").join(path.strip_prefix(ROOT).expect("inside the store")), bytes)
    });
    let storage = Arc::new(MemStorage::with_files(&moved.collect()));
    let aside = Store::open_read_only_with("/aside", storage.clone(), config()).expect("open");
    let disk = aside.disk(DISK).expect("disk");
    let last = disk.durable_lsn();
    assert!(last > Lsn(20) && last < sample.last());
    let bytes = disk.view_in_gap(last).and_then(|view| read_all(&view)).expect("read");
    assert!(bytes == sample.images[last.0 as usize]);
    let store = Store::open_with(ROOT, storage, config()).expect("open");
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("a new journal");
    assert_eq!(disk.durable_lsn(), Lsn::ZERO);
}

fn files_of(sample: &Sample, kind: &str) -> Vec<PathBuf> {
    let is_it = |path: &&PathBuf| path.to_string_lossy().contains(&format!("/{kind}-"));
    sample.files.keys().filter(is_it).cloned().collect()
}

/// A file of another segment where the newest was: the history behind is gone, and the hint said that nothing is lost.
#[test]
fn a_foreign_file_loses_points_and_says_so() {
    let sample = Sample::new(5);
    for kind in ["meta", "data"] {
        let names = files_of(&sample, kind);
        let (first, newest) = (names.first().expect("a segment"), names.last().expect("a segment"));
        let mut files = sample.files.clone();
        files.insert(newest.clone(), sample.files[first].clone());
        let (store, _) = open(&files, true);
        let disk = store.disk(DISK).expect("disk");
        assert!(disk.durable_lsn() < sample.last());
        let known = disk.known_damage();
        let damage = known.iter().find(|damage| damage.path == *newest).expect("it is named");
        assert_eq!(damage.kind, DamageKind::Foreign);
        assert!(damage.kind.loses_points() && damage.kind.advice().contains("put back"), "{damage:?}");
        assert!(!damage.kind.advice().contains("nothing is lost"), "{damage:?}");
        assert!(verify(&disk).iter().any(|found| found.kind == DamageKind::Foreign), "a check says it too");
    }
}

#[test]
fn neighbours_are_one_range_in_a_check() {
    let sample = Sample::new(6);
    let path = files_of(&sample, "data").remove(0);
    let mut files = sample.files.clone();
    let bytes = files.get_mut(&path).expect("a data file");
    // All of it, behind the header's page.
    bytes[4096..].iter_mut().for_each(|byte| *byte ^= 0x55);
    let (store, _) = open(&files, false);
    let damage = verify(&store.disk(DISK).expect("disk"));
    let of_data: Vec<_> = damage.iter().filter(|damage| damage.kind == DamageKind::Data).collect();
    let places = |damage: &&Damage| {
        let said = damage.detail.rsplit_once("the first of ").and_then(|(_, count)| count.split(' ').next());
        said.map_or(1, |count| count.parse::<usize>().expect("a number"))
    };
    let frames: usize = of_data.iter().map(places).sum();
    assert!(frames > of_data.len(), "{frames} frames in {} parts: {of_data:?}", of_data.len());
    for pair in of_data.windows(2) {
        assert!(pair[0].last_lsn.next() < pair[1].first_lsn, "neighbours: {pair:?}");
    }
    assert!(of_data.iter().all(|damage| damage.path == path && damage.offset >= 4096), "{of_data:?}");
}

/// As versions wrote it that did not fill the last page.
#[test]
fn a_data_file_that_ends_with_its_last_entry_is_as_good() {
    let sample = Sample::new(7);
    let path = files_of(&sample, "data").pop().expect("a data file");
    let mut files = sample.files.clone();
    let bytes = files.get_mut(&path).expect("a data file");
    assert!(bytes.len().is_multiple_of(4096));
    bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).expect("data") + 1);
    assert!(!bytes.len().is_multiple_of(4096));
    for writable in [false, true] {
        let (store, storage) = open(&files, writable);
        let disk = store.disk(DISK).expect("disk");
        assert_eq!((disk.durable_lsn(), disk.known_damage(), verify(&disk)), (sample.last(), vec![], vec![]));
        let left = storage.files()[&path].len();
        assert_eq!(
            left.is_multiple_of(4096),
            writable,
            "opening for writing pads it, reading changes nothing"
        );
    }
}
