//! How `cdp-restore` ends when something other than the journal fails: its own output, the target, limits, signals.

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cdp_server::{Config, Server};
use common::{DISK, DISK_BYTES, Journal, example, json, stderr, stdout};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Only bounds a hanging test.
const PATIENCE: Duration = Duration::from_secs(60);

fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin("cdp-restore")
}

/// A restore of the newest point to `target`, not started yet.
fn command(journal: &Journal, target: &Path) -> Command {
    journal.commit();
    let mut command = Command::new(program());
    command.arg("--store").arg(journal.path("store")).args(["--disk", &DISK.to_string(), "--at", "latest"]);
    command.arg("--output").arg(target).env_remove("CDP_SERVER");
    command
}

fn full_device() -> File {
    File::options().write(true).open("/dev/full").expect("/dev/full")
}

/// A pipe that nobody reads any more.
fn closed_pipe() -> std::io::PipeWriter {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let journal = example();
    let target = journal.path("restored");
    for format in ["text", "json"] {
        let output =
            command(&journal, &target).args(["--output-format", format]).stdout(full_device()).output();
        let output = output.expect("runs");
        assert_eq!(output.status.code(), Some(1), "{format}: {}", stderr(&output));
        assert!(stderr(&output).contains("cannot write to standard output"), "{}", stderr(&output));
        // As text the point is said before anything is done; as JSON the report is all there is.
        let (state, is_there) = if format == "json" {
            ("is restored and verified", true)
        } else {
            ("nothing was restored", false)
        };
        assert!(stderr(&output).contains(state), "{format}: {}", stderr(&output));
        assert_eq!(target.exists(), is_there, "{format}");
    }
    for arguments in [&["list"][..], &["--help"], &["--version"]] {
        let mut command = Command::new(program());
        command.args(arguments).env("CDP_SERVER", "");
        if arguments == ["list"] {
            command.arg("--store").arg(journal.path("store"));
        }
        let output = command.stdout(full_device()).output().expect("runs");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stderr(&output));
    }
}

#[test]
fn a_reader_that_is_gone_ends_it_quietly() {
    let journal = example();
    let target = journal.path("restored");
    let output = command(&journal, &target).stdout(closed_pipe()).output().expect("runs");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
    assert!(!target.exists(), "nobody saw which point it would be");
}

