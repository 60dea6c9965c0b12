//! Guests that remember: each writes to a region of its own of an exported disk, one request after another, and keeps a
//! ledger of what the region held after each, when it was sent and when it was answered. So for any instant it is
//! known, from the client's side alone, what the disk may have held: everything answered before it, nothing sent
//! after it.
//!
//! Times are nanoseconds since 1970 UTC of this machine's clock, which is the one that the host's clock follows.

use std::io::{Read, Write};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::load::{Load, Request};
use crate::qemu::failed;

/// What a region held from some moment on.
#[derive(Clone, Copy, Debug)]
struct Version {
    sent_ns: u64,
    /// `None`: never answered; whether it happened, or a part of it, is not known.
    answered_ns: Option<u64>,
    hash: blake3::Hash,
}

/// Everything that one region is known to have held.
#[derive(Debug)]
struct Ledger {
    versions: Vec<Version>,
    image: Vec<u8>,
    /// The newest version that a flush has covered that surely succeeded.
    flushed: usize,
    /// The version of the newest flush that was answered. `qemu-io` does not tell of a flush that fails because its server is
    /// gone; the next write does.
    flushing: usize,
    /// Ranges are zeroed instead of discarded.
    zeroes_only: bool,
}

impl Ledger {
    fn new(image: Vec<u8>) -> Self {
        let first = Version { sent_ns: 0, answered_ns: Some(0), hash: blake3::hash(&image) };
        Self { versions: vec![first], image, flushed: 0, flushing: 0, zeroes_only: false }
    }

    /// Whether the region may have held `contents` at that time; if not, why.
    fn check(&self, contents: &[u8], at_ns: u64) -> Result<(), String> {
        let before = |time: Option<u64>| time.is_some_and(|ns| ns <= at_ns);
        let oldest = self.versions.iter().rposition(|v| before(v.answered_ns)).unwrap_or(0);
        let newest = self.versions.iter().rposition(|v| v.sent_ns <= at_ns).unwrap_or(0);
        let hash = blake3::hash(contents);
        let may = self.versions.get(oldest..=newest).unwrap_or_default();
        if may.iter().any(|version| version.hash == hash) {
            return Ok(());
        }
        let found = self.versions.iter().rposition(|version| version.hash == hash);
        Err(match found {
            Some(found) => format!("holds version {found}, but must be one of {oldest} to {newest}"),
            None => format!("holds what it never held; must be one of {oldest} to {newest}"),
        })
    }
}

/// One writer.
#[derive(Debug)]
pub struct Writer {
    region: Range<u64>,
    ledger: Arc<Mutex<Ledger>>,
    load: Arc<Mutex<Load>>,
    stop: Arc<AtomicBool>,
    pause: Duration,
    thread: Option<JoinHandle<Result<(), String>>>,
}

/// Now, on this machine's clock.
///
/// # Panics
/// When it is before 1970.
#[must_use]
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

impl Writer {
    /// A guest for `region`, in bytes of the disk, which holds zeroes. Its data files go into `directory`.
    #[must_use]
    pub fn new(seed: u64, region: Range<u64>, directory: &Path) -> Self {
        let length = region.end - region.start;
        let load = Load::new(seed, length, 512, directory);
        let ledger = Ledger::new(vec![0; length as usize]);
        Self {
            region,
            ledger: Arc::new(Mutex::new(ledger)),
            load: Arc::new(Mutex::new(load)),
            stop: Arc::default(),
            pause: Duration::ZERO,
            thread: None,
        }
    }

