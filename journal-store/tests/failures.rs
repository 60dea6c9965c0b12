//! What fails, at every step: writes and durability steps that fail, bytes that rot, writers that race with readers.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use journal_format::Lsn;
use journal_store::io::{FailMode, FailStorage, MemStorage, RealStorage};
use journal_store::{Store, StoreError, StoreErrorKind};
use support::{
    DISK, DISK_BYTES, Made, Model, ROOT, Random, append, assert_same, check_point, config, open, read_all,
    try_open, verify,
};

/// A model's frames, small enough that a few commits seal.
fn frames(random: &mut Random, count: usize) -> (Model, Vec<Made>) {
    let mut model = Model::new(DISK);
    let mut frames = vec![model.begin_epoch(random)];
    frames.extend((1..count).map(|_| model.random_frame(random)));
    (model, frames)
}

/// Makes the disk and appends, commits and bookmarks; returns the last LSN that was reported durable.
fn drive(store: &Store, frames: &[Made]) -> Result<(), (Lsn, StoreError)> {
    let mut durable = Lsn::ZERO;
    store.open_or_create(DISK, DISK_BYTES).map_err(|error| (durable, error))?;
    for pair in frames.chunks(2) {
        for made in pair {
            append(store, made).map_err(|error| (durable, error))?;
        }
        let failures = store.commit();
        let disk = store.disk(DISK).expect("disk");
        // A commit that fails while it seals has made its frames durable before; what it shows is what counts.
        durable = disk.durable_lsn();
        if let Some((_, error)) = failures.into_iter().next() {
            return Err((durable, error));
        }
        match disk.add_bookmark(&format!("after {durable}"), durable) {
            Ok(_) | Err(StoreError::Point(_)) => {}
            Err(error) => return Err((durable, error)),
        }
    }
    Ok(())
}

#[test]
fn a_failure_at_any_step_loses_nothing_acknowledged_and_opening_again_goes_on() {
    let random = &mut Random::new(5);
    let (model, frames) = frames(random, 12);
    let calls = {
        let failing = FailStorage::new(Arc::new(MemStorage::new()));
        drive(&try_open(Arc::new(failing.clone())).expect("open"), &frames).expect("nothing fails");
        failing.calls()
    };
    assert!(calls > 60, "the run seals and replaces files: {calls} calls");
    for n in 1..=calls {
        for mode in [FailMode::Once, FailMode::FromThenOn] {
            fail_once(n, mode, &model, &frames, random);
        }
    }
}

fn fail_once(n: u64, mode: FailMode, model: &Model, frames: &[Made], random: &mut Random) {
    let what = format!("call {n} fails, {mode:?}");
    let memory = MemStorage::new();
    let failing = FailStorage::new(Arc::new(memory.clone()));
    failing.fail_at(n, mode);
    let driven = try_open(Arc::new(failing.clone())).map(|store| (drive(&store, frames), store));
    let (acknowledged, store) = match driven {
        Err(error) => {
            assert_eq!(error.kind(), StoreErrorKind::Io, "{what}: {error}");
            (Lsn::ZERO, None)
        }
        Ok((Ok(()), _)) => panic!("{what}, and nobody noticed"),
        Ok((Err((durable, error)), store)) => {
            assert_eq!(error.kind(), StoreErrorKind::Io, "{what}: {error}");
            if let Some(disk) = store.disk(DISK) {
                assert!(disk.is_poisoned(), "{what}: {error}");
                let refused = append(&store, frames.last().expect("frame")).expect_err("poisoned");
                assert_eq!(refused.kind(), StoreErrorKind::Poisoned, "{what}: {refused}");
                assert_eq!(disk.durable_lsn(), durable, "{what}");
            }
            (durable, Some(store))
        }
    };
    // The power fails right then: what was acknowledged is there.
    let crashed = open(&memory.crash(|n| random.below(n as u64) as usize));
    let left = crashed.disk(DISK).map_or(Lsn::ZERO, |disk| disk.durable_lsn());
    assert!(left >= acknowledged, "{what}: {left} is left of {acknowledged}");
    // Or the volume works again: the same process opens the disk again and takes what is sent again.
    failing.fail_at(0, FailMode::Once);
    let store = store.unwrap_or_else(|| try_open(Arc::new(failing)).expect("open again"));
    let disk = store.open_or_create(DISK, DISK_BYTES).unwrap_or_else(|error| panic!("{what}: {error}"));
    let from = disk.durable_lsn();
    assert!(from >= acknowledged, "{what}");
    frames
        .iter()
        .filter(|made| made.last > from)
        .for_each(|made| append(&store, made).expect("append again"));
    assert!(store.commit().is_empty(), "{what}");
    check_point(&disk, model, model.last(), random);
    assert_eq!(verify(&disk), [], "{what}");
}