/// `eprintln!` panics when standard error is full or closed: the exit code was 101, and a good restore failed.
#[test]
fn standard_error_that_takes_nothing_changes_no_result() {
    let journal = example();
    let target = journal.path("restored");
    let mut restore = command(&journal, &target);
    let output = restore.args(["--output-format", "json"]).stderr(full_device()).output().expect("runs");
    assert!(output.status.success(), "{:?}", output.status);
    let output = restore.stderr(closed_pipe()).output().expect("runs");
    assert_eq!(output.status.code(), Some(4), "it is not empty now");
    let output = Command::new(program()).arg("--at").stderr(full_device()).output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn with_json_every_end_is_one_document() {
    let journal = example();
    let target = journal.path("restored");
    fs::write(&target, "old").expect("a file");
    let at = |at: &str| journal.restore(at, &journal.path("new"), &["--output-format", "json"]);
    let usage = |arguments: &[&str]| journal.command(arguments).output().expect("runs");
    let cases = [
        (at("lsn:1"), 3, "point-in-gap"),
        (at("noon"), 2, "bad-point"),
        (journal.restore("latest", &target, &["--output-format", "json"]), 4, "target-refused"),
        (
            usage(&["--disk", "a/b", "--output", "x", "--at", "latest", "--output-format", "json"]),
            1,
            "no-such-disk",
        ),
        (usage(&["--disk", "a/b", "--output", "x", "--output-format", "json"]), 2, "usage"),
        (usage(&["--output-format=json", "--nonsense"]), 2, "usage"),
    ];
    for (output, code, kind) in cases {
        assert_eq!(output.status.code(), Some(code), "{kind}: {}", stderr(&output));
        let error = &json(&output)["error"];
        assert_eq!(error["kind"], kind, "{error}");
        for field in ["detail", "hint"] {
            assert!(
                error[field].as_str().is_some_and(|text| !text.is_empty()),
                "{kind}: no {field} in {error}"
            );
        }
    }
}

/// Runs a script in a mount namespace of its own, which anybody may make. `$1` is the journal's folder, `$2` the program,
/// `$3` the disk.
fn with_mounts(journal: &Journal, script: &str) -> Output {
    journal.commit();
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh"]);
    command.arg(journal.directory.path()).arg(program()).arg(DISK.to_string());
    command.output().expect("unshare runs")
}

#[test]
fn a_target_that_cannot_be_written_says_what_to_do_before_anything_is() {
    let journal = example();
    let path = |name: &str| journal.path(name);
    fs::create_dir(path("folder")).expect("a folder");
    fs::write(path("file"), "").expect("a file");
    symlink(path("nowhere"), path("dangling")).expect("a link");
    symlink(path("loop"), path("loop")).expect("a link");
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    let before = names_in(journal.directory.path());
    let cases = [
        (path("dangling"), "symbolic link to", "remove the link"),
        (path("no/such/folder/image"), "is not there", "mkdir -p"),
        (path("file/image"), "is a file, not a folder", "check the path"),
        (path("loop"), "circle", "namei"),
        (path("folder"), "it is a folder", "disk.raw"),
        (path("new/"), "ends with /", "without the /"),
        (path("fifo"), "cannot be read back", "restore to a file"),
        (path("/dev/null"), "cannot be read back", "restore to a file"),
        (path(&"n".repeat(256)), "too long", "255"),
        (path(".."), "it is a folder", "disk.raw"),
    ];
    for (target, what, hint) in cases {
        let output = journal.restore("latest", &target, &["--force"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(4), "{}: {said}", target.display());
        assert!(said.contains(what), "{}: no '{what}' in: {said}", target.display());
        let line = said.lines().find(|line| line.contains("hint: ")).unwrap_or_default();
        assert!(line.contains(hint), "{}: no '{hint}' in: {said}", target.display());
        assert_eq!(names_in(journal.directory.path()), before, "{} left something", target.display());
    }
}

#[test]
fn standard_output_is_no_target_and_says_what_to_do_instead() {
    let journal = example();
    let output = journal.restore("latest", Path::new("-"), &[]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("--server"), "{}", stderr(&output));
    assert!(stdout(&output).is_empty());
}

#[test]
fn a_name_as_long_as_names_can_be_is_restored_to() {
    let journal = example();
    let target = journal.path(&"ü".repeat(127));
    let output = journal.restore("latest", &target, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fs::read(&target).expect("image") == journal.versions[6]);
}

#[test]
fn filesystems_that_take_nothing_say_what_to_do() {
    let journal = example();
    let script = |mount: &str| {
        format!(
            r#"mkdir -p "$1/m"; mount -t tmpfs -o {mount} tmpfs "$1/m"
            "$2" --store "$1/store" --disk "$3" --at latest --output "$1/m/image" || echo "code $?"; ls -A "$1/m""#
        )
    };
    for (mount, what) in [("ro", "read-only"), ("nr_inodes=1", "free some space")] {
        let output = with_mounts(&journal, &script(mount));
        assert!(stdout(&output).ends_with("code 4\n"), "{mount}: {}{}", stdout(&output), stderr(&output));
        assert!(stderr(&output).contains(what), "{mount}: {}", stderr(&output));
    }
}

/// Root reads and writes everywhere, unless it gives that up.
fn unprivileged(inner: Command) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return inner;
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-dac_override,-dac_read_search"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

#[test]
fn a_store_of_somebody_else_says_who_may_read_it() {
    let journal = example();
    let target = journal.path("image");
    let command = command(&journal, &target);
    fs::set_permissions(journal.path("store"), fs::Permissions::from_mode(0o000)).expect("mode");
    let output = unprivileged(command).output().expect("runs");
    fs::set_permissions(journal.path("store"), fs::Permissions::from_mode(0o700)).expect("mode");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("the user of the cdp-server and root"), "{}", stderr(&output));
    assert!(!target.exists());
}

#[test]
fn a_folder_of_somebody_else_says_who_may_write_there() {
    let journal = example();
    let folder = journal.path("theirs");
    fs::create_dir(&folder).expect("a folder");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).expect("mode");
    let output = unprivileged(command(&journal, &folder.join("image"))).output().expect("runs");
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).contains("run cdp-restore as a user that may"), "{}", stderr(&output));
}

