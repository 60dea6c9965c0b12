//! Configuration: command line over environment over the TOML file over the defaults.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use daemon::tls::{self, Identity};
use rustls::ServerConfig;
use serde::Deserialize;

use crate::drill::Drill;
use crate::error::ServerError;
use crate::limits::{AGENT_TIMEOUT_S, MAX_SOCKET_PATH, Patience};

/// Default address for agents.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7411";
/// Default address for REST.
pub const DEFAULT_HTTP: &str = "127.0.0.1:7410";

const AFTER_HELP: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT
  1  could not start; what to do is on standard error
  2  the command line, the environment or the --config file is wrong";

/// Takes frames from agents, keeps them durable, and serves the REST API.
///
/// When it is ready it prints one line on standard output: `ready http=ADDR data=ADDR`, and ` unix=PATH` with --listen-unix. It logs to standard error
/// (RUST_LOG sets how much) and stops cleanly on SIGTERM and SIGINT.
#[derive(Parser, Debug, Default)]
#[command(name = "cdp-server", version, after_help = AFTER_HELP)]
pub struct Args {
    /// TOML file with the same settings (store, catalog, listen, listen_unix, http, token_file,
    /// tls_cert, tls_key, tls_client_ca, agent_timeout_s)
    #[arg(long, env = "CDP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the journals; created when missing
    #[arg(long, env = "CDP_STORE", value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// The catalog's file [default: catalog.sqlite3 in the store's directory]
    #[arg(long, env = "CDP_CATALOG", value_name = "FILE")]
    pub catalog: Option<PathBuf>,
    /// Address for agents; port 0 takes a free one [default: 127.0.0.1:7411]
    #[arg(long, env = "CDP_LISTEN", value_name = "ADDR", value_parser = parse_address)]
    pub listen: Option<SocketAddr>,
    /// Unix socket for agents on this host beside --listen; only this server's user and root may open it [default: none]
    #[arg(long, env = "CDP_LISTEN_UNIX", value_name = "PATH")]
    pub listen_unix: Option<PathBuf>,
    /// Address for REST; port 0 takes a free one [default: 127.0.0.1:7410]
    #[arg(long, env = "CDP_HTTP", value_name = "ADDR", value_parser = parse_address)]
    pub http: Option<SocketAddr>,
    /// File with the token that agents must know; without it every agent that can connect is taken
    #[arg(long, env = "CDP_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with the certificate that the TCP listener shows agents, and those up to its authority's; from then on it
    /// speaks TLS alone [default: no TLS]
    #[arg(long, env = "CDP_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the key of --tls-cert
    #[arg(long, env = "CDP_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// PEM file with the authorities of which agents must show a certificate, over TLS [default: they need none]
    #[arg(long, env = "CDP_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Seconds without a byte from an agent after which it is taken for dead, and a disk that another host has too may
    /// go to that host; 5 to 3600 [default: 45]
    #[arg(long, env = "CDP_AGENT_TIMEOUT_S", value_name = "SECONDS")]
    pub agent_timeout_s: Option<u64>,
    /// Makes the store fail on purpose, for a drill, such as disk-full-after=64MiB; see docs/operating/drills.md
    #[arg(long, env = "CDP_DRILL", value_name = "SPEC")]
    pub drill: Option<Drill>,
}

/// The TOML file. Every setting is optional; unknown ones are refused, so that a misspelt one is noticed.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields)]
struct FileConfig {
    store: Option<PathBuf>,
    catalog: Option<PathBuf>,
    listen: Option<SocketAddr>,
    listen_unix: Option<PathBuf>,
    http: Option<SocketAddr>,
    token_file: Option<PathBuf>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    tls_client_ca: Option<PathBuf>,
    agent_timeout_s: Option<u64>,
}