/// A store of two sealed segments and an active one, closed.
fn some_store(random: &mut Random) -> (Model, MemStorage) {
    let (model, frames) = frames(random, 30);
    let storage = MemStorage::new();
    drive(&open(&storage), &frames).expect("nothing fails");
    (model, storage)
}

#[test]
fn a_flipped_byte_anywhere_is_noticed_or_harmless() {
    let random = &mut Random::new(7);
    let (model, storage) = some_store(random);
    let files = storage.files();
    let segments = files.keys().filter(|path| path.extension().is_some_and(|e| e == "idx")).count();
    assert!(segments >= 2, "only {segments} sealed segments");
    let whole = open(&storage).disk(DISK).expect("disk").durable_lsn();
    let lsns = [whole, Lsn(whole.0 / 2), Lsn(whole.0 / 5)];
    let images = lsns.map(|lsn| model.image(lsn));
    let (mut noticed, mut harmless) = (0, 0);
    for path in files.keys() {
        // The first bytes of a file matter most; of the rest, some.
        let length = files[path].len() as u64;
        let offsets = (0..12).map(|i| i * 7).chain((0..25).map(|_| random.below(length.max(1))));
        for offset in offsets.filter(|offset| *offset < length).collect::<Vec<_>>() {
            let what = format!("{} at {offset}", path.display());
            let mut damaged = files.clone();
            damaged.get_mut(path).expect("file")[offset as usize] ^= 1 << random.below(8);
            let told =
                [true, false].map(|writable| see_damage(&damaged, writable, whole, &lsns, &images, &what));
            // A writer makes a damaged index again; then nothing is damaged any more.
            let mended = path.extension().is_some_and(|extension| extension == "idx");
            assert!(told[0] || !told[1] || mended, "{what}: only the reader noticed");
            *(if told[1] { &mut noticed } else { &mut harmless }) += 1;
        }
    }
    assert!(noticed > 100, "{noticed} noticed, {harmless} harmless");
}

/// Opens the damaged files, reads, verifies. Whether anything was noticed; panics on wrong data.
fn see_damage(
    files: &std::collections::BTreeMap<PathBuf, Vec<u8>>,
    writable: bool,
    whole: Lsn,
    lsns: &[Lsn; 3],
    images: &[Vec<u8>; 3],
    what: &str,
) -> bool {
    let storage: Arc<MemStorage> = Arc::new(MemStorage::with_files(files));
    let store = match writable {
        true => Store::open_with(ROOT, storage.clone(), config()),
        false => Store::open_read_only_with(ROOT, storage.clone(), config()),
    }
    .expect("the store opens, whatever became of a disk");
    let unchanged = writable || storage.files() == *files;
    assert!(unchanged, "{what}: opened for reading, and changed");
    let Some(disk) = store.disk(DISK) else {
        assert_eq!(store.damaged().len(), 1, "{what}");
        return true;
    };
    let mut noticed = disk.durable_lsn() < whole || !disk.known_damage().is_empty();
    for (lsn, image) in lsns.iter().zip(images) {
        match disk.view_in_gap(*lsn).and_then(|view| read_all(&view)) {
            Ok(bytes) => assert_same(&bytes, image, what),
            Err(StoreError::Damaged { disk, .. }) => {
                assert_eq!(disk, DISK);
                noticed = true;
            }
            Err(StoreError::Point(_)) if noticed => {}
            Err(error) => panic!("{what}: {error}"),
        }
    }
    noticed | !verify(&disk).is_empty()
}

