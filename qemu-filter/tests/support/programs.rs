//! QEMU's own programs with the library loaded.
//!
//! `CDP_TEST_ROOT` names the root of another release (a folder made by debootstrap); without it the installed
//! programs run.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::agent::{Agent, Filter};

const PROMPT: &[u8] = b"qemu-io> ";

/// A temporary folder that the programs see too, with a copy of the library.
pub struct Site {
    root: Option<PathBuf>,
    folder: tempfile::TempDir,
}

impl Site {
    pub fn new() -> Self {
        let root = std::env::var_os("CDP_TEST_ROOT").map(PathBuf::from);
        let parent = root.as_ref().map_or_else(std::env::temp_dir, |root| root.join("tmp"));
        let folder = tempfile::Builder::new().prefix("cdp-").tempdir_in(parent).unwrap();
        std::fs::copy(library(), folder.path().join("libcdp_filter.so")).unwrap();
        Self { root, folder }
    }

    /// The root of the release under test.
    pub fn root(&self) -> &Path {
        self.root.as_deref().unwrap_or(Path::new("/"))
    }

    /// The folder as we see it.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file of the folder as the programs see it.
    pub fn inside(&self, file: &str) -> String {
        let path = self.folder.path().join(file);
        let path = match &self.root {
            Some(root) => Path::new("/").join(path.strip_prefix(root).unwrap()),
            None => path,
        };
        path.to_str().unwrap().to_owned()
    }

    /// A program of the release under test.
    pub fn command(&self, program: &str) -> Command {
        match &self.root {
            Some(root) => {
                let mut command = Command::new("chroot");
                command.arg(root).arg(program);
                command
            }
            None => Command::new(program),
        }
    }

    /// Where the program's file is for us.
    pub fn executable(&self, program: &str) -> PathBuf {
        let installed = Path::new("usr/bin").join(program);
        self.root().join(installed)
    }

    /// The process that runs `program`: `started` itself, for chroot and env become it.
    pub fn pid_of(&self, started: u32, program: &str) -> u32 {
        let name = std::fs::read_to_string(format!("/proc/{started}/comm")).unwrap();
        assert_eq!(name.trim_end(), program);
        started
    }

    /// A program with the library loaded that talks to the agent. `env` loads it, so that chroot does not.
    /// Its VM is called "test".
    pub fn filtered(&self, program: &str, agent: &Agent) -> Command {
        let mut command = self.preloaded("env", agent);
        command.arg("CDP_VM_NAME=test").arg(program);
        command
    }

    /// As `filtered`, with the name that the program gives its VM.
    pub fn preloaded(&self, program: &str, agent: &Agent) -> Command {
        let mut command = self.pointed_at("env", agent);
        command.arg(format!("LD_PRELOAD={}", self.inside("libcdp_filter.so"))).arg(program);
        command
    }

    /// A program without the library; should it come later, it talks to the agent.
    pub fn pointed_at(&self, program: &str, agent: &Agent) -> Command {
        let mut command = self.command("env");
        let socket = agent.socket().file_name().unwrap().to_str().unwrap();
        command.arg(format!("CDP_AGENT_SOCKET={}", self.inside(socket))).arg(program);
        command
    }

    /// A storage daemon's arguments for a file as node `disk`, with an export of `node` under the name `disk`.
    pub fn exporting<'a>(&self, command: &'a mut Command, node: &str) -> &'a mut Command {
        command
            .args(["--blockdev", &format!("driver=file,node-name=disk,filename={}", self.inside("disk"))])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", self.inside("nbd"))])
            .args(["--export", &format!("type=nbd,id=e,name=disk,node-name={node},writable=on")])
    }

    /// Starts a storage daemon with the library that exports an 8 MiB file, node `disk`, and has a monitor.
    pub fn storage_daemon(&self, agent: &Agent) -> Ends {
        self.create("raw", "disk", "8M");
        let mut command = self.filtered("qemu-storage-daemon", agent);
        // The monitor first: QEMU sets it up in a thread of its own, and a client must not come before that is done.
        command
            .args(["--chardev", &format!("socket,id=q,path={},server=on,wait=off", self.inside("qmp"))])
            .args(["--monitor", "chardev=q"]);
        self.exporting(&mut command, "disk");
        Ends(command.spawn().unwrap())
    }

    /// The export's address.
    pub fn nbd_url(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.inside("nbd"))
    }

    /// Runs a program to its end.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes an image.
    pub fn create(&self, format: &str, file: &str, size: &str) {
        self.run("qemu-img", &["create", "-q", "-f", format, &self.inside(file), size]);
    }

    /// The contents of an image as a guest would read them.
    pub fn contents(&self, format: &str, file: &str) -> Vec<u8> {
        let raw = format!("{file}.contents");
        self.run(
            "qemu-img",
            &["convert", "-U", "-f", format, "-O", "raw", &self.inside(file), &self.inside(&raw)],
        );
        std::fs::read(self.path().join(raw)).unwrap()
    }
}

pub fn library() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    let library = folder.join("libcdp_filter.so");
    let library = if library.exists() { library } else { folder.parent().unwrap().join("libcdp_filter.so") };
    assert!(library.exists(), "{} is not built", library.display());
    library
}

/// A child that is ended with its test.
pub struct Ends(pub Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// `qemu-io` with one disk open, waiting for commands.
pub struct QemuIo {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl QemuIo {
    /// Opens what `options` say (`driver=…,node-name=disk,…`).
    pub fn open(site: &Site, agent: &Agent, options: &str) -> Self {
        Self::open_with(site, agent, options, &[])
    }

    /// As `open`, with more variables for the program.
    pub fn open_with(site: &Site, agent: &Agent, options: &str, variables: &[&str]) -> Self {
        let mut command = site.filtered("env", agent);
        command.args(variables).args(["qemu-io", "-t", "none", "--image-opts", options]);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut program = Self { child, stdin, stdout };
        program.until_prompt();
        program
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command and gives what it printed.
    pub fn run(&mut self, command: &str) -> String {
        writeln!(self.stdin, "{command}").unwrap();
        self.until_prompt()
    }

    /// Runs a command that must succeed.
    pub fn must(&mut self, command: &str) {
        let answer = self.run(command);
        assert!(!answer.contains("fail") && !answer.contains("rror"), "{command}: {answer}");
    }

    fn until_prompt(&mut self) -> String {
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(PROMPT) {
            assert_eq!(
                self.stdout.read(&mut byte).unwrap(),
                1,
                "qemu-io ended: {}",
                String::from_utf8_lossy(&text)
            );
            text.push(byte[0]);
        }
        text.truncate(text.len() - PROMPT.len());
        String::from_utf8(text).unwrap()
    }

    /// Ends it; it must end well.
    pub fn quit(self) {
        assert_eq!(self.end(), Some(0));
    }

    /// Ends it after a command that failed, which is what its exit code must say.
    pub fn quit_after_a_failure(self) {
        assert_eq!(self.end(), Some(1));
    }

    /// Ends it, whether a command has failed or not.
    pub fn quit_anyhow(self) {
        assert!(matches!(self.end(), Some(0 | 1)));
    }

    fn end(mut self) -> Option<i32> {
        writeln!(self.stdin, "quit").unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Opens a disk in `qemu-io` and waits for its filter.
pub fn open<'a>(site: &Site, agent: &'a Agent, options: &str) -> (QemuIo, Filter<'a>) {
    let program = QemuIo::open(site, agent, options);
    let filter = agent.accept();
    (program, filter)
}
