//! Frames whose data is in parts: every byte comes back, by one thread or many; a read needs its parts and no others.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use journal_format::limits::PART_RAW_BYTES;
use journal_format::{ByteRange, DataSpan, Lsn, Op};
use journal_store::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage};
use journal_store::{DiskStore, Store, StoreErrorKind};
use support::{Change, DISK, Made, Model, ROOT, Random, append, assert_same, config, try_open, verify};

const DISK_BYTES: u64 = 2 << 20;
const BLOCK: u64 = 4 << 10;
const PART: u64 = PART_RAW_BYTES as u64;

/// Bytes that do not compress, or do.
fn contents(bytes: u64, noise: bool, random: &mut Random) -> Vec<u8> {
    let mut block = || if noise { random.block().to_vec() } else { vec![random.below(3) as u8; 64] };
    (0..bytes.div_ceil(64)).flat_map(|_| block()).take(bytes as usize).collect()
}

/// A frame of writes of these lengths at random places.
fn frame(model: &mut Model, lengths: &[u64], random: &mut Random) -> Made {
    let parts = lengths.iter().map(|&length| {
        let range = ByteRange::new(random.below(DISK_BYTES - length), length).expect("on the disk");
        let bytes = contents(length, random.chance(2), random);
        let data = DataSpan { pos: 0, len: length as u32 };
        (Op::Write { range, data, fill: false, fua: false }, Change::Write(range.offset(), bytes), None)
    });
    let parts = parts.collect();
    model.frame(parts, random)
}

/// A store with a disk whose epoch has begun.
fn begun(random: &mut Random) -> (MemStorage, Store, Model) {
    let storage = MemStorage::new();
    let store = Store::open_with(ROOT, Arc::new(storage.clone()), config()).expect("open");
    store.open_or_create(DISK, DISK_BYTES).expect("disk");
    let mut model = Model::sized(DISK, DISK_BYTES, [300, 500, 700, 900]);
    append(&store, &model.begin_epoch(random)).expect("append");
    (storage, store, model)
}

/// A frame that is one write, at the disk's start; durable.
fn append_one(store: &Store, model: &mut Model, bytes: Vec<u8>, random: &mut Random) {
    let range = ByteRange::new(0, bytes.len() as u64).expect("on the disk");
    let data = DataSpan { pos: 0, len: bytes.len() as u32 };
    let write =
        (Op::Write { range, data, fill: false, fua: false }, Change::Write(range.offset(), bytes), None);
    append(store, &model.frame(vec![write], random)).expect("append");
    assert!(store.commit().is_empty());
}

/// Frames of one part and of many, with records that lie across the borders of parts.
fn sample(random: &mut Random) -> (MemStorage, Model) {
    let (storage, store, mut model) = begun(random);
    let lengths: [&[u64]; 6] = [
        &[PART - 1],
        &[PART, 1],
        &[BLOCK; 128],
        &[100, 3 * PART, BLOCK, PART / 2, 5 * PART - 7, 17],
        &[PART + 1],
        &[64 << 10; 8],
    ];
    for round in 0..3 {
        for lengths in lengths {
            append(&store, &frame(&mut model, lengths, random)).expect("append");
        }
        if round < 2 {
            assert!(store.commit().is_empty());
        }
    }
    assert!(store.commit().is_empty());
    (storage, model)
}

fn opened(storage: &MemStorage) -> (Store, Arc<DiskStore>) {
    let store = try_open(Arc::new(storage.clone())).expect("opens");
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("the disk");
    (store, disk)
}

#[test]
fn every_byte_comes_back_at_each_point_by_one_thread_or_many() {
    let random = &mut Random::new(5);
    let (storage, model) = sample(random);
    let (_store, disk) = opened(&storage);
    assert!(verify(&disk).is_empty());
    let last = model.last();
    for lsn in (1..=last.0).step_by(37).chain([last.0]) {
        let (view, image) = (disk.view_in_gap(Lsn(lsn)).expect("a point"), model.image(Lsn(lsn)));
        for threads in [1, 3, 200] {
            let mut whole = vec![7; image.len()];
            view.read_with(NonZeroUsize::new(threads).expect("some"), 0, &mut whole).expect("reads");
            assert_same(&whole, &image, &format!("LSN {lsn} by {threads} threads"));
        }
        for _ in 0..50 {
            let offset = random.below(DISK_BYTES);
            let mut some = vec![7; random.below((DISK_BYTES - offset).min(3 * PART) + 1) as usize];
            view.read(offset, &mut some).expect("reads");
            assert_same(&some, &image[offset as usize..offset as usize + some.len()], "a piece");
        }
    }
}