#[test]
fn a_damaged_frame_is_named_and_the_rest_stays_readable() {
    let random = &mut Random::new(11);
    let (model, storage) = some_store(random);
    let mut files = storage.files();
    let path = files.keys().find(|path| path.ends_with("data-000001.seg")).expect("data file").clone();
    let bytes = files.get_mut(&path).expect("data file");
    bytes[4096 + 64 + 1] ^= 0xff; // the first frame with data
    let store = Store::open_with(ROOT, Arc::new(MemStorage::with_files(&files)), config()).expect("open");
    let disk = store.disk(DISK).expect("disk");
    let damages = verify(&disk);
    assert_eq!(damages.len(), 1, "{damages:?}");
    assert_eq!((damages[0].disk, &damages[0].path), (DISK, &path));
    let inside = |lsn: Lsn| (damages[0].first_lsn..=damages[0].last_lsn).contains(&lsn);
    assert!((1..=model.last().0).map(Lsn).any(inside));
    let (mut good, mut bad) = (0, 0);
    for lsn in (1..=model.last().0).map(Lsn) {
        let view = disk.view_in_gap(lsn).expect("view");
        let image = model.image(lsn);
        for offset in (0..view.disk_bytes()).step_by(64 << 10) {
            let mut part = vec![0; (64 << 10).min(view.disk_bytes() - offset) as usize];
            match view.read(offset, &mut part) {
                Ok(()) => {
                    assert_same(&part, &image[offset as usize..][..part.len()], &format!("{lsn} {offset}"))
                }
                Err(StoreError::Damaged { first_lsn, last_lsn, .. }) => {
                    assert_eq!((first_lsn, last_lsn), (damages[0].first_lsn, damages[0].last_lsn));
                    bad += 1;
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
            good += 1;
        }
    }
    assert!(good > bad && bad > 0, "{good} parts are readable, {bad} are not");
}

#[test]
fn a_check_that_is_stopped_goes_on_where_it_was_and_finds_the_same() {
    let random = &mut Random::new(12);
    let (model, storage) = some_store(random);
    let mut files = storage.files();
    let path = files.keys().find(|path| path.ends_with("data-000002.seg")).expect("data file").clone();
    files.get_mut(&path).expect("data file")[4096 + 64 + 1] ^= 0xff;
    let store = Store::open_with(ROOT, Arc::new(MemStorage::with_files(&files)), config()).expect("open");
    let disk = store.disk(DISK).expect("disk");
    let whole = verify(&disk);
    assert_eq!(whole.len(), 1, "{whole:?}");
    let (mut parts, mut from, mut stops, mut bytes) = (Vec::new(), Lsn::FIRST, 0, 0);
    loop {
        let mut calls = 0;
        let part = disk.verify(from..=Lsn::MAX, &mut |progress| {
            assert!(progress.next_lsn >= from);
            calls += 1;
            if calls > 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(part.checked.map(|(first, _)| first), Some(from));
        parts.extend(part.damage);
        bytes += part.data_bytes;
        match part.resume_at {
            Some(next) => from = next,
            None => break assert_eq!(part.checked.map(|(_, last)| last), Some(model.last())),
        }
        stops += 1;
    }
    assert!(stops > 3, "{stops}");
    assert_eq!(parts, whole);
    assert_eq!(bytes, disk.verify(Lsn::FIRST..=Lsn::MAX, &mut |_| ControlFlow::Continue(())).data_bytes);
    let before = whole[0].first_lsn.prev();
    let nothing = disk.verify(Lsn::FIRST..=before, &mut |_| ControlFlow::Continue(()));
    assert_eq!((nothing.damage, nothing.checked), (vec![], Some((Lsn::FIRST, before))));
}

/// After a failed durability step Linux calls the pages clean, though they never reached the disk. Opening the journal
/// again reads them back from the cache; had it trusted them, the next step would have had nothing to write and
/// succeeded, and a power cut would have taken what was acknowledged.
#[test]
fn what_a_failed_durability_step_left_in_the_cache_is_written_again_before_it_counts() {
    let random = &mut Random::new(41);
    let mut kept = 0;
    for good in 0..40 {
        let (model, frames) = frames(random, 12);
        let storage = MemStorage::new();
        let store = try_open(Arc::new(storage.clone())).expect("open");
        store.open_or_create(DISK, DISK_BYTES).expect("makes the disk");
        storage.fail_sync_after(good);
        let Err((durable, _)) = drive(&store, &frames) else { continue };
        let disk = store.open_or_create(DISK, DISK_BYTES).expect("opens again");
        let promised = disk.durable_lsn();
        assert!(promised >= durable, "after {good}: what was acknowledged is there");
        kept += u32::from(promised > durable);
        let crashed = storage.crash(|_| 0);
        let disk = open(&crashed).disk(DISK).expect("the disk");
        assert!(disk.durable_lsn() >= promised, "after {good}: {} of {promised}", disk.durable_lsn());
        check_point(&disk, &model, promised, random);
    }
    assert!(kept > 5, "the cache had more than was durable: {kept}");
}

#[test]
fn readers_see_whole_versions_while_a_writer_appends_and_seals() {
    let random = &mut Random::new(13);
    let (model, frames) = frames(random, 60);
    let storage = MemStorage::new();
    let store = open(&storage);
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("create");
    let done = AtomicBool::new(false);
    let checked = std::thread::scope(|scope| {
        let readers = [1, 2].map(|seed| {
            let (disk, model, done) = (&disk, &model, &done);
            scope.spawn(move || {
                let (mut random, mut checked) = (Random::new(seed), 0);
                // ORDERING: pairs with nothing; the loop ends some time after the store below.
                while !done.load(Ordering::Relaxed) || checked == 0 {
                    let durable = disk.durable_lsn();
                    if durable > Lsn::ZERO {
                        check_point(disk, model, Lsn(1 + random.below(durable.0)), &mut random);
                        assert_eq!(disk.history().last.map(|(lsn, _)| lsn >= durable), Some(true));
                        checked += 1;
                    }
                }
                checked
            })
        });
        for made in &frames {
            append(&store, made).expect("append");
            assert!(store.commit().is_empty());
        }
        done.store(true, Ordering::Relaxed); // ORDERING: pairs with nothing, see the loop above
        readers.map(|reader| reader.join().expect("reader"))
    });
    assert!(checked.iter().all(|checked| *checked > 0));
    assert!(disk.stats().segments > 2);
}

#[test]
fn real_files_one_writer_and_readers_beside_it() {
    let dir = tempfile::tempdir().expect("folder");
    let random = &mut Random::new(17);
    let (model, frames) = frames(random, 20);
    let store = Store::open_with(dir.path(), Arc::new(RealStorage), config()).expect("open");
    let half = frames.len() / 2;
    drive(&store, &frames[..half]).expect("append");
    let locked = Store::open(dir.path()).expect_err("another writer");
    assert_eq!(locked.kind(), StoreErrorKind::Locked);
    let beside = Store::open_read_only(dir.path()).expect("a reader beside the writer");
    for made in &frames[half..] {
        append(&store, made).expect("append");
    }
    assert!(store.commit().is_empty());
    let seen = beside.disk(DISK).expect("disk");
    assert_eq!(seen.durable_lsn(), frames[half - 1].last, "a reader keeps what it saw when it opened");
    check_point(&seen, &model, frames[half - 1].last, random);
    assert_eq!(
        beside
            .append(&journal_format::Frame::parse(&frames[0].bytes).expect("frame"))
            .expect_err("reader")
            .kind(),
        StoreErrorKind::ReadOnly
    );
    drop(store);
    let store = Store::open(dir.path()).expect("the lock is gone with its holder");
    let disk = store.disk(DISK).expect("disk");
    assert_eq!(disk.durable_lsn(), model.last());
    check_point(&disk, &model, model.last(), random);
    assert_eq!(verify(&disk), []);
}

#[test]
fn a_frame_that_does_not_follow_is_refused_and_changes_nothing() {
    let random = &mut Random::new(19);
    let (_, frames) = frames(random, 3);
    let store = open(&MemStorage::new());
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("create");
    assert_eq!(append(&store, &frames[1]).expect_err("no epoch, no LSN 1").kind(), StoreErrorKind::Invalid);
    append(&store, &frames[0]).expect("the first");
    assert_eq!(append(&store, &frames[2]).expect_err("a hole").kind(), StoreErrorKind::Invalid);
    append(&store, &frames[1]).expect("the next");
    assert!(store.commit().is_empty() && !disk.is_poisoned());
    assert_eq!(disk.durable_lsn(), frames[1].last);
}
