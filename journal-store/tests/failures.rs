//! What fails, at every step: writes and durability steps that fail, bytes that rot, writers that race with readers.
#![allow(missing_docs, reason = "test code")]

mod support;

use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use journal_format::Lsn;
use journal_store::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, RealStorage, Tearing};
use journal_store::{Store, StoreError, StoreErrorKind};
use support::{
    DISK, DISK_BYTES, FailAt, Failing, Made, Model, ROOT, Random, append, assert_same, check_point, config,
    open, try_open, try_open_behind, verify,
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

/// Calls that the run makes, of those that change something or of all.
fn calls_of(frames: &[Made], reads_too: bool) -> u64 {
    let memory = MemStorage::new();
    let hook = FailAt::new(&memory, reads_too);
    let storage = HookStorage::new(Arc::new(memory), hook.clone());
    drive(&try_open(Arc::new(storage)).expect("open"), frames).expect("nothing fails");
    hook.calls()
}

#[test]
fn a_failure_at_any_step_loses_nothing_acknowledged_and_opening_again_goes_on() {
    let random = &mut Random::new(5);
    let (model, frames) = frames(random, 12);
    let calls = calls_of(&frames, false);
    assert!(calls > 60, "the run seals and replaces files: {calls} calls");
    for n in 1..=calls {
        // A failing medium, and a full volume.
        for (failing, kind) in
            [(Failing::Once, ErrorKind::Other), (Failing::FromThenOn, ErrorKind::StorageFull)]
        {
            for behind in [0, 2] {
                fail(n, (failing, kind, false), behind, &model, &frames, random);
            }
        }
    }
}

#[test]
fn a_read_that_fails_at_any_step_is_an_error_and_nothing_else() {
    let random = &mut Random::new(6);
    let (model, frames) = frames(random, 12);
    for n in 1..=calls_of(&frames, true) {
        fail(n, (Failing::Once, ErrorKind::Other, true), 0, &model, &frames, random);
    }
}

fn fail(
    n: u64,
    (failing, kind, reads_too): (Failing, ErrorKind, bool),
    behind: usize,
    model: &Model,
    frames: &[Made],
    random: &mut Random,
) {
    let what = format!("call {n} fails, {failing:?}, {kind:?}, {behind} pieces under way");
    let memory = MemStorage::new();
    let hook = FailAt::new(&memory, reads_too);
    let failing_storage = HookStorage::new(Arc::new(memory.clone()), hook.clone());
    hook.fail_at(n, failing, kind);
    let opened = try_open_behind(Arc::new(failing_storage.clone()), behind);
    let driven = opened.map(|store| (drive(&store, frames), store));
    let (acknowledged, store) = match driven {
        Err(error) => {
            assert_eq!(error.kind(), StoreErrorKind::Io, "{what}: {error}");
            (Lsn::ZERO, None)
        }
        // A nearest point that cannot be read is only not offered.
        Ok((Ok(()), store)) if reads_too => (frames.last().map_or(Lsn::ZERO, |made| made.last), Some(store)),
        Ok((Ok(()), _)) => panic!("{what}, and nobody noticed"),
        Ok((Err((durable, error)), store)) => {
            assert_eq!(error.kind(), StoreErrorKind::Io, "{what}: {error}");
            if let Some(disk) = store.disk(DISK).filter(|disk| !reads_too || disk.is_poisoned()) {
                assert!(disk.is_poisoned(), "{what}: {error}");
                let refused = append(&store, frames.last().expect("frame")).expect_err("poisoned");
                assert_eq!(refused.kind(), StoreErrorKind::Poisoned, "{what}: {refused}");
                assert_eq!(disk.durable_lsn(), durable, "{what}");
            }
            (durable, Some(store))
        }
    };
    // The power fails right then: what was acknowledged is there.
    let crashed = open(&memory.crash(Tearing::Torn, |n| random.below(n as u64) as usize));
    let left = crashed.disk(DISK).map_or(Lsn::ZERO, |disk| disk.durable_lsn());
    assert!(left >= acknowledged, "{what}: {left} is left of {acknowledged}");
    // Or the volume works again: the same process opens the disk again and takes what is sent again.
    hook.fail_at(0, Failing::Once, kind);
    let store = store.unwrap_or_else(|| try_open(Arc::new(failing_storage)).expect("open again"));
    let disk = store.open_or_create(DISK, DISK_BYTES).unwrap_or_else(|error| panic!("{what}: {error}"));
    let from = disk.durable_lsn();
    assert!(from >= acknowledged, "{what}");
    // What it tells now is durable now, also what only the page cache had after a durability step had failed.
    let crashed = open(&memory.crash(Tearing::Whole, |_| 0)).disk(DISK).expect("disk");
    assert!(crashed.durable_lsn() >= from, "{what}: {} is left of {from}", crashed.durable_lsn());
    assert_eq!(crashed.known_damage(), [], "{what}");
    frames
        .iter()
        .filter(|made| made.last > from)
        .for_each(|made| append(&store, made).expect("append again"));
    assert!(store.commit().is_empty(), "{what}");
    check_point(&disk, model, model.last(), random);
    assert_eq!(verify(&disk), [], "{what}");
}

/// What becomes of a piece that was held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Then {
    GoesOn,
    Fails,
    /// It goes on, but while it is held heads cannot be written.
    HeadsFail,
}

