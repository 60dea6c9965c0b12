//! Settings: defaults, then the TOML file, then the command line, the later winning.

use core::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::Parser;
use daemon::tls::{self, Identity};
use rustls::pki_types::ServerName;
use serde::Deserialize;

use crate::drill::Drill;
use crate::error::AgentError;
use crate::limits::{OUTBOX_MIB, RING_MIB, SPOOL_MIB};
use crate::socket::{Address, Tls};
use crate::spool::SpoolPlace;

const AFTER_HELP: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT
  1  could not start; what to do is on standard error
  2  the command line, the environment or the --config file is wrong";

/// Drains the capture rings of this host's QEMU processes and ships their writes to a cdp-server.
#[derive(Parser, Debug, Default)]
#[command(name = "cdp-agent", version, after_help = AFTER_HELP)]
pub struct Args {
    /// TOML file with settings; its keys are the long names of these options with `_` for `-`.
    #[arg(long, value_name = "FILE", env = "CDP_AGENT_CONFIG")]
    pub config: Option<PathBuf>,
    /// Data address of the server, or unix:/PATH of its socket on this host [default: 127.0.0.1:7411].
    #[arg(long, value_name = "HOST:PORT", env = "CDP_AGENT_SERVER")]
    pub server: Option<String>,
    /// Unix socket on which filters connect [default: /run/qemu-cdp/agent.sock].
    #[arg(long, value_name = "PATH", env = "CDP_AGENT_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Access mode of the socket, octal [default: 660].
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Group that owns the socket, so that QEMU may connect (libvirt-qemu, kvm, …) [default: the agent's own].
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Room for written data in each disk's capture ring, 8 to 16384 MiB [default: 64].
    #[arg(long, value_name = "MIB", value_parser = |text: &str| mib(text, RING_MIB))]
    pub ring_mib: Option<u64>,
    /// Room for packed frames that wait for the server, for each disk, 16 to 65536 MiB [default: 256].
    #[arg(long, value_name = "MIB", value_parser = |text: &str| mib(text, OUTBOX_MIB))]
    pub outbox_mib: Option<u64>,
    /// Folder for frames that memory has no room for while the server is away [default: /var/lib/qemu-cdp/spool].
    #[arg(long, value_name = "DIR")]
    pub spool_dir: Option<PathBuf>,
    /// Most room there for each disk, 64 to 16777216 MiB, or 0 for no spool [default: 1024].
    #[arg(long, value_name = "MIB", value_parser = |text: &str| if text == "0" { Ok(0) } else { mib(text, SPOOL_MIB) })]
    pub spool_mib: Option<u64>,
    /// Name of this host for people [default: its host name].
    #[arg(long, value_name = "NAME")]
    pub host_name: Option<String>,
    /// File with 32 hexadecimal digits that name this host for ever [default: /etc/machine-id].
    #[arg(long, value_name = "FILE")]
    pub machine_id: Option<PathBuf>,
    /// File whose first line is the token that the server asks for [default: none].
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with the authorities that the server's certificate has to be of; makes the TCP connection TLS [default: no
    /// TLS].
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Name that the server's certificate has to have [default: HOST of --server].
    #[arg(long, value_name = "NAME")]
    pub tls_server_name: Option<String>,
    /// PEM file with the certificate that the agent shows a server that asks for one [default: none].
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the key of --tls-cert.
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Use plain system calls even where the kernel offers io_uring.
    #[arg(long)]
    pub no_io_uring: bool,
    /// Makes spool, connection or drains fail on purpose, for a drill, such as cut-for=20s@30s; see
    /// docs/operating/drills.md.
    #[arg(long, value_name = "SPEC", env = "CDP_AGENT_DRILL")]
    pub drill: Option<Drill>,
}

/// The TOML file: every key optional, unknown keys refused (a misspelt key must not be ignored in silence).
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields, default)]
struct File {
    server: Option<String>,
    socket: Option<PathBuf>,
    socket_mode: Option<String>,
    socket_group: Option<String>,
    ring_mib: Option<u64>,
    outbox_mib: Option<u64>,
    spool_dir: Option<PathBuf>,
    spool_mib: Option<u64>,
    host_name: Option<String>,
    machine_id: Option<PathBuf>,
    token_file: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    tls_server_name: Option<String>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    no_io_uring: Option<bool>,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Data address of the server.
    pub server: Address,
    /// Unix socket on which filters connect.
    pub socket: PathBuf,
    /// Access mode of the socket.
    pub socket_mode: u32,
    /// Group that owns the socket; `None` leaves it to the agent's own.
    pub socket_group: Option<String>,
    /// Bytes of arena in each ring.
    pub ring_bytes: u64,
    /// Bytes of each outbox.
    pub outbox_bytes: u64,
    /// Where frames are spooled.
    pub spool: SpoolPlace,
    /// Name of the host for people.
    pub host_name: String,
    /// File that names the host for ever; `None` for the system's.
    pub machine_id: Option<PathBuf>,
    /// Token for the server, or empty.
    pub token: String,
    /// Encrypts the connection; `None` for none. Only with TCP.
    pub tls: Option<Tls>,
    /// Plain system calls only.
    pub no_io_uring: bool,
    /// What fails on purpose. Never in the file: a drill is not to outlive its command line.
    pub drill: Option<Drill>,
}

