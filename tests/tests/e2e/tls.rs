//! TLS between agent and server: what goes through it, and what either says when it cannot be.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::sync::Arc;

use cdp_api::{PointSpec, ProtectionPhase};
use cdp_tests::certificates::Authority;
use cdp_tests::load::{Busy, Load};
use cdp_tests::process::Process;
use cdp_tests::programs::program;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const DISK_BYTES: u64 = 16 << 20;
const HOST: &str = "127.0.0.1";

/// The server's side: its certificate, and that it asks agents for one of the same authority.
fn server_flags(authority: &Authority) -> Vec<String> {
    let [cert, key] = authority.issue(HOST);
    ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &authority.ca()].map(str::to_owned).into()
}

/// The agent's side.
fn agent_flags(authority: &Authority) -> Vec<String> {
    let [cert, key] = authority.issue("agent");
    ["--tls-ca", &authority.ca(), "--tls-cert", &cert, "--tls-key", &key].map(str::to_owned).into()
}

fn words(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

fn site(authority: &Authority, more: &[&str]) -> Site {
    let (agent, server) = (agent_flags(authority), server_flags(authority));
    Site::start_with_both(&[words(&agent), more.to_vec()].concat(), &words(&server))
}

fn protected(site: &Site, name: &str) -> (Qemu, String, std::path::PathBuf) {
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
    let qemu = Qemu::storage_daemon(site, name, &[raw_file(&image)], "disk");
    let disk = site.disk(qemu.vm(), "");
    site.protect(&disk);
    (qemu, disk, image)
}

fn what_is_written_is_restored(no_io_uring: bool) {
    let authority = Authority::new();
    let mut site = site(&authority, if no_io_uring { &["--no-io-uring"] } else { &[] });
    let (qemu, disk, image) = protected(&site, "encrypted");
    let busy = Busy::start(Load::new(5, DISK_BYTES, 512, site.directory()), &qemu.nbd_url());
    busy.let_through(200);
    site.server.kill();
    site.restart_server();
    busy.let_through(200);
    site.agent.kill();
    site.restart_agent();
    busy.let_through(200);
    busy.finish();
    let driver = if no_io_uring { "driver=\"plain\" tls=true" } else { "driver=\"io_uring\" tls=true" };
    assert!(site.agent.log().contains(driver), "{}", site.agent.log());
    site.wait_for_phase(&disk, ProtectionPhase::Protected);
    let lsn = site.bookmark(&disk, "after the load");
    let restored = site.restore(&disk, &PointSpec::Lsn(lsn), Via::Server);
    assert!(restored == fs::read(&image).expect("image"), "the journal is not the disk");
}

#[test]
fn what_went_through_tls_and_io_uring_is_restored() {
    what_is_written_is_restored(false);
}

#[test]
fn what_went_through_tls_and_plain_calls_is_restored() {
    what_is_written_is_restored(true);
}

/// Waits until a program's log says that, behind what it had said before.
fn says(process: &Process, before: usize, what: &str) {
    wait_for(&format!("the log to say '{what}'"), || {
        process.log().get(before..).is_some_and(|log| log.contains(what)).then_some(())
    });
}

#[test]
fn whoever_cannot_be_sure_of_the_other_says_what_to_do_and_loses_nothing() {
    let (authority, other) = (Authority::new(), Authority::new());
    let mut site = site(&authority, &[]);
    let (mut qemu, disk, image) = protected(&site, "doubtful");
    let good = agent_flags(&authority);
    let foreign = agent_flags(&other);
    let (ca, other_ca) = (authority.ca(), other.ca());
    let no_cert = ["--tls-ca", &ca];
    let unknown_ca = ["--tls-ca", &other_ca];
    let wrong_name = [&words(&good)[..], &["--tls-server-name", "elsewhere.example"]].concat();
    let foreign_cert = [&["--tls-ca", &ca][..], &words(&foreign[2..])].concat();
    let cases: [(&[&str], &str, &str); 5] = [
        (&[], "it speaks TLS: give the agent --tls-ca", "does not speak TLS: give the agent --tls-ca"),
        (&no_cert, "give the agent --tls-cert", "give the agent --tls-cert and --tls-key of --tls-client-ca"),
        (&unknown_ca, "that signed the server's as --tls-ca", "the agent's log may say more"),
        (&wrong_name, "give --tls-server-name", "the agent's log may say more"),
        (&foreign_cert, "of the server's --tls-client-ca", "give the agent a certificate of --tls-client-ca"),
    ];
    for (number, (arguments, of_agent, of_server)) in (1..).zip(cases) {
        site.agent.kill();
        let (agent, server) = (site.agent.log().len(), site.server.log().len());
        site.restart_agent_with(arguments);
        says(&site.agent, agent, of_agent);
        says(&site.server, server, of_server);
        qemu.io(&[&format!("write -P {number} {number}M 64k")]);
    }
    site.agent.kill();
    site.restart_agent_with(&words(&good));
    site.wait_for_phase(&disk, ProtectionPhase::Protected);
    let lsn = site.bookmark(&disk, "all of it");
    let restored = site.restore(&disk, &PointSpec::Lsn(lsn), Via::Server);
    assert!(restored == fs::read(&image).expect("image"), "what was written meanwhile is in history");
}

#[test]
fn an_agent_that_wants_tls_says_nothing_to_a_server_without_it() {
    let authority = Authority::new();
    let site = Site::start_with_agent(&["--tls-ca", &authority.ca()]);
    says(&site.agent, 0, "has the server --tls-cert and --tls-key?");
    says(&site.server, 0, "the agent speaks TLS and this server does not: give the server --tls-cert");
}

/// A connection that shakes no hands, or half of one, is a stranger's: it is cut off, and agents come and go.
#[test]
fn silence_and_garbage_on_a_tls_port_keep_no_agent_out() {
    let authority = Authority::new();
    let server = server_flags(&authority);
    let mut site = Site::start_with_both(&words(&agent_flags(&authority)), &words(&server));
    let connect = || TcpStream::connect(site.data()).expect("a connection");
    let silent: Vec<TcpStream> = (0..150).map(|_| connect()).collect();
    let mut broken = connect();
    broken.write_all(&[&[0x16, 3, 1, 2, 0][..], &[0xff; 512]].concat()).expect("taken");
    let _end = broken.read_to_end(&mut Vec::new());
    let mut half = connect();
    half.write_all(&[0x16, 3, 1, 2, 0, 1]).expect("taken");
    half.shutdown(Shutdown::Write).expect("open");
    let before = site.agent.log().len();
    site.agent.kill();
    site.restart_agent();
    says(&site.agent, before, "tls=true");
    drop(silent);
}

/// As one that closes its connection: not somebody who has fallen silent, and is waited for.
#[test]
fn a_session_that_is_closed_inside_an_open_connection_has_ended() {
    let authority = Authority::new();
    let [cert, key] = authority.issue(HOST);
    let site =
        Site::start_with_both(&["--tls-ca", &authority.ca()], &["--tls-cert", &cert, "--tls-key", &key]);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.ca()).expect("a file")).expect("an authority");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = HOST.try_into().expect("a name");
    let mut session = ClientConnection::new(Arc::new(config), name).expect("a session");
    let mut stream = TcpStream::connect(site.data()).expect("a connection");
    session.complete_io(&mut stream).expect("shakes hands");
    let before = site.server.log().len();
    session.send_close_notify();
    session.complete_io(&mut stream).expect("sends");
    says(&site.server, before, "closed before it said anything");
}

