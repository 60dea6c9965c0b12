//! The `cdp-server` program: see [`cdp_server`].

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use cdp_server::{Args, Config, Server, ServerError};
use clap::Parser;
use nix::sys::stat::{Mode, umask};

fn main() -> ExitCode {
    let args = Args::parse();
    // All that the server writes is what guests wrote: nobody else on this host may read it.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    match daemon::start("cdp-server") {
        Ok(()) => daemon::exit_code("cdp-server", run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), ServerError> {
    let config = Config::load(args)?;
    let unix = config.listen_unix.clone();
    let server = Server::start(config)?;
    let signals = server.catch_signals()?;
    announce(&server, unix.as_deref());
    let signal = server.wait(signals);
    tracing::info!(signal, "stopping");
    server.stop();
    Ok(())
}

/// The ready line. Whoever started the server may have closed its output; that is no reason to stop.
fn announce(server: &Server, unix: Option<&Path>) {
    let mut out = std::io::stdout().lock();
    let unix = unix.map(|path| format!(" unix={}", path.display())).unwrap_or_default();
    let _ = writeln!(out, "ready http={} data={}{unix}", server.http_address(), server.data_address());
    let _ = out.flush();
}
