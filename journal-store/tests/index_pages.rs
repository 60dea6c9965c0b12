//! Rot in the large tables of an index, which opening does not look at: whoever comes to it gets the right answer, it is
//! noted, and mended where that can be.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use journal_format::{ByteRange, DataSpan, Lsn, Op};
use journal_store::io::{Hook, HookStorage, MemStorage, Storage};
use journal_store::{Damage, DamageKind, DiskStore, Store, StoreConfig, StoreError, View};
use support::{Change, DISK, FailAt, Failing, Model, ROOT, Random, append, verify};

const CHUNK: u64 = 256 << 10;
const CHUNKS: u64 = 500;
const DISK_BYTES: u64 = CHUNKS * CHUNK;
/// All writes are in so many bytes at the begin of a chunk.
const WRITTEN: u64 = 512;
const FRAME_RECORDS: u64 = 100;

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn config() -> StoreConfig {
    StoreConfig { segment_data_bytes: 1 << 20, segment_records: 1000, ..support::config() }
}

/// A closed store of two sealed segments and an active one, each with writes to nearly all chunks: an index has two pages of
/// chunks and six of extents.
struct Sample {
    files: Files,
    last: Lsn,
    good: Opened,
}

impl Sample {
    fn new() -> Self {
        let random = &mut Random::new(7);
        let mut model = Model::sized(DISK, DISK_BYTES, [16; 4]);
        let storage = MemStorage::new();
        let store = Store::open_with(ROOT, Arc::new(storage.clone()), config()).expect("open");
        let disk = store.open_or_create(DISK, DISK_BYTES).expect("disk");
        append(&store, &model.begin_epoch(random)).expect("append");
        for _ in 0..25 {
            let writes = (0..FRAME_RECORDS).map(|_| write(random)).collect();
            append(&store, &model.frame(writes, random)).expect("append");
            assert!(store.commit().is_empty());
        }
        assert_eq!(disk.stats().segments, 3);
        let (files, last) = (storage.files(), disk.durable_lsn());
        let good = open(&MemStorage::with_files(&files), false);
        Self { files, last, good }
    }

    fn index(&self, segment: u32) -> &PathBuf {
        self.file(&format!("index-{segment:06}.idx"))
    }

    fn file(&self, name: &str) -> &PathBuf {
        self.files.keys().find(|path| path.ends_with(name)).expect("the file")
    }

    /// Opens the disk with each place of an index rotten, as a reader and as a writer.
    fn with_rot(&self, path: &Path, mut look: impl FnMut(usize, bool, &MemStorage, &Opened)) {
        for at in self.places(path) {
            for writable in [false, true] {
                let storage = self.flipped(path, at);
                look(at, writable, &storage, &open(&storage, writable));
            }
        }
    }

    fn flipped(&self, path: &Path, at: usize) -> MemStorage {
        let mut files = self.files.clone();
        files.get_mut(path).expect("file")[at] ^= 0x10;
        MemStorage::with_files(&files)
    }

    /// In an index: the first and last bytes of chunks and of extents, those beside the border between two pages, and one
    /// in the middle of each.
    fn places(&self, path: &Path) -> Vec<usize> {
        let bytes = &self.files[path];
        let count =
            |at: usize| u32::from_le_bytes(bytes[4096 + at..][..4].try_into().expect("4 bytes")) as usize;
        let (extents, end) = (bytes.len() - 24 * count(56), bytes.len());
        let chunks = extents - 12 * count(52);
        assert!(count(52) > 341 && count(56) > 900, "an index of several pages");
        let border = chunks + 341 * 12;
        vec![
            chunks,
            chunks + 2000,
            border - 1,
            border,
            extents - 1,
            extents,
            extents + 170 * 24 - 1,
            extents + 170 * 24,
            extents.midpoint(end),
            end - 1,
        ]
    }

    /// Points in the first segment, the second, and the third.
    fn points(&self) -> [Lsn; 3] {
        [Lsn(700), Lsn(1700), self.last]
    }

