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
            job.work();
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
    results: Vec<Result<(), StoreError>>,
    /// Files that are waiting or being done.
    left: usize,
}

impl Job {
    fn new(files: Vec<Named>) -> Self {
        let nobody_came = |(_, path): &Named| Err(failed("nobody tried", path));
        let (left, results) = (files.len(), files.iter().map(nobody_came).collect());
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
            // A panic is that file's failure and nobody else's.
            let synced = catch_unwind(AssertUnwindSafe(|| file.sync()));
            let result = match synced {
                Ok(synced) => synced.map_err(StoreError::io("sync", &path)),
                Err(_) => Err(failed("it panicked", &path)),
            };
            // Whoever waits for it finds it closed.
            drop(file);
            let mut state = self.lock();
            if let Some(place) = state.results.get_mut(number) {
                *place = result;
            }
            state.left -= 1;
            if state.left == 0 {
                self.ended.notify_all();
            }
        }
    }

    /// Waits for the files that others have taken.
    fn wait(&self) -> Vec<Result<(), StoreError>> {
        let state = self.ended.wait_while(self.lock(), |state| state.left > 0);
        std::mem::take(&mut state.unwrap_or_else(PoisonError::into_inner).results)
    }
}

fn failed(why: &str, path: &Path) -> StoreError {
    StoreError::io("sync", path)(io::Error::other(why.to_owned()))
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
    /// until so many have been begun.
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

    fn failing(results: &[Result<(), StoreError>]) -> Vec<usize> {
        (0..results.len()).filter(|number| results[*number].is_err()).collect()
    }

    #[test]
    fn each_file_is_made_durable_once_and_has_its_own_result() {
        for (count, most) in [(0, 16), (1, 16), (2, 1), (2, 16), (7, 3), (64, 16), (200, 16)] {
            let (syncing, syncs) = (Syncing::new(most), Arc::new(Syncs::default()));
            for round in 1..20 {
                let results = syncing.sync(files(count, &syncs));
                assert_eq!(failing(&results), if count > 2 { vec![2] } else { vec![] });
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
            assert_eq!(failing(&syncing.sync(files(2, &syncs))), []);
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
    fn a_panic_fails_its_own_file_only_whoever_had_it() {
        for (most, together) in [(1, 0), (2, 2)] {
            let panicking = Arc::new(Syncs { panics: true, together, ..Syncs::default() });
            let calm = Arc::new(Syncs { together, ..Syncs::default() });
            let syncing = Syncing::new(most);
            for _ in 0..20 {
                assert_eq!(failing(&syncing.sync(files(5, &panicking))), [2, 4]);
            }
            assert_eq!(failing(&syncing.sync(files(2, &calm))), []);
            assert_eq!(calm.state.lock().unwrap().threads.len(), most, "nobody is missing");
        }
    }

    #[test]
    fn nobody_keeps_a_file_that_was_made_durable() {
        let (syncing, syncs) = (Syncing::new(16), Arc::new(Syncs::default()));
        for _ in 0..500 {
            let files = files(8, &syncs);
            let kept: Vec<Weak<dyn File>> = files.iter().map(|(file, _)| Arc::downgrade(file)).collect();
            let _results = syncing.sync(files);
            assert!(kept.iter().all(|file| file.strong_count() == 0));
        }
    }
}
