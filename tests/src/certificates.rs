//! An authority, and certificates of it, in PEM files.

use std::fs;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// Signs certificates. Its files go with it.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// A new one, whom nobody knows yet.
    ///
    /// # Panics
    /// When its key or files cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer =
            CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed");
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("ca.pem"), issuer.pem()).expect("a file");
        Self { issuer, directory }
    }

    /// The file with its own certificate.
    #[must_use]
    pub fn ca(&self) -> String {
        self.path("ca.pem")
    }

    /// The files of a certificate and its key for a host of that name or address.
    ///
    /// # Panics
    /// When they cannot be made.
    #[must_use]
    pub fn issue(&self, host: &str) -> [String; 2] {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        let cert = params.signed_by(&key, &self.issuer).expect("signed");
        let [cert_path, key_path] = ["crt", "key"].map(|suffix| self.path(&format!("{host}.{suffix}")));
        fs::write(&cert_path, cert.pem()).expect("a file");
        fs::write(&key_path, key.serialize_pem()).expect("a file");
        [cert_path, key_path]
    }

    fn path(&self, name: &str) -> String {
        let path: &Path = self.directory.path();
        path.join(name).display().to_string()
    }
}