    /// Compares all that was ever written, and what extents and differences say, with the undamaged store.
    fn compare(&self, disk: &Arc<DiskStore>, what: &str) -> Result<(), StoreError> {
        for lsn in self.points() {
            let (view, good) = (view(disk, lsn), view(&self.good, lsn));
            assert!(contents(&view)? == contents(&good)?, "{what}: LSN {lsn} reads wrong");
            let whole = ByteRange::new(0, DISK_BYTES).expect("disk");
            let extents = |view: &View| view.extents(whole).expect("extents").collect::<Result<Vec<_>, _>>();
            assert!(extents(&view)? == extents(&good)?, "{what}: LSN {lsn} has other extents");
        }
        let [from, _, to] = self.points();
        let diff = |disk: &Arc<DiskStore>| {
            let (from, to) = (view(disk, from), view(disk, to));
            to.diff(&from).expect("difference").collect::<Result<Vec<_>, _>>()
        };
        assert!(diff(disk)? == diff(&self.good)?, "{what}: another difference");
        Ok(())
    }
}

fn write(random: &mut Random) -> (Op, Change, Option<String>) {
    let offset = random.below(CHUNKS) * CHUNK + random.below(WRITTEN - 16);
    let range = ByteRange::new(offset, 16).expect("range");
    let data = DataSpan { pos: 0, len: 16 };
    let bytes = random.block()[..16].to_vec();
    (Op::Write { range, data, fill: false, fua: false }, Change::Write(offset, bytes), None)
}

/// A disk of a store that is open: of a store that is closed nothing is written any more.
struct Opened {
    disk: Arc<DiskStore>,
    _store: Store,
}

impl Deref for Opened {
    type Target = Arc<DiskStore>;

    fn deref(&self) -> &Self::Target {
        &self.disk
    }
}

fn try_open(storage: Arc<dyn Storage>, writable: bool) -> Opened {
    let store = match writable {
        true => Store::open_with(ROOT, storage, config()),
        false => Store::open_read_only_with(ROOT, storage, config()),
    };
    let store = store.expect("open");
    assert!(store.damaged().is_empty(), "{:?}", store.damaged());
    Opened { disk: store.disk(DISK).expect("disk"), _store: store }
}

fn open(storage: &MemStorage, writable: bool) -> Opened {
    try_open(Arc::new(storage.clone()), writable)
}

fn view(disk: &Arc<DiskStore>, lsn: Lsn) -> View {
    disk.view_in_gap(lsn).expect("view")
}