/// The kernel sends SIGXFSZ, which ended the process in the middle and left its temporary file.
#[test]
fn a_limit_of_file_sizes_is_an_error_that_leaves_nothing() {
    let journal = example();
    let folder = journal.path("out");
    fs::create_dir(&folder).expect("a folder");
    for format in ["raw", "qcow2"] {
        let inner = command(&journal, &folder.join("image"));
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"ulimit -f 64; exec "$@""#, "sh"])
            .arg(inner.get_program())
            .args(inner.get_args());
        let output = command.args(["--format", format]).output().expect("runs");
        assert_eq!(output.status.code(), Some(1), "{format}: {:?} {}", output.status, stderr(&output));
        let said = stderr(&output);
        assert!(said.contains("ulimit -f") && said.contains("nothing was left"), "{format}: {said}");
        assert_eq!(names_in(&folder), [""; 0], "{format}");
    }
}

/// A restore in a user namespace of its own in which there may be that many threads.
fn with_threads(journal: &Journal, most: u32, target: &Path) -> Output {
    // Who gives up being root needs a program and a journal that others may read.
    let folder = journal.directory.path();
    let program_copy = folder.join("cdp-restore");
    fs::copy(program(), &program_copy).expect("a copy");
    let inner = command(journal, target);
    let opened = Command::new("chmod").args(["-R", "a+rwX"]).arg(folder).status().expect("chmod runs");
    assert!(opened.success());
    let words: &[&str] = if nix::unistd::geteuid().is_root() {
        // The limit is not for root.
        &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    } else {
        &["env"]
    };
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).args(["unshare", "--user", "--map-root-user", "prlimit"]);
    command.arg(format!("--nproc={most}")).arg(program_copy).args(inner.get_args());
    command.env_remove("CDP_SERVER").output().expect("runs")
}

/// A thread that could not be started was a panic.
#[test]
fn a_limit_of_threads_costs_time_or_is_an_error_that_leaves_nothing() {
    let mut journal = Journal::new();
    // More pieces than one thread reads where there may be others.
    let last = (0..300).map(|number| journal.write(number * 8192, &[7; 512])).last().expect("some");
    let folder = journal.path("out");
    fs::create_dir(&folder).expect("a folder");
    let target = folder.join("image");
    // This one, the one for signals, and the one that reads ahead.
    let output = with_threads(&journal, 3, &target);
    assert!(output.status.success(), "{:?}: {}", output.status, stderr(&output));
    assert!(fs::read(&target).expect("image") == journal.versions[last as usize]);
    fs::remove_file(&target).expect("remove");
    let output = with_threads(&journal, 2, &target);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("ulimit -u"), "{}", stderr(&output));
    assert_eq!(names_in(&folder), [""; 0]);
}

/// A server on a journal, and between it and its clients a relay that holds back what answers requests for contents.
struct Held {
    server: Option<Server>,
    address: SocketAddr,
    let_go: Arc<AtomicBool>,
    reached: mpsc::Receiver<()>,
    directory: TempDir,
    versions: Vec<Vec<u8>>,
}

