//! `cdp-agent`: reads settings, starts the agent, waits for SIGTERM or SIGINT.

use std::io::Write;

use anyhow::Context;
use clap::Parser;
use host_agent::agent::Agent;
use host_agent::config::{Args, Config};
use nix::sys::signal::{SigSet, Signal};

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    let config = Config::load(args)?;
    let (socket, server) = (config.socket.clone(), config.server.clone());

    // Blocked before any thread exists, so that only the waiting thread sees them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;

    let agent = Agent::start(config)?;
    let stopper = agent.stopper();
    std::thread::Builder::new().name("cdp-signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            stopper.stop();
        }
    })?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "ready socket={} server={server}", socket.display())?;
    stdout.flush()?;
    agent.wait()?;
    Ok(())
}
