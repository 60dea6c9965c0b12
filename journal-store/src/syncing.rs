//! Makes the files of a commit durable, all at the same time.
//!
//! The threads for it stay: one that is started for a commit comes late where the processor is busy, and whoever waited for it
//! waited longer than for the disk.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use crate::error::StoreError;
use crate::io::File;
use crate::limits::FILES_PER_SYNC_THREAD;

/// A file, and what it is called in an error.
pub(crate) type Named = (Arc<dyn File>, PathBuf);

/// Threads that make files durable. They begin when they are first needed and end with this.
#[derive(Debug)]
pub(crate) struct Syncing {
    /// Files that are made durable at the same time, at most.
    most: usize,
    shared: Arc<Shared>,
}

#[derive(Default, Debug)]
struct Shared {
    helpers: Mutex<Helpers>,
    called: Condvar,
}

#[derive(Default, Debug)]
struct Helpers {
    /// How many there are, besides whoever calls them.
    count: usize,
    /// A job once for each helper that is to look at it.
    jobs: VecDeque<Arc<Job>>,
    is_over: bool,
}

impl Syncing {
    /// Nothing runs yet. With `most` of 1 nothing ever will: whoever calls does it all, in order.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, shared: Arc::default() }
    }

    /// Makes files durable; the results are in their order.
    pub(crate) fn sync(&self, files: Vec<Named>) -> Vec<Result<(), StoreError>> {
        let count = files.len();
        let wanted = count.div_ceil(FILES_PER_SYNC_THREAD).max(2).min(count).min(self.most).saturating_sub(1);
        let job = Arc::new(Job::new(files));
        self.call(wanted, &job);
        job.work();
        let results = job.wait();
        // Who has not come yet finds nothing to do.
        self.shared.lock().jobs.retain(|other| !Arc::ptr_eq(other, &job));
        results
    }

    /// Has so many helpers look at a job. With fewer it only takes longer.
    fn call(&self, wanted: usize, job: &Arc<Job>) {
        let mut helpers = self.shared.lock();
        while helpers.count < wanted {
            let shared = Arc::clone(&self.shared);
            if Builder::new().name("cdp-sync".to_owned()).spawn(move || shared.help()).is_err() {
                break;
            }
            helpers.count += 1;
        }
        for _ in 0..wanted.min(helpers.count) {
            helpers.jobs.push_back(Arc::clone(job));
            self.shared.called.notify_one();
        }
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.called.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Helpers> {
        // Nothing can panic while it is held.
        self.helpers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn help(&self) {
        loop {
            let idle = |helpers: &mut Helpers| helpers.jobs.is_empty() && !helpers.is_over;
            let waited = self.called.wait_while(self.lock(), idle);
            let Some(job) = waited.unwrap_or_else(PoisonError::into_inner).jobs.pop_front() else { return };
            // The file at which it panicked has no result; the others are left to whoever comes.
            let _panicked = catch_unwind(AssertUnwindSafe(|| job.work()));
        }
    }
}

/// The files of one commit.
#[derive(Debug)]
struct Job {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    /// Which nobody has taken, by their numbers.
    waiting: VecDeque<(usize, Named)>,
    /// `None` until a file is done, and for ever where doing it panicked.
    results: Vec<Option<Result<(), StoreError>>>,
    /// Files that are waiting or being done.
    left: usize,
}

impl Job {
    fn new(files: Vec<Named>) -> Self {
        let (left, results) = (files.len(), files.iter().map(|_| None).collect());
        let state = State { waiting: files.into_iter().enumerate().collect(), results, left };
        Self { state: Mutex::new(state), ended: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing can panic while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes files durable until none waits.
    fn work(&self) {
        loop {
            let Some((number, (file, path))) = self.lock().waiting.pop_front() else { return };
            let mut doing = Doing { job: self, number, result: None };
            doing.result = Some(file.sync().map_err(StoreError::io("sync", &path)));
        }
    }

    /// Waits for the files that others have taken.
    fn wait(&self) -> Vec<Result<(), StoreError>> {
        let state = self.ended.wait_while(self.lock(), |state| state.left > 0);
        let results = std::mem::take(&mut state.unwrap_or_else(PoisonError::into_inner).results);
        let panicked =
            || Err(StoreError::io("sync", Path::new("a segment"))(io::Error::other("the thread panicked")));
        results.into_iter().map(|result| result.unwrap_or_else(panicked)).collect()
    }
}

/// A file that is being made durable, and what came of it, also if that was a panic.
struct Doing<'a> {
    job: &'a Job,
    number: usize,
    result: Option<Result<(), StoreError>>,
}

impl Drop for Doing<'_> {
    fn drop(&mut self) {
        let mut state = self.job.lock();
        if let Some(place) = state.results.get_mut(self.number) {
            *place = self.result.take();
        }
        state.left -= 1;
        let is_last = state.left == 0;
        drop(state);
        if is_last {
            self.job.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::sync::Weak;
    use std::thread::{self, ThreadId};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, Storage};

    /// Counts how often each file is made durable and by whom; the third fails, the fifth panics if that is wanted. Each waits
    /// until so many are being made durable at once.
    #[derive(Default, Debug)]
    struct Syncs {
        state: Mutex<Seen>,
        came: Condvar,
        panics: bool,
        together: usize,
    }

    #[derive(Default, Debug)]
    struct Seen {
        files: BTreeMap<PathBuf, usize>,
        threads: HashSet<ThreadId>,
        inside: usize,
    }

    impl Hook for Syncs {
        fn before(&self, call: &Call<'_>) -> Answer {
            if call.kind != CallKind::Sync {
                return Answer::Go;
            }
            let mut seen = self.state.lock().unwrap();
            *seen.files.entry(call.path.to_owned()).or_default() += 1;
            seen.threads.insert(thread::current().id());
            seen.inside += 1;
            self.came.notify_all();
            let limit = Duration::from_secs(60);
            let (seen, late) =
                self.came.wait_timeout_while(seen, limit, |seen| seen.inside < self.together).unwrap();
            assert!(!late.timed_out(), "never so many at once");
            drop(seen);
            assert!(!self.panics || call.path != Path::new("/folder/4"), "planted");
            if call.path == Path::new("/folder/2") {
                Answer::Fail(io::Error::other("planted"))
            } else {
                Answer::Go
            }
        }
    }

    fn files(count: usize, syncs: &Arc<Syncs>) -> Vec<Named> {
        let hook = Arc::clone(syncs) as Arc<dyn Hook>;
        let storage = HookStorage::new(Arc::new(MemStorage::new()), hook);
        storage.create_dir(Path::new("/folder")).unwrap();
        let paths = (0..count).map(|number| PathBuf::from(format!("/folder/{number}")));
        paths.map(|path| (storage.create(&path).unwrap(), path)).collect()
    }

    fn failed(results: &[Result<(), StoreError>]) -> Vec<usize> {
        (0..results.len()).filter(|number| results[*number].is_err()).collect()
    }

    #[test]
    fn each_file_is_made_durable_once_and_has_its_own_result() {
        for (count, most) in [(0, 16), (1, 16), (2, 1), (2, 16), (7, 3), (64, 16), (200, 16)] {
            let (syncing, syncs) = (Syncing::new(most), Arc::new(Syncs::default()));
            for round in 1..20 {
                let results = syncing.sync(files(count, &syncs));
                assert_eq!(failed(&results), if count > 2 { vec![2] } else { vec![] });
                let seen = syncs.state.lock().unwrap();
                assert_eq!(seen.files.len(), count);
                assert!(seen.files.values().all(|times| *times == round));
            }
            let threads = syncs.state.lock().unwrap().threads.len();
            assert!(threads <= most, "{threads} threads for {count} files");
        }
    }

    #[test]
    fn two_files_are_made_durable_at_the_same_time_by_threads_that_stay() {
        let (syncing, syncs) = (Syncing::new(16), Arc::new(Syncs { together: 2, ..Syncs::default() }));
        for _ in 0..20 {
            syncs.state.lock().unwrap().inside = 0;
            assert_eq!(failed(&syncing.sync(files(2, &syncs))), []);
        }
        assert_eq!(syncs.state.lock().unwrap().threads.len(), 2, "this one and a helper");
        let shared: Weak<Shared> = Arc::downgrade(&syncing.shared);
        drop(syncing);
        let began = Instant::now();
        while shared.strong_count() > 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "the helper ends with it");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_panic_fails_its_own_file_only_and_its_thread_stays() {
        let panicking = Arc::new(Syncs { panics: true, together: 2, ..Syncs::default() });
        let calm = Arc::new(Syncs { together: 2, ..Syncs::default() });
        let syncing = Syncing::new(2);
        // It may be this thread that takes that file.
        if let Ok(results) = catch_unwind(AssertUnwindSafe(|| syncing.sync(files(5, &panicking)))) {
            assert_eq!(failed(&results), [2, 4]);
        }
        assert_eq!(failed(&syncing.sync(files(2, &calm))), []);
        assert_eq!(syncing.shared.lock().count, 1);
    }
}