/// Holds the first large piece that is written to a data file, until it is told to go on.
#[derive(Debug)]
struct Held {
    then: Then,
    /// Sends when it holds one.
    holds: Mutex<Option<Sender<()>>>,
    go_on: Mutex<Receiver<()>>,
    is_held: AtomicBool,
}

impl Hook for Held {
    fn before(&self, call: &Call<'_>) -> Answer {
        let is_write = call.kind == CallKind::Write;
        let is_piece = is_write && call.bytes == config().piece_bytes;
        let is_head = is_write && call.path.to_string_lossy().contains("meta-");
        let first = if is_piece { self.holds.lock().expect("lock").take() } else { None };
        let is_first = first.is_some();
        if let Some(holds) = first {
            self.is_held.store(true, Ordering::Release);
            holds.send(()).expect("the test waits");
            self.go_on.lock().expect("lock").recv().expect("the test says so");
            self.is_held.store(false, Ordering::Release);
        }
        let fails = match self.then {
            Then::GoesOn => false,
            Then::Fails => is_first,
            Then::HeadsFail => is_head && self.is_held.load(Ordering::Acquire),
        };
        if fails { Answer::Fail(ErrorKind::StorageFull.into()) } else { Answer::Go }
    }
}

/// A store of which a piece is on its way to the disk and stays there until told; what was appended, half of the frames, is not
/// durable.
fn holding(then: Then) -> (MemStorage, Store, Vec<Made>, Sender<()>) {
    let memory = MemStorage::new();
    let ((holds, held), (go_on, told)) = (channel(), channel());
    let (holds, go_on_told) = (Mutex::new(Some(holds)), Mutex::new(told));
    let hook = Held { then, holds, go_on: go_on_told, is_held: AtomicBool::new(false) };
    let storage = HookStorage::new(Arc::new(memory.clone()), Arc::new(hook));
    // So many that nobody who appends waits.
    let store = try_open_behind(Arc::new(storage), 1000).expect("open");
    store.open_or_create(DISK, DISK_BYTES).expect("disk");
    let (_, frames) = frames(&mut Random::new(21), 2 * HELD_FRAMES);
    let mut is_held = false;
    // All of it was appended while the piece was on its way: nobody waits for it.
    for made in &frames[..HELD_FRAMES] {
        let appended = append(&store, made);
        assert!(appended.is_ok() || then == Then::HeadsFail, "{appended:?}");
        is_held = is_held || held.recv_timeout(SHORT).is_ok();
    }
    assert!(is_held, "a step of these frames has large pieces");
    (memory, store, frames, go_on)
}

const HELD_FRAMES: usize = 20;
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);

/// Does it in a thread, and sends when it is done.
fn in_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, is_done) = channel();
    std::thread::spawn(move || done.send(work()));
    is_done
}

#[test]
fn a_commit_waits_for_the_pieces_that_are_under_way() {
    let (memory, store, frames, go_on) = holding(Then::GoesOn);
    let store = Arc::new(store);
    let committing = Arc::clone(&store);
    let done = in_thread(move || committing.commit());
    let early = done.recv_timeout(SHORT).is_ok();
    go_on.send(()).expect("it waits");
    assert!(!early, "a piece is under way");
    assert!(done.recv_timeout(LONG).expect("it goes on").is_empty());
    let last = frames[HELD_FRAMES - 1].last;
    let crashed = open(&memory.crash(Tearing::Whole, |_| 0)).disk(DISK).expect("disk");
    assert_eq!(crashed.durable_lsn(), last, "what was committed is durable");
    assert_eq!(verify(&crashed), []);
}

#[test]
fn a_piece_that_failed_on_its_way_fails_the_commit_and_the_disk_is_opened_again() {
    let (memory, store, frames, go_on) = holding(Then::Fails);
    go_on.send(()).expect("it waits");
    assert_eq!(store.commit().len(), 1, "nothing is acknowledged");
    assert!(store.commit().is_empty(), "that is said once");
    let disk = store.disk(DISK).expect("disk");
    assert_eq!((disk.is_poisoned(), disk.durable_lsn()), (true, Lsn::ZERO));
    let disk = store.open_or_create(DISK, DISK_BYTES).expect("open again");
    let from = disk.durable_lsn();
    frames.iter().filter(|made| made.last > from).for_each(|made| append(&store, made).expect("append"));
    assert!(store.commit().is_empty());
    assert_eq!(verify(&disk), []);
    assert_eq!(
        open(&memory.crash(Tearing::Whole, |_| 0)).disk(DISK).expect("disk").durable_lsn(),
        frames.last().expect("frames").last
    );
}