fn contents(view: &View) -> Result<Vec<u8>, StoreError> {
    let mut all = Vec::new();
    for chunk in 0..CHUNKS {
        let mut bytes = [0xaa; WRITTEN as usize];
        view.read(chunk * CHUNK, &mut bytes)?;
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// One damage, of that index, in the page of that byte.
fn assert_noted(damage: &[Damage], path: &Path, at: usize, what: &str) {
    let [damage] = damage else { panic!("{what}: {damage:?}") };
    assert_eq!((&*damage.path, damage.kind), (path, DamageKind::Index), "{what}");
    assert!((at - 4095..=at).contains(&(damage.offset as usize)), "{what}: {damage:?}");
    assert!(!damage.kind.loses_points());
}

#[test]
fn rot_in_any_page_is_not_looked_for_at_opening_and_costs_no_reader_anything() {
    let sample = Sample::new();
    for segment in [1, 2] {
        let path = sample.index(segment);
        for at in sample.places(path) {
            for writable in [false, true] {
                let what = format!("segment {segment}, byte {at}, writable {writable}");
                let storage = sample.flipped(path, at);
                let rotten = storage.files();
                let disk = open(&storage, writable);
                assert_eq!(disk.known_damage(), [], "{what}");
                sample.compare(&disk, &what).expect("all can be read");
                assert_noted(&disk.known_damage(), path, at, &what);
                let left = &storage.files()[path];
                assert_eq!(left == &rotten[path], !writable, "{what}: only a writer changes the file");
                assert_eq!(left == &sample.files[path], writable, "{what}: what was made again is what was");
                sample.compare(&disk, &what).expect("and once more");
                assert_eq!((disk.known_damage().len(), verify(&disk).is_empty()), (1, writable), "{what}");
            }
        }
    }
}

#[test]
fn verifying_checks_pages_that_nobody_has_read_and_a_writer_mends_them() {
    let sample = Sample::new();
    let path = sample.index(1);
    sample.with_rot(path, |at, writable, storage, disk| {
        let found = verify(disk);
        assert_eq!(found.len(), 1, "byte {at}: {found:?}");
        assert_eq!((&*found[0].path, found[0].kind), (&**path, DamageKind::Index), "byte {at}");
        assert_eq!(storage.files()[path] == sample.files[path], writable, "byte {at}");
        assert_eq!(verify(disk).is_empty(), writable, "byte {at}");
        sample.compare(disk, &format!("byte {at}")).expect("all can be read");
    });
}

#[test]
fn where_the_records_have_rotted_too_what_needs_the_page_is_refused_and_nothing_else() {
    let sample = Sample::new();
    let (path, meta) = (sample.index(1), sample.file("meta-000001.seg"));
    for at in sample.places(path) {
        for writable in [false, true] {
            let what = format!("byte {at}, writable {writable}");
            let mut files = sample.flipped(path, at).files();
            let middle = files[meta].len() / 2;
            files.get_mut(meta).expect("file")[middle] ^= 1;
            let storage = MemStorage::with_files(&files);
            let disk = open(&storage, writable);
            let (mut refused, mut right) = (0, 0);
            let (bad, good) = (view(&disk, Lsn(700)), view(&sample.good, Lsn(700)));
            for chunk in 0..CHUNKS {
                let (mut found, mut want) = ([0xaa; WRITTEN as usize], [0; WRITTEN as usize]);
                good.read(chunk * CHUNK, &mut want).expect("undamaged");
                match bad.read(chunk * CHUNK, &mut found) {
                    Ok(()) => {
                        assert!(found == want, "{what}: chunk {chunk} reads wrong");
                        right += 1;
                    }
                    Err(StoreError::Damaged { path: named, first_lsn, last_lsn, detail, .. }) => {
                        assert_eq!(named, *meta, "{what}");
                        assert!(Lsn(1) < first_lsn && first_lsn < last_lsn && last_lsn < Lsn(1100), "{what}");
                        assert!(detail.contains("index"), "{what}: {detail}");
                        refused += 1;
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
            assert!(refused > 0, "{what}: nobody came to it");
            // The first page of the chunks, which holds the middle, is in the way of every search.
            assert!(right > 0 || at < sample.places(path)[3], "{what}: {refused} refused");
            let whole = ByteRange::new(0, DISK_BYTES).expect("disk");
            let extents: Vec<_> = bad.extents(whole).expect("extents").collect();
            assert!(extents.last().expect("some").is_err(), "{what}: extents that nobody knows");
            assert!(extents.iter().rev().skip(1).all(Result::is_ok), "{what}: something follows an error");
            assert_noted(&disk.known_damage(), path, at, &what);
            assert!(storage.files() == files || writable, "{what}: changed");
            let kinds: Vec<_> = verify(&disk).iter().map(|damage| damage.kind).collect();
            assert!(kinds.contains(&DamageKind::Index) && kinds.contains(&DamageKind::Records), "{kinds:?}");
        }
    }
}

#[test]
fn an_index_that_cannot_be_written_again_is_kept_in_memory() {
    let sample = Sample::new();
    let path = sample.index(1);
    let at = sample.places(path)[6];
    // Each call that the mending makes fails once, alone or with all that follow.
    for failing in [Failing::Once, Failing::FromThenOn] {
        let mut n = 1;
        loop {
            let memory = sample.flipped(path, at);
            let fail = FailAt::new(&memory, false);
            let hooked = HookStorage::new(Arc::new(memory.clone()), Arc::clone(&fail) as Arc<dyn Hook>);
            let disk = try_open(Arc::new(hooked), true);
            fail.fail_at(n, failing, ErrorKind::StorageFull);
            sample.compare(&disk, &format!("call {n} fails")).expect("all can be read");
            assert_noted(&disk.known_damage(), path, at, "noted");
            assert!(!disk.is_poisoned(), "call {n}: what is appended does not depend on it");
            if fail.calls() < n {
                break;
            }
            fail.fail_at(0, failing, ErrorKind::StorageFull);
            drop(disk);
            let disk = open(&memory, true);
            sample.compare(&disk, "opened again").expect("all can be read");
            assert_eq!(verify(&disk), []);
            assert!(memory.files()[path] == sample.files[path], "call {n}: mended in the end");
            n += 1;
        }
        assert!(n > 4, "creating, writing, syncing, renaming, syncing the folder: {n}");
    }
}

#[test]
fn many_readers_that_come_to_the_same_bad_page_are_all_answered() {
    let sample = Sample::new();
    let path = sample.index(1);
    sample.with_rot(path, |at, writable, storage, disk| {
        let want = contents(&view(&sample.good, Lsn(700))).expect("undamaged");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let got = contents(&view(disk, Lsn(700))).expect("read");
                    assert!(got == want, "byte {at}: wrong");
                });
            }
        });
        assert_noted(&disk.known_damage(), path, at, "noted once");
        assert_eq!(storage.files()[path] == sample.files[path], writable);
    });
}