#[test]
fn files_that_are_no_good_are_said_at_the_start() {
    let authority = Authority::new();
    let ([cert, key], [_, other_key]) = (authority.issue(HOST), authority.issue("other"));
    let (ca, store) = (authority.ca(), tempfile::tempdir().expect("a directory"));
    let garbage = store.path().join("garbage.pem").display().to_string();
    fs::write(&garbage, "nonsense").expect("a file");
    let missing = store.path().join("missing.pem").display().to_string();
    let folder = store.path().join("store").display().to_string();
    let server = ["--store", &folder, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let socket = store.path().join("agent.sock").display().to_string();
    let agent = ["--socket", &socket, "--spool-mib", "0", "--server", "127.0.0.1:1"];
    let cases: [(&str, &[&str], &str); 12] = [
        ("cdp-server", &["--tls-cert", &cert], "both --tls-cert and --tls-key"),
        ("cdp-server", &["--tls-client-ca", &ca], "both --tls-cert and --tls-key"),
        ("cdp-server", &["--tls-cert", &missing, "--tls-key", &key], "missing.pem"),
        ("cdp-server", &["--tls-cert", &garbage, "--tls-key", &key], "BEGIN CERTIFICATE"),
        ("cdp-server", &["--tls-cert", &cert, "--tls-key", &garbage], "BEGIN PRIVATE KEY"),
        ("cdp-server", &["--tls-cert", &cert, "--tls-key", &other_key], "the key that belongs to it"),
        ("cdp-server", &["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &garbage], "garbage.pem"),
        ("cdp-agent", &["--tls-ca", &missing], "missing.pem"),
        ("cdp-agent", &["--tls-ca", &ca, "--tls-cert", &cert], "both --tls-cert and --tls-key"),
        ("cdp-agent", &["--tls-cert", &cert, "--tls-key", &key], "without --tls-ca"),
        ("cdp-agent", &["--tls-ca", &ca, "--tls-server-name", "a b"], "a host's name"),
        ("cdp-agent", &["--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &other_key], "belongs to it"),
    ];
    for (name, flags, hint) in cases {
        let base = if name == "cdp-server" { &server[..] } else { &agent[..] };
        let ended = Command::new(program(name)).args(base).args(flags).output().expect("runs");
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(2), "{name} {flags:?}: {said}");
        assert!(said.contains(hint), "{name} {flags:?}: no '{hint}' in: {said}");
    }
    let unix = ["--server", "unix:/run/x.sock", "--tls-ca", &ca];
    let ended = Command::new(program("cdp-agent")).args(unix).output().expect("runs");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("TLS is for HOST:PORT"), "{ended:?}");
}