/// What the server runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the journals.
    pub store: PathBuf,
    /// The catalog's file.
    pub catalog: PathBuf,
    /// Address for agents; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Unix socket for agents, an absolute path; `None` for none.
    pub listen_unix: Option<PathBuf>,
    /// Address for REST; port 0 takes a free one.
    pub http: SocketAddr,
    /// Token that agents must know.
    pub token: Option<String>,
    /// What the TCP listener shows agents and asks of them; `None` for no TLS.
    pub tls: Option<Arc<ServerConfig>>,
    /// What fails on purpose. Never in the file: a drill is not to outlive its command line.
    pub drill: Option<Drill>,
    /// How long it waits for peers; of these a flag changes `idle` alone.
    pub patience: Patience,
}

impl Config {
    /// The configuration for a store in `dir` on free loopback ports, without a token. For tests.
    #[must_use]
    pub fn on_free_ports(dir: &Path) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            store: dir.to_owned(),
            catalog: dir.join(CATALOG_FILE),
            listen: any,
            listen_unix: None,
            http: any,
            token: None,
            tls: None,
            drill: None,
            patience: Patience::DEFAULT,
        }
    }

    /// Command line and environment (`args`) over the file it names over the defaults.
    ///
    /// # Errors
    /// `Config` when no store is named, or a file is wrong or cannot be read.
    pub fn load(args: Args) -> Result<Self, ServerError> {
        let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let store = args.store.or(file.store).ok_or_else(|| {
            ServerError::Config(
                "no store: give --store DIR (or CDP_STORE, or `store` in the file)".to_owned(),
            )
        })?;
        let catalog = args.catalog.or(file.catalog).unwrap_or_else(|| store.join(CATALOG_FILE));
        let address = |given: Option<SocketAddr>, default: &str| {
            let bad = |e| ServerError::Config(format!("address {default}: {e}"));
            given.map_or_else(|| default.parse().map_err(bad), Ok)
        };
        let listen = address(args.listen.or(file.listen), DEFAULT_LISTEN)?;
        let http = address(args.http.or(file.http), DEFAULT_HTTP)?;
        if listen == http && listen.port() != 0 {
            return Err(ServerError::Config(format!(
                "--listen and --http are both {http}: agents and REST need a port each"
            )));
        }
        let listen_unix = args.listen_unix.or(file.listen_unix);
        listen_unix.as_deref().map_or(Ok(()), check_socket)?;
        let token = args.token_file.or(file.token_file).map(|path| read_token(&path)).transpose()?;
        let tls = tls_config(
            args.tls_cert.or(file.tls_cert),
            args.tls_key.or(file.tls_key),
            args.tls_client_ca.or(file.tls_client_ca),
        )?;
        let patience = patience(args.agent_timeout_s.or(file.agent_timeout_s))?;
        Ok(Self { store, catalog, listen, listen_unix, http, token, tls, drill: args.drill, patience })
    }
}

/// Reads an address as a user gives it.
fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "give IP:PORT, such as 127.0.0.1:7411, 0.0.0.0:7411 or [::1]:7411".to_owned())
}

fn tls_config(
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
) -> Result<Option<Arc<ServerConfig>>, ServerError> {
    match (&cert, &key, &client_ca) {
        (Some(cert), Some(key), _) => {
            tls::server(Identity { cert, key }, client_ca.as_deref()).map(Some).map_err(ServerError::Config)
        }
        (None, None, None) => Ok(None),
        _ => Err(ServerError::Config(
            "TLS needs both --tls-cert and --tls-key (--tls-client-ca alone switches nothing on)".to_owned(),
        )),
    }
}

fn check_socket(path: &Path) -> Result<(), ServerError> {
    let (shown, bytes) = (path.display(), path.as_os_str().len());
    if !path.is_absolute() {
        return Err(ServerError::Config(format!(
            "--listen-unix is `{shown}`; give an absolute path, such as /run/qemu-cdp/server.sock"
        )));
    }
    if bytes > MAX_SOCKET_PATH {
        return Err(ServerError::Config(format!(
            "--listen-unix {shown}: a socket's path has at most {MAX_SOCKET_PATH} bytes, not {bytes}; give a shorter one"
        )));
    }
    Ok(())
}