    /// The same guest, resting that long after each request.
    #[must_use]
    pub fn resting(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// Begins, or goes on, to write to that export.
    ///
    /// # Panics
    /// When `qemu-io` cannot be started, or the guest runs already.
    pub fn start(&mut self, nbd_url: &str) {
        assert!(self.thread.is_none(), "the guest runs already");
        let mut command = Command::new("qemu-io");
        command.args(["-t", "writeback", "-f", "raw", nbd_url]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().expect("qemu-io starts");
        self.stop = Arc::default();
        let (stop, ledger, load) = (Arc::clone(&self.stop), Arc::clone(&self.ledger), Arc::clone(&self.load));
        let (start, pause) = (self.region.start, self.pause);
        self.thread =
            Some(thread::spawn(move || run(child, &stop, &mut locked(&load), &ledger, start, pause)));
    }

    /// From the next request on, zeroes ranges instead of discarding them, or discards them again. (While a job mirrors or commits
    /// a disk, QEMU drops its discards.)
    pub fn zeroes_only(&self, on: bool) {
        locked(&self.ledger).zeroes_only = on;
    }

    /// Requests answered so far.
    #[must_use]
    pub fn answered(&self) -> usize {
        locked(&self.ledger).versions.len()
    }

    /// How long the requests took that were sent in that time, in nanoseconds, in ascending order.
    #[must_use]
    pub fn latencies(&self, sent: Range<u64>) -> Vec<u64> {
        let ledger = locked(&self.ledger);
        let in_time = ledger.versions.iter().filter(|version| sent.contains(&version.sent_ns));
        let mut all: Vec<_> = in_time.filter_map(|v| v.answered_ns?.checked_sub(v.sent_ns)).collect();
        all.sort_unstable();
        all
    }

    /// Whether it goes on writing; it ends by itself only when a request fails.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Ends the writing.
    ///
    /// # Errors
    /// The first request that failed or was never answered.
    ///
    /// # Panics
    /// When the guest's own thread has panicked.
    pub fn stop(&mut self) -> Result<(), String> {
        // ORDERING: Relaxed; the flag stands alone.
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("the guest's thread"))
    }

    /// After QEMU has died: the region holds what the disk's file says, whatever became of the last request.
    ///
    /// # Panics
    /// When every request was answered and the disk holds anything else.
    pub fn settle(&mut self, disk: &[u8]) {
        let actual = self.region(disk);
        let mut ledger = locked(&self.ledger);
        ledger.image.copy_from_slice(actual);
        let now = now_ns();
        let version = Version { sent_ns: now, answered_ns: Some(now), hash: blake3::hash(actual) };
        let last = *ledger.versions.last().expect("never empty");
        if last.answered_ns.is_some() {
            assert!(last.hash == version.hash, "an answered write is not on the disk: the witness is broken");
        }
        ledger.versions.push(version);
    }

    /// Whether an image of the whole disk holds in this region all that the guest has flushed, and nothing that it never
    /// wrote.
    ///
    /// # Errors
    /// Why not.
    pub fn check_flushed(&self, disk: &[u8]) -> Result<(), String> {
        let ledger = locked(&self.ledger);
        let hash = blake3::hash(self.region(disk));
        let found = ledger.versions.iter().rposition(|version| version.hash == hash);
        if found.is_some_and(|found| found >= ledger.flushed) {
            return Ok(());
        }
        Err(format!("region {:?} holds version {found:?}, but {} was flushed", self.region, ledger.flushed))
    }

    /// The newest version that is flushed.
    #[must_use]
    pub fn flushed(&self) -> usize {
        locked(&self.ledger).flushed
    }

    /// The writer's region of an image of the whole disk.
    fn region<'a>(&self, disk: &'a [u8]) -> &'a [u8] {
        &disk[self.region.start as usize..self.region.end as usize]
    }

    /// Whether an image of the whole disk may be what the region held at that time.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, disk: &[u8], at_ns: u64) -> Result<(), String> {
        locked(&self.ledger)
            .check(self.region(disk), at_ns)
            .map_err(|why| format!("region {:?} {why}", self.region))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    mut child: Child,
    stop: &AtomicBool,
    load: &mut Load,
    ledger: &Mutex<Ledger>,
    start: u64,
    pause: Duration,
) -> Result<(), String> {
    let mut input = child.stdin.take().expect("piped");
    let mut output = child.stdout.take().expect("piped");
    let mut result = answer(&mut output);
    // ORDERING: Relaxed; the flag stands alone.
    while result.is_ok() && !stop.load(Ordering::Relaxed) {
        let (mut image, zeroes_only) = {
            let ledger = locked(ledger);
            (ledger.image.clone(), ledger.zeroes_only)
        };
        let request = match load.next_request() {
            Request::Discard { offset, length } if zeroes_only => {
                Request::Zero { offset, length, unmap: true }
            }
            request => request,
        };
        load.apply(&mut image, &request);
        let flushes = request.is_flush();
        let line = load.command(&request.moved(start));
        let version = Version { sent_ns: now_ns(), answered_ns: None, hash: blake3::hash(&image) };
        locked(ledger).versions.push(version);
        result = writeln!(input, "{line}").map_err(|e| e.to_string());
        result = result.and_then(|()| answer(&mut output)).map_err(|why| format!("{line}: {why}"));
        if result.is_ok() {
            let mut ledger = locked(ledger);
            ledger.image = image;
            ledger.versions.last_mut().expect("just pushed").answered_ns = Some(now_ns());
            if flushes {
                ledger.flushing = ledger.versions.len() - 1;
            } else {
                ledger.flushed = ledger.flushing;
            }
            drop(ledger);
            thread::sleep(pause);
        }
    }
    drop(input);
    // Killed, when QEMU is gone: an NBD client would wait for it.
    if result.is_err() {
        let _ = child.kill();
    }
    let _ = child.wait();
    result
}

/// Waits until `qemu-io` has done what it was told and asks for more. (It must not be told more before: a second line
/// that it reads together with the first stays in its buffer, unseen, until a third one comes.)
fn answer(output: &mut impl Read) -> Result<(), String> {
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"qemu-io> ") {
        match output.read(&mut byte) {
            Ok(1) => said.push(byte[0]),
            Ok(_) => return Err("qemu-io has ended".to_owned()),
            Err(error) => return Err(error.to_string()),
        }
    }
    let said = String::from_utf8_lossy(&said).into_owned();
    if failed(&said) { Err(said) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_knows_what_may_be_there_at_which_time() {
        let mut ledger = Ledger::new(vec![0]);
        for (byte, sent_ns, answered_ns) in [(1, 10, Some(20)), (2, 30, Some(40)), (3, 50, None)] {
            ledger.versions.push(Version { sent_ns, answered_ns, hash: blake3::hash(&[byte]) });
        }
        let fits = |byte: u8, at| ledger.check(&[byte], at).is_ok();
        assert!(fits(0, 5) && !fits(1, 5), "not yet sent");
        assert!(fits(0, 15) && fits(1, 15), "under way: before or after");
        assert!(!fits(0, 20) && fits(1, 25) && !fits(2, 25), "answered");
        assert!(fits(2, 60) && fits(3, 60) && !fits(1, 60), "the last one is never answered");
        assert!(!fits(9, 60), "was never there");
    }
}