impl Config {
    /// Merges and checks all sources of settings.
    ///
    /// # Errors
    /// [`AgentError::Config`] naming the setting, [`AgentError::Os`] for a file that cannot be read.
    pub fn load(args: Args) -> Result<Self, AgentError> {
        let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let token_file = args.token_file.or(file.token_file);
        let ring_mib = args.ring_mib.or(file.ring_mib).unwrap_or(64);
        let outbox_mib = args.outbox_mib.or(file.outbox_mib).unwrap_or(256);
        let spool_mib = args.spool_mib.or(file.spool_mib).unwrap_or(1024);
        let mode = args.socket_mode.or(file.socket_mode).unwrap_or_else(|| "660".into());
        let server = args.server.or(file.server).unwrap_or_else(|| "127.0.0.1:7411".into());
        let server: Address = server.parse().map_err(|detail| bad("server", detail))?;
        let tls = TlsFiles {
            ca: args.tls_ca.or(file.tls_ca),
            name: args.tls_server_name.or(file.tls_server_name),
            cert: args.tls_cert.or(file.tls_cert),
            key: args.tls_key.or(file.tls_key),
        };
        Ok(Self {
            tls: tls.load(&server)?,
            server,
            socket: args.socket.or(file.socket).unwrap_or_else(|| "/run/qemu-cdp/agent.sock".into()),
            socket_mode: parse_mode(&mode)?,
            socket_group: args.socket_group.or(file.socket_group),
            ring_bytes: bytes("ring_mib", ring_mib, RING_MIB)?,
            outbox_bytes: bytes("outbox_mib", outbox_mib, OUTBOX_MIB)?,
            spool: SpoolPlace {
                folder: args.spool_dir.or(file.spool_dir).unwrap_or_else(|| "/var/lib/qemu-cdp/spool".into()),
                limit_bytes: match spool_mib {
                    0 => 0,
                    mib => bytes("spool_mib", mib, SPOOL_MIB)?,
                },
                drill: args.drill.clone(),
            },
            host_name: args.host_name.or(file.host_name).unwrap_or_else(host_name),
            machine_id: args.machine_id.or(file.machine_id),
            token: token_file.as_deref().map(read_token).transpose()?.unwrap_or_default(),
            no_io_uring: args.no_io_uring || file.no_io_uring.unwrap_or(false),
            drill: args.drill,
        })
    }
}

/// What the settings say of TLS.
struct TlsFiles {
    ca: Option<PathBuf>,
    name: Option<String>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl TlsFiles {
    fn load(self, server: &Address) -> Result<Option<Tls>, AgentError> {
        let Some(ca) = self.ca else {
            return match (self.name, self.cert, self.key) {
                (None, None, None) => Ok(None),
                _ => Err(bad(
                    "tls_ca",
                    "missing: the other settings of TLS do nothing without --tls-ca".to_owned(),
                )),
            };
        };
        let Some(host) = server.host() else {
            return Err(bad("tls_ca", format!("TLS is for HOST:PORT; leave it out with {server}")));
        };
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some(Identity { cert, key }),
            (None, None) => None,
            _ => return Err(bad("tls_cert", "give both --tls-cert and --tls-key, or neither".to_owned())),
        };
        let config = tls::client(&ca, identity).map_err(|detail| bad("tls_ca", detail))?;
        let name = self.name.unwrap_or_else(|| host.to_owned());
        let name = ServerName::try_from(name.clone()).map_err(|error| {
            bad("tls_server_name", format!("`{name}`: {error}; give a host's name or IP address"))
        })?;
        Ok(Some(Tls { config, name }))
    }
}

