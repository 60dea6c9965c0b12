//! A monitor connection: lines of JSON, looked at as text.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::agent::{LIMIT, wait_for};

pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the monitor at `socket` and says hello.
    pub fn connect(socket: &Path) -> Self {
        let stream = wait_for("a monitor", || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Self { reader: BufReader::new(stream) };
        assert!(qmp.line().contains("QMP"));
        qmp.must("{'execute': 'qmp_capabilities'}");
        qmp
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "QEMU has closed its monitor");
        line
    }

    /// Runs a command and gives its answer, an error or not.
    pub fn run(&mut self, command: &str) -> String {
        self.reader.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.contains("\"return\"") || line.contains("\"error\"") {
                return line;
            }
        }
    }

    /// Runs a command that must succeed. Its quotes may be single ones.
    pub fn must(&mut self, command: &str) -> String {
        let answer = self.run(&command.replace('\'', "\""));
        assert!(answer.contains("\"return\""), "{command}: {answer}");
        answer
    }

    /// Runs a command of `qemu-io` on a device; it must succeed.
    pub fn io(&mut self, device: &str, command: &str) {
        let line = format!("qemu-io -d {device} \\\"{command}\\\"");
        let answer = self.run(&format!(
            "{{\"execute\": \"human-monitor-command\", \"arguments\": {{\"command-line\": \"{line}\"}}}}"
        ));
        assert!(!answer.contains("fail") && !answer.contains("rror"), "{command}: {answer}");
    }

    /// Runs a command of the human monitor and gives what it printed.
    pub fn human(&mut self, command: &str) -> String {
        let answer = self.run(&format!(
            "{{\"execute\": \"human-monitor-command\", \"arguments\": {{\"command-line\": \"{command}\"}}}}"
        ));
        let said = answer.split_once("\"return\": \"").and_then(|(_, rest)| rest.rsplit_once('"'));
        said.unwrap_or_else(|| panic!("{command}: {answer}")).0.to_owned()
    }

    /// Waits until no job is left.
    pub fn wait_jobs(&mut self) {
        wait_for("the end of all jobs", || {
            let jobs = self.must("{'execute': 'query-block-jobs'}");
            if jobs.contains("\"return\": []") {
                return Some(());
            }
            std::thread::sleep(Duration::from_millis(10));
            None
        });
    }

    /// Waits until the only job is ready.
    pub fn wait_ready(&mut self) {
        wait_for("a job that is ready", || {
            self.must("{'execute': 'query-block-jobs'}").contains("\"ready\": true").then_some(())
        });
    }
}
