//! A small QMP client: one command at a time, events are skipped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::wait_for;

/// A connection to a QEMU program's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// The arguments that give `qemu-storage-daemon` a monitor with that socket. They come before all others: the monitor
    /// lives in a thread of its own, which sets its handlers up while the main thread goes on with the arguments. A client
    /// that the main loop accepts before they are there meets two threads at its socket: two greetings, lost input, even
    /// a crash (one start in ten when the monitor is last; QEMU 10.0).
    #[must_use]
    pub fn arguments(socket: &Path) -> [String; 4] {
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
        ["--chardev".to_owned(), chardev, "--monitor".to_owned(), "chardev=qmp".to_owned()]
    }

    /// Connects as soon as the socket is there, and leaves negotiation mode.
    ///
    /// # Panics
    /// When the monitor does not answer.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let stream = wait_for("the monitor's socket", || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(crate::PATIENCE)).expect("timeout");
        let mut qmp = Self { reader: BufReader::new(stream) };
        let greeting = qmp.receive();
        assert!(greeting.get("QMP").is_some(), "not a QMP greeting: {greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Panics
    /// When the command fails.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.reader.get_mut().write_all(request.as_bytes()).expect("the monitor takes commands");
        loop {
            let answer = self.receive();
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
            assert!(answer.get("error").is_none(), "{command}: {answer}");
        }
    }

    /// Runs a command of the human monitor (in qemu-system only) and returns what it prints.
    ///
    /// # Panics
    /// When the command fails.
    pub fn human(&mut self, command: &str) -> String {
        let answer = self.run("human-monitor-command", json!({"command-line": command}));
        answer.as_str().expect("text").to_owned()
    }

    /// Waits for an event; what comes before it is skipped.
    ///
    /// # Panics
    /// When it does not come.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let message = self.receive();
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return message;
            }
        }
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).expect("the monitor answers");
        assert!(length > 0, "the monitor was closed");
        serde_json::from_str(&line).expect("JSON")
    }
}