fn bad(setting: &'static str, detail: String) -> AgentError {
    AgentError::Config { setting, detail }
}

fn read_file(path: &Path) -> Result<File, AgentError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| bad("config", format!("cannot read {}: {error}", path.display())))?;
    toml::from_str(&text).map_err(|error| bad("config", format!("{}: {error}", path.display())))
}

fn read_token(path: &Path) -> Result<String, AgentError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| bad("token_file", format!("cannot read {}: {error}", path.display())))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn parse_mode(text: &str) -> Result<u32, AgentError> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| bad("socket_mode", format!("`{text}` is not an octal mode such as 660")))
}

/// Reads a size as a user gives it.
fn mib(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| format!("give a whole number of MiB from {} to {}", range.start(), range.end()))
}

fn bytes(setting: &'static str, mib: u64, range: RangeInclusive<u64>) -> Result<u64, AgentError> {
    if !range.contains(&mib) {
        return Err(bad(setting, format!("{mib} is outside {} to {} MiB", range.start(), range.end())));
    }
    Ok(mib << 20)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".into() } else { name.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str, args: Args) -> Result<Config, AgentError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(Args { config: Some(path), ..args })
    }

    #[test]
    fn command_line_wins_over_file_over_defaults() {
        let text = "server = \"a:1\"\nring_mib = 32\nsocket_mode = \"600\"\n";
        let config = with_file(text, Args { server: Some("b:2".into()), ..Args::default() }).unwrap();
        assert_eq!(config.server.to_string(), "b:2");
        assert_eq!(config.ring_bytes, 32 << 20);
        assert_eq!(config.socket_mode, 0o600);
        assert_eq!(config.outbox_bytes, 256 << 20);
    }

    #[test]
    fn misspelt_keys_and_senseless_values_are_refused() {
        assert!(with_file("ring_mb = 32\n", Args::default()).is_err());
        assert!(with_file("ring_mib = 1\n", Args::default()).is_err());
        assert!(with_file("socket_mode = \"9\"\n", Args::default()).is_err());
        for server in
            ["nowhere", ":1", "a:0", "a:70000", "1:2:3", "[::1:7411", "http://a:7411", "a b:7411", "unix:x"]
        {
            assert!(with_file(&format!("server = \"{server}\"\n"), Args::default()).is_err(), "{server}");
        }
        for server in ["a:1", "10.0.0.2:7411", "[fd00::2]:7411", "unix:/run/server.sock"] {
            assert!(with_file(&format!("server = \"{server}\"\n"), Args::default()).is_ok(), "{server}");
        }
    }

    #[test]
    fn help_and_errors_say_the_range_of_every_size() {
        let help = <Args as clap::CommandFactory>::command().render_long_help().to_string();
        for (flag, range) in
            [("--ring-mib", RING_MIB), ("--outbox-mib", OUTBOX_MIB), ("--spool-mib", SPOOL_MIB)]
        {
            let (least, most) = (*range.start(), *range.end());
            let text = help.split(flag).nth(1).unwrap();
            assert!(text.contains(&format!("{least} to {most} MiB")), "{flag}: {text}");
            let parse = |value: String| Args::try_parse_from(["cdp-agent", flag, &value]);
            for good in [least, most] {
                let args = parse(good.to_string()).unwrap();
                assert!(Config::load(args).is_ok(), "{flag} {good}");
            }
            for wrong in
                [(least - 1).to_string(), (most + 1).to_string(), format!("{}0", u64::MAX), "x".into()]
            {
                let said = parse(wrong.clone()).unwrap_err().to_string();
                assert!(said.contains(&format!("from {least} to {most}")), "{flag} {wrong}: {said}");
            }
            let setting = flag.trim_start_matches("--").replace('-', "_");
            let said =
                with_file(&format!("{setting} = {}\n", most + 1), Args::default()).unwrap_err().to_string();
            assert!(said.contains(&format!("{least} to {most}")), "{said}");
        }
        assert_eq!(Args::try_parse_from(["cdp-agent", "--spool-mib", "0"]).unwrap().spool_mib, Some(0));
    }

    #[test]
    fn token_is_the_first_line_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret \nsecond line\n").unwrap();
        let config = Config::load(Args { token_file: Some(path), ..Args::default() }).unwrap();
        assert_eq!(config.token, "s3cret");
    }
}
