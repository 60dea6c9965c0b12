//! A program that runs beside the test and never survives it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait_for;

/// A command that runs in a session of its own, as a service does, and is killed when the calling thread ends.
///
/// The kernel shares a core out among sessions first, and within each among its threads. A program that is measured, or
/// measured beside, must not have its share with those that it serves: with all in one session, what the kernel does at the end
/// of a write to the disk waited up to 250 ms for its turn on a core that agent and server filled.
#[must_use]
pub fn service(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setsid");
    command.args(["setpriv", "--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A running program with its output in files. Dropping it kills it; while a test panics, its log is printed first.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command`; output goes to `NAME.out` and `NAME.log` in `directory`, appending to what a former process of
    /// that name left.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(directory: &Path, name: &str, command: &mut Command) -> Self {
        let stdout = directory.join(format!("{name}.out"));
        let stderr = directory.join(format!("{name}.log"));
        let append = |path: &Path| File::options().create(true).append(true).open(path).expect("log file");
        // Only the newest process's output counts for `stdout`.
        File::create(&stdout).expect("output file");
        command.stdin(Stdio::null()).stdout(append(&stdout)).stderr(append(&stderr));
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot start {name} ({command:?}): {e}"));
        Self { name: name.to_owned(), child, stdout, stderr }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the program's ready line and returns the value of `key=` in it.
    ///
    /// # Panics
    /// When the program ends first, or says no such thing.
    #[must_use]
    pub fn ready(&mut self, key: &str) -> String {
        let line = wait_for(&format!("{}: ready", self.name), || {
            if let Some(status) = self.child.try_wait().expect("wait") {
                panic!("{} ended before it was ready: {status}\n{}", self.name, self.log());
            }
            self.stdout().lines().find(|line| line.starts_with("ready")).map(str::to_owned)
        });
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{}: no {key}= in {line:?}", self.name)).to_owned()
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stdout).unwrap_or_default()).into_owned()
    }

    /// Standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// Asserts that it still runs.
    ///
    /// # Panics
    /// When it has ended.
    pub fn assert_alive(&mut self) {
        let status = self.child.try_wait().expect("wait");
        assert!(status.is_none(), "{} has ended: {status:?}\n{}", self.name, self.log());
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed());
        kill(pid, signal).unwrap_or_else(|e| panic!("cannot signal {}: {e}", self.name));
    }

    /// Asks it to stop and waits until it has.
    ///
    /// # Panics
    /// When it ends with anything but success or that very signal.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        let good = status.success() || status.signal() == Some(Signal::SIGTERM as i32);
        assert!(good, "{} did not end cleanly: {status}\n{}", self.name, self.log());
    }

    /// Waits until it has ended by itself.
    ///
    /// # Panics
    /// When it ends with anything but success.
    pub fn ended(&mut self) {
        let status = self.wait();
        assert!(status.success(), "{} failed: {status}\n{}", self.name, self.log());
    }

    /// Stops it in its tracks until [`Process::thaw`]: it is there, and does nothing.
    ///
    /// # Panics
    /// When it is gone.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// When it is gone.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Kills it without warning and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn wait(&mut self) -> ExitStatus {
        wait_for(&format!("{}: the end", self.name), || self.child.try_wait().expect("wait"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            eprintln!("---- {} (last lines of its log)", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_its_own_session_and_ends_with_the_thread_that_started_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let started = || {
            let mut command = service("sh");
            command.args(["-c", "echo ready pid=$$; exec sleep 1000"]);
            let mut process = Process::start(directory.path(), "sh", &mut command);
            assert_eq!(process.ready("pid"), process.pid().to_string(), "nobody comes between");
            let pid = Pid::from_raw(process.pid().cast_signed());
            assert_eq!(nix::unistd::getsid(Some(pid)), Ok(pid));
            process
        };
        let mut process = std::thread::scope(|scope| scope.spawn(started).join()).expect("it starts");
        assert_eq!(process.wait().signal(), Some(Signal::SIGKILL as i32));
    }
}