impl Held {
    fn new() -> Self {
        let (directory, versions) = example().close();
        let server = Server::start(Config::on_free_ports(&directory.path().join("store"))).expect("starts");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let let_go = Arc::new(AtomicBool::new(false));
        let (reach, reached) = mpsc::channel();
        let (to, flag) = (server.http_address(), Arc::clone(&let_go));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) =
                    (client.expect("a client"), TcpStream::connect(to).expect("the server"));
                let back = (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                std::thread::spawn(move || carry(back.0, back.1, |_| ()));
                let (flag, reach) = (Arc::clone(&flag), reach.clone());
                std::thread::spawn(move || {
                    carry(client, server, |bytes| {
                        if bytes.windows(6).any(|word| word == b"/data?") {
                            // Nobody listens any more once a test has seen enough.
                            let _ = reach.send(());
                            while !flag.load(Ordering::Relaxed) {
                                std::thread::sleep(Duration::from_millis(5));
                            }
                        }
                    });
                });
            }
        });
        Self { server: Some(server), address, let_go, reached, directory, versions }
    }

    /// Starts a restore and returns when it waits for the disk's contents.
    fn restoring(&self, more: &[&str]) -> (Child, PathBuf) {
        let folder = self.directory.path().join("out");
        fs::create_dir(&folder).expect("a folder");
        let target = folder.join("image");
        let mut command = Command::new(program());
        command.args(["--server", &format!("http://{}", self.address), "--disk", &DISK.to_string()]);
        command.args(["--at", "latest", "--output"]).arg(&target).args(more);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        self.reached.recv_timeout(PATIENCE).expect("it asks for contents");
        (child, target)
    }

    fn go_on(&self) {
        self.let_go.store(true, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.go_on();
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, look: impl Fn(&[u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        look(&buffer[..got]);
        if to.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).expect("it runs");
}

/// How often the thread that handles signals has gone to sleep.
fn rests(child: &Child) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).ok()?;
    let mut tasks = tasks.map(|task| task.expect("a thread").path());
    let task =
        tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "ctrl-c\n"))?;
    let status = fs::read_to_string(task.join("status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
}

/// Sends a signal and returns when it was handled.
fn signal_and_wait(child: &Child, wanted: Signal) {
    let until = |what: &dyn Fn() -> bool| {
        let begin = Instant::now();
        while !what() {
            assert!(begin.elapsed() < PATIENCE, "no thread handles signals");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    until(&|| rests(child).is_some_and(|rests| rests > 0));
    let before = rests(child);
    signal(child, wanted);
    until(&|| rests(child) > before);
}

fn assert_stopped(output: &Output, target: &Path) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(130), "{:?}: {said}", output.status);
    assert!(said.contains("stopped by a signal") && said.contains("nothing was left at"), "{said}");
    assert_eq!(names_in(target.parent().expect("a folder")), [""; 0], "something was left");
}

#[test]
fn a_signal_in_the_middle_leaves_nothing() {
    for wanted in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let held = Held::new();
        let (child, target) = held.restoring(&[]);
        let partial = names_in(target.parent().expect("a folder"));
        assert!(partial.len() == 1 && partial[0].ends_with(".cdp-restore-partial"), "{partial:?}");
        signal_and_wait(&child, wanted);
        held.go_on();
        assert_stopped(&child.wait_with_output().expect("ends"), &target);
    }
}

#[test]
fn a_second_signal_does_not_wait_for_a_server_that_does_not_answer() {
    let held = Held::new();
    let (mut child, target) = held.restoring(&["--output-format", "json"]);
    let begin = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        assert!(begin.elapsed() < PATIENCE, "it waits for the server");
        signal(&child, Signal::SIGINT);
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().expect("ends");
    assert_stopped(&output, &target);
    assert_eq!(json(&output)["error"]["kind"], "interrupted");
}

/// The first signal is enough, only later.
#[test]
fn a_signal_does_not_wait_for_ever_for_a_server_that_does_not_answer() {
    let held = Held::new();
    let (mut child, target) = held.restoring(&["--output-format", "json"]);
    signal_and_wait(&child, Signal::SIGTERM);
    let begin = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        assert!(begin.elapsed() < PATIENCE, "it waits for the server");
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().expect("ends");
    assert_stopped(&output, &target);
    assert_eq!(json(&output)["error"]["kind"], "interrupted");
}

#[test]
fn a_reader_that_leaves_in_the_middle_gets_its_image_all_the_same() {
    let held = Held::new();
    let (mut child, target) = held.restoring(&[]);
    let mut lines: BufReader<ChildStdout> = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("the point");
    assert!(line.contains("lsn 6, "), "{line}");
    drop(lines);
    held.go_on();
    let output = child.wait_with_output().expect("ends");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
    let image = fs::read(&target).expect("image");
    assert_eq!(image.len() as u64, DISK_BYTES);
    assert!(image == held.versions[6]);
}