const CATALOG_FILE: &str = "catalog.sqlite3";

fn patience(agent_timeout_s: Option<u64>) -> Result<Patience, ServerError> {
    let Some(seconds) = agent_timeout_s else { return Ok(Patience::DEFAULT) };
    if !AGENT_TIMEOUT_S.contains(&seconds) {
        let (least, most) = (AGENT_TIMEOUT_S.start(), AGENT_TIMEOUT_S.end());
        return Err(ServerError::Config(format!("agent_timeout_s is {seconds}; give {least} to {most}")));
    }
    Ok(Patience { idle: Duration::from_secs(seconds), ..Patience::DEFAULT })
}

fn read_text(path: &Path) -> Result<String, ServerError> {
    std::fs::read_to_string(path).map_err(|e| {
        ServerError::Config(format!("cannot read {}: {e}; check the path and its mode", path.display()))
    })
}

fn read_file(path: &Path) -> Result<FileConfig, ServerError> {
    let text = read_text(path)?;
    toml::from_str(&text).map_err(|e| ServerError::Config(format!("{}: {e}", path.display())))
}

fn read_token(path: &Path) -> Result<String, ServerError> {
    let token = read_text(path)?.trim().to_owned();
    if token.is_empty() {
        return Err(ServerError::Config(format!(
            "{}: the token is empty: put one into the file, or leave --token-file out",
            path.display()
        )));
    }
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir, text: &str) -> Option<PathBuf> {
        let path = dir.path().join("server.toml");
        std::fs::write(&path, text).expect("writes");
        Some(path)
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_the_file_over_the_defaults() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = file(&dir, "store = '/from/file'\nlisten = '127.0.0.1:1'\nhttp = '127.0.0.1:2'\n");
        let listen = Some(SocketAddr::from(([127, 0, 0, 1], 9)));
        let config = Config::load(Args { config, listen, ..Args::default() }).expect("loads");
        assert_eq!(config.store, Path::new("/from/file"));
        assert_eq!(config.catalog, Path::new("/from/file/catalog.sqlite3"));
        assert_eq!((config.listen.port(), config.http.port()), (9, 2));
    }

    #[test]
    fn a_misspelt_setting_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = file(&dir, "stroe = '/x'\n");
        let error = Config::load(Args { config, ..Args::default() }).expect_err("refused");
        assert!(error.to_string().contains("stroe"), "{error}");
    }

    #[test]
    fn the_agents_timeout_is_set_within_its_range() {
        let load = |agent_timeout_s| {
            Config::load(Args { store: Some("/x".into()), agent_timeout_s, ..Args::default() })
        };
        assert_eq!(load(None).expect("loads").patience, Patience::DEFAULT);
        assert_eq!(load(Some(7)).expect("loads").patience.idle, Duration::from_secs(7));
        let error = load(Some(4)).expect_err("refused");
        assert!(error.to_string().contains("5 to 3600"), "{error}");
    }

    #[test]
    fn a_socket_that_cannot_be_is_refused_with_one_that_can() {
        let load = |path: &str| {
            Config::load(Args { store: Some("/x".into()), listen_unix: Some(path.into()), ..Args::default() })
        };
        assert_eq!(load("/run/x").expect("loads").listen_unix.as_deref(), Some(Path::new("/run/x")));
        let long = format!("/{}", "x".repeat(MAX_SOCKET_PATH));
        for (path, hint) in
            [("server.sock", "absolute path, such as /"), ("", "absolute path"), (&long, "107 bytes")]
        {
            let error = load(path).expect_err("refused");
            assert!(error.to_string().contains(hint), "{error}");
        }
    }

    #[test]
    fn without_a_store_it_says_which_flag_is_missing() {
        let error = Config::load(Args::default()).expect_err("refused");
        assert!(error.to_string().contains("--store"), "{error}");
    }
}