/// Adds up what is read of data files.
#[derive(Default, Debug)]
struct Reads(Mutex<Vec<(PathBuf, u64)>>);

impl Hook for Reads {
    fn before(&self, call: &Call<'_>) -> Answer {
        if call.kind == CallKind::Read {
            self.0.lock().unwrap().push((call.path.to_owned(), call.bytes as u64));
        }
        Answer::Go
    }
}

#[test]
fn a_block_costs_a_part_and_a_table_not_a_frame() {
    let random = &mut Random::new(6);
    let (storage, store, mut model) = begun(random);
    let bytes = contents(512 << 10, true, random);
    append_one(&store, &mut model, bytes, random);
    drop(store);
    let reads = Arc::new(Reads::default());
    let hooked = HookStorage::new(Arc::new(storage), Arc::clone(&reads) as Arc<dyn Hook>);
    let store = try_open(Arc::new(hooked)).expect("opens");
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("the disk");
    let view = disk.view_in_gap(model.last()).expect("a point");
    let read = |offset: u64| {
        reads.0.lock().unwrap().clear();
        let mut block = vec![0; BLOCK as usize];
        view.read(offset, &mut block).expect("reads");
        assert_same(&block, &model.image(model.last())[offset as usize..][..block.len()], "a block");
        reads.0.lock().unwrap().iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>()
    };
    let table = 16 * 8;
    // The file's header, once; the table, once; a part.
    assert_eq!(read(3 * PART)[1..], [table, PART]);
    assert_eq!(read(7 * PART + BLOCK), [PART]);
    assert_eq!(read(7 * PART), [0_u64; 0], "it is kept");
    assert_eq!(read(5 * PART - BLOCK / 2), [PART, PART], "across a border");
}

#[test]
fn a_part_that_rots_costs_what_lies_in_it() {
    let random = &mut Random::new(7);
    let (storage, store, mut model) = begun(random);
    let bytes = contents(8 * PART, true, random);
    let needle = bytes[3 * PART as usize..][..64].to_vec();
    append_one(&store, &mut model, bytes, random);
    // Later history, so that the frame is known to have been durable.
    for _ in 0..2 {
        append(&store, &frame(&mut model, &[10], random)).expect("append");
        assert!(store.commit().is_empty());
    }
    let good = model.image(model.last());
    let files = storage.files();
    let (path, file) = files.iter().find(|(path, _)| is_data(path)).expect("a data file");
    let at = file.windows(64).position(|bytes| bytes == needle).expect("the part");
    let table = at + 5 * PART as usize;
    for (what, at, rotten) in
        [("the part", at + 9, 3 * PART..4 * PART), ("the table", table + 3, 0..8 * PART)]
    {
        let mut files = files.clone();
        files.get_mut(path).expect("the file")[at] ^= 1;
        let (_store, disk) = opened(&MemStorage::with_files(&files));
        let view = disk.view_in_gap(model.last()).expect("a point");
        for offset in (0..DISK_BYTES).step_by(BLOCK as usize) {
            let mut block = vec![0; BLOCK as usize];
            match view.read(offset, &mut block) {
                Ok(()) => {
                    assert!(!rotten.contains(&offset), "{what} rots unseen");
                    assert_same(&block, &good[offset as usize..][..block.len()], what);
                }
                Err(error) => {
                    assert_eq!(error.kind(), StoreErrorKind::Damaged, "{error}");
                    assert!(rotten.contains(&offset), "{what} rots, {offset} cannot be read");
                }
            }
        }
        assert_eq!(verify(&disk).len(), 1, "{what}");
    }
}

fn is_data(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("data-"))
}