#[test]
fn a_piece_that_failed_on_its_way_fails_an_append() {
    let (_, store, frames, go_on) = holding(Then::Fails);
    go_on.send(()).expect("it waits");
    std::thread::sleep(SHORT);
    let failed = frames[HELD_FRAMES..].iter().find_map(|made| append(&store, made).err());
    assert_eq!(failed.map(|error| error.kind()), Some(StoreErrorKind::Io));
    assert!(store.disk(DISK).expect("disk").is_poisoned());
}

#[test]
fn whoever_keeps_a_disk_of_a_closed_store_can_read_it_and_changes_nothing() {
    let (model, storage) = some_store(&mut Random::new(31));
    let store = open(&storage);
    let disk = store.disk(DISK).expect("disk");
    let newest = disk.newest().expect("a point").lsn;
    drop(store);
    let refused = disk.add_bookmark("late", newest).expect_err("another may have the store");
    assert_eq!(refused.kind(), StoreErrorKind::Poisoned);
    check_point(&disk, &model, newest, &mut Random::new(32));
}

#[test]
fn nobody_opens_a_disk_or_its_store_while_a_piece_is_under_way() {
    // The disk, because something else has failed meanwhile: heads, which are not held up.
    let (_, store, frames, go_on) = holding(Then::HeadsFail);
    // As a view does, somebody keeps the disk.
    let kept = store.disk(DISK).expect("disk");
    assert!(kept.is_poisoned());
    let store = Arc::new(store);
    let opening = Arc::clone(&store);
    let opened = in_thread(move || opening.open_or_create(DISK, DISK_BYTES).map(|disk| disk.durable_lsn()));
    let early = opened.recv_timeout(SHORT).is_ok();
    go_on.send(()).expect("it waits");
    assert!(!early, "a piece is under way");
    let from = opened.recv_timeout(LONG).expect("it goes on").expect("open again");
    frames.iter().filter(|made| made.last > from).for_each(|made| append(&store, made).expect("append"));
    assert!(store.commit().is_empty());
    assert_eq!(verify(&store.disk(DISK).expect("disk")), []);
    drop(kept);

    // The store, by another: it is locked until nothing is under way.
    let (memory, store, frames, go_on) = holding(Then::GoesOn);
    let (kept, last) = (store.disk(DISK).expect("disk"), frames.last().expect("frames").last);
    let dropped = in_thread(move || drop(store));
    let early = dropped.recv_timeout(SHORT).is_ok();
    let opened = try_open(Arc::new(memory.clone()));
    go_on.send(()).expect("it waits");
    assert!(!early, "a piece is under way");
    let refused = opened.expect_err("whoever opened it now would have its files written under it");
    assert!(matches!(refused, StoreError::Locked { .. }), "{refused}");
    dropped.recv_timeout(LONG).expect("it goes on");
    drop(kept);
    let store = open(&memory);
    let disk = store.disk(DISK).expect("disk");
    let from = disk.durable_lsn();
    assert!(from <= last);
    frames.iter().filter(|made| made.last > from).for_each(|made| append(&store, made).expect("append"));
    assert!(store.commit().is_empty());
    assert_eq!(verify(&disk), []);
}

/// A store of two sealed segments and an active one, closed.
fn some_store(random: &mut Random) -> (Model, MemStorage) {
    let (model, frames) = frames(random, 30);
    let storage = MemStorage::new();
    drive(&open(&storage), &frames).expect("nothing fails");
    (model, storage)
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

/// Lets one durability step of a file fail, and everything else succeed.
#[derive(Debug)]
struct SyncFails {
    memory: MemStorage,
    /// Steps that still succeed before it.
    good: Mutex<Option<u64>>,
}

impl Hook for SyncFails {
    fn before(&self, call: &Call<'_>) -> Answer {
        let mut good = self.good.lock().expect("lock");
        let (CallKind::Sync, Some(left)) = (call.kind, *good) else { return Answer::Go };
        *good = left.checked_sub(1);
        if good.is_some() {
            return Answer::Go;
        }
        self.memory.forget(call.path);
        Answer::Fail(ErrorKind::Other.into())
    }
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
        let memory = MemStorage::new();
        let hook = Arc::new(SyncFails { memory: memory.clone(), good: Mutex::new(None) });
        let storage = HookStorage::new(Arc::new(memory.clone()), hook.clone());
        let store = try_open(Arc::new(storage)).expect("open");
        store.open_or_create(DISK, DISK_BYTES).expect("makes the disk");
        *hook.good.lock().expect("lock") = Some(good);
        let Err((durable, _)) = drive(&store, &frames) else { continue };
        let disk = store.open_or_create(DISK, DISK_BYTES).expect("opens again");
        let promised = disk.durable_lsn();
        assert!(promised >= durable, "after {good}: what was acknowledged is there");
        kept += u32::from(promised > durable);
        let crashed = memory.crash(Tearing::Whole, |_| 0);
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
