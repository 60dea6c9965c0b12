//! TLS 1.3 between agent and server: what either reads from files, and what a failure means.
//!
//! One provider of cryptography (aws-lc-rs), handed over explicitly: nothing depends on what a process has installed.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error, RootCertStore, ServerConfig};

/// A certificate (with the chain up to its authority's) and its key, in PEM files.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// The certificate's file.
    pub cert: &'a Path,
    /// The key's file.
    pub key: &'a Path,
}

/// What a server shows, and whom it lets in: anybody, or whoever shows a certificate of the authorities in `client_ca`.
///
/// # Errors
/// Which file is no good, and what to do.
pub fn server(identity: Identity<'_>, client_ca: Option<&Path>) -> Result<Arc<ServerConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder =
        builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(path)?), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| error.to_string())?)
        }
    };
    let (certs, key) = read(identity)?;
    let mut config = builder.with_single_cert(certs, key).map_err(|error| mismatch(identity, &error))?;
    // Connections are few and last: resuming one would save nothing, and not look at certificates again.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Whom a client trusts, and what it shows if it is asked.
///
/// # Errors
/// Which file is no good, and what to do.
pub fn client(ca: &Path, identity: Option<Identity<'_>>) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder =
        builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(|error| error.to_string())?;
    let builder = builder.with_root_certificates(authorities(ca)?);
    let Some(identity) = identity else { return Ok(Arc::new(builder.with_no_client_auth())) };
    let (certs, key) = read(identity)?;
    builder.with_client_auth_cert(certs, key).map(Arc::new).map_err(|error| mismatch(identity, &error))
}

fn read(identity: Identity<'_>) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    let key = PrivateKeyDer::from_pem_file(identity.key)
        .map_err(|error| bad(identity.key, &error, "a private key, as BEGIN PRIVATE KEY"))?;
    Ok((certificates(identity.cert)?, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    const WANTED: &str = "certificates, as BEGIN CERTIFICATE";
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.map_err(|error| bad(path, &error, WANTED))?;
    if found.is_empty() {
        return Err(bad(path, &rustls::pki_types::pem::Error::NoItemsFound, WANTED));
    }
    Ok(found)
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(path)? {
        roots
            .add(cert)
            .map_err(|error| format!("{}: {error}: give the authority's certificate", path.display()))?;
    }
    Ok(roots)
}

fn bad(path: &Path, error: &rustls::pki_types::pem::Error, wanted: &str) -> String {
    use rustls::pki_types::pem::Error as Pem;
    match error {
        Pem::Io(error) => format!("cannot read {}: {error}; check the path and its mode", path.display()),
        Pem::NoItemsFound => format!("{} has no such thing: give a PEM file with {wanted}", path.display()),
        other => format!("{}: {other}: give a PEM file with {wanted}", path.display()),
    }
}

fn mismatch(identity: Identity<'_>, error: &Error) -> String {
    let (cert, key) = (identity.cert.display(), identity.key.display());
    format!("{cert} and {key}: {error}: give a certificate and the key that belongs to it")
}

/// Why an agent's connection failed, and what to do.
#[must_use]
pub fn why_no_server(error: &Error) -> io::Error {
    use AlertDescription as Alert;
    use CertificateError as Cert;
    let hint = match error {
        Error::InvalidCertificate(Cert::NotValidForName | Cert::NotValidForNameContext { .. }) => {
            "give --tls-server-name with a name that is in the server's certificate"
        }
        Error::InvalidCertificate(Cert::UnknownIssuer | Cert::BadSignature) => {
            "give the certificate of the authority that signed the server's as --tls-ca"
        }
        Error::InvalidCertificate(_) => "give the server another certificate",
        Error::InvalidMessage(_) => {
            "the server does not speak TLS there: give it --tls-cert and --tls-key, or the agent no --tls-ca"
        }
        Error::AlertReceived(
            Alert::CertificateRequired
            | Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::DecryptError,
        ) => "give the agent --tls-cert and --tls-key of the server's --tls-client-ca",
        _ => "the server's log may say more",
    };
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}; {hint}"))
}

/// Why an agent was turned away, and what to do.
#[must_use]
pub fn why_no_agent(error: &Error) -> io::Error {
    use CertificateError as Cert;
    let hint = match error {
        Error::NoCertificatesPresented => "give the agent --tls-cert and --tls-key of --tls-client-ca",
        Error::InvalidCertificate(Cert::UnknownIssuer | Cert::BadSignature) => {
            "give the agent a certificate of --tls-client-ca"
        }
        Error::InvalidCertificate(_) => "give the agent another certificate",
        Error::InvalidMessage(_) => "it does not speak TLS: give the agent --tls-ca",
        _ => "the agent's log may say more",
    };
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}; {hint}"))
}
