//! `cdp-agent`: reads settings, starts the agent, waits for SIGTERM or SIGINT.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use host_agent::agent::Agent;
use host_agent::config::{Args, Config};
use host_agent::error::AgentError;
use nix::sys::signal::{SigSet, Signal};

fn main() -> ExitCode {
    let args = Args::parse();
    match daemon::start("cdp-agent") {
        Ok(()) => daemon::exit_code("cdp-agent", run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), AgentError> {
    let config = Config::load(args)?;
    let (socket, server) = (config.socket.clone(), config.server.clone());

    // Blocked before any thread exists, so that only the waiting thread sees them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(AgentError::errno("cannot block signals"))?;

    let agent = Agent::start(config)?;
    let stopper = agent.stopper();
    std::thread::Builder::new()
        .name("cdp-signals".into())
        .spawn(move || {
            if signals.wait().is_ok() {
                stopper.stop();
            }
        })
        .map_err(AgentError::os("cannot start a thread"))?;
    announce(&format!("ready socket={} server={server}", socket.display()));
    agent.wait()
}

/// The ready line. Whoever started the agent may have closed its output; that is no reason to stop.
fn announce(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
