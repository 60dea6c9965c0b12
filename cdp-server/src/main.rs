//! The `cdp-server` program: see [`cdp_server`].

use std::io::Write;
use std::process::ExitCode;

use cdp_server::{Args, Config, Server, ServerError};
use clap::Parser;

fn main() -> ExitCode {
    let args = Args::parse();
    match daemon::start("cdp-server") {
        Ok(()) => daemon::exit_code("cdp-server", run(args)),
        Err(code) => code,
    }
}

fn run(args: Args) -> Result<(), ServerError> {
    let server = Server::start(Config::load(args)?)?;
    let signals = server.catch_signals()?;
    announce(&server);
    let signal = server.wait(signals);
    tracing::info!(signal, "stopping");
    server.stop();
    Ok(())
}

/// The ready line. Whoever started the server may have closed its output; that is no reason to stop.
fn announce(server: &Server) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "ready http={} data={}", server.http_address(), server.data_address());
    let _ = out.flush();
}
