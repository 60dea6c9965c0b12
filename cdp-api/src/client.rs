//! A blocking client of the API.

use std::io::{self, Read};
use std::time::Duration;

use jiff::Zoned;
use reqwest::Url;
use reqwest::blocking::{Client as Http, RequestBuilder, Response};
use serde::de::DeserializeOwned;

use crate::point_spec::PointSpec;
use crate::problem::{Kind, Problem};
use crate::types::{
    Bookmark, CreateBookmark, Disk, DiskSummary, Extents, Points, Protection, ProtectionState, ResolvedPoint,
    Verification,
};

/// Longest wait for an answer; of a disk's contents, for the answer's begin and then for more of it. Switching protection may
/// wait for the agent, which has its own, shorter limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered with an error.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// What was given is no address of a server.
    #[error("{0}")]
    Address(String),
    /// The server could not be reached, or the connection broke.
    #[error("cannot reach the server at {url}: {source}")]
    Transport {
        /// The address that was tried.
        url: String,
        /// What the HTTP client says.
        source: reqwest::Error,
    },
    /// The answer is not what this API says.
    #[error("the server at {url} gave an answer that is not this API's: {detail}; is it a qemu-cdp server?")]
    Answer {
        /// The address that was tried.
        url: String,
        /// What is wrong with the answer.
        detail: String,
    },
}

impl ClientError {
    /// The server's problem, when it answered with one.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }

    /// What went wrong, for programs: of a problem its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Problem(problem) => problem.kind.as_str(),
            Self::Address(_) => "bad-address",
            Self::Transport { .. } => "server-not-reached",
            Self::Answer { .. } => "bad-answer",
        }
    }

    /// What to do next, for people.
    #[must_use]
    pub fn hint(&self) -> &str {
        match self {
            Self::Problem(problem) => &problem.hint,
            Self::Address(_) => "see --server, and CDP_SERVER in the environment",
            Self::Transport { .. } => "check that cdp-server runs, and --server (or CDP_SERVER)",
            Self::Answer { .. } => "check --server (or CDP_SERVER)",
        }
    }
}

/// A server. Cheap to clone; a call blocks the calling thread.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
    base: String,
}

impl Client {
    /// A client of the server at `base`, such as `http://127.0.0.1:7410`. Nothing is sent yet.
    ///
    /// # Errors
    /// `Address` when `base` is none; `Transport` when the HTTP client cannot be set up.
    pub fn new(base: &str) -> Result<Self, ClientError> {
        Self::waiting(base, REQUEST_TIMEOUT)
    }

    fn waiting(base: &str, timeout: Duration) -> Result<Self, ClientError> {
        let base = parse_server(base).map_err(ClientError::Address)?;
        let http = Http::builder().timeout(timeout).connect_timeout(CONNECT_TIMEOUT).no_proxy().build();
        let http = http.map_err(|source| ClientError::Transport { url: base.clone(), source })?;
        Ok(Self { http, base })
    }

    /// All disks, protected or not.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn disks(&self) -> Result<Vec<DiskSummary>, ClientError> {
        self.json(self.http.get(format!("{}/v1/disks", self.base)))
    }

    /// One disk, by UUID or `vm/device`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn disk(&self, disk: &str) -> Result<Disk, ClientError> {
        self.json(self.http.get(self.disk_url(disk, "")))
    }

    /// Switches protection on or off.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn set_protection(&self, disk: &str, enabled: bool) -> Result<ProtectionState, ClientError> {
        self.put_protection(disk, &Protection { enabled, ..Protection::default() })
    }

    /// Switches protection on or off and changes how the disk is protected.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn put_protection(
        &self,
        disk: &str,
        protection: &Protection,
    ) -> Result<ProtectionState, ClientError> {
        self.json(self.http.put(self.disk_url(disk, "/protection")).json(protection))
    }

    /// What can be restored.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn points(&self, disk: &str) -> Result<Points, ClientError> {
        self.json(self.http.get(self.disk_url(disk, "/points")))
    }

    /// What can be restored, and what `at` resolves to (in [`Points::resolved`]).
    ///
    /// # Errors
    /// See [`ClientError`]; a point that cannot be restored is a problem of kind `PointInGap` or `PointOutOfRange`.
    pub fn points_at(&self, disk: &str, at: &PointSpec) -> Result<Points, ClientError> {
        self.json(self.http.get(self.disk_url(disk, "/points")).query(&[("at", at.to_string())]))
    }

    /// What `at` resolves to.
    ///
    /// # Errors
    /// As [`Client::points_at`].
    pub fn resolve(&self, disk: &str, at: &PointSpec) -> Result<ResolvedPoint, ClientError> {
        let missing = || self.answer("points", "the resolved point is missing");
        self.points_at(disk, at)?.resolved.ok_or_else(missing)
    }

    /// Begins a check of everything that the disk's journal holds, unless one is under way.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn start_verification(&self, disk: &str) -> Result<Verification, ClientError> {
        self.json(self.http.post(self.disk_url(disk, "/verify")))
    }

    /// The last check of the disk's journal.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn verification(&self, disk: &str) -> Result<Verification, ClientError> {
        self.json(self.http.get(self.disk_url(disk, "/verify")))
    }

    /// Names a point: now, or one that exists.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn create_bookmark(
        &self,
        disk: &str,
        name: &str,
        at: Option<&PointSpec>,
    ) -> Result<Bookmark, ClientError> {
        let body = CreateBookmark { name: name.to_owned(), at: at.map(PointSpec::to_string) };
        self.json(self.http.post(self.disk_url(disk, "/bookmarks")).json(&body))
    }

    /// What `[offset, offset + length)` holds right after record `lsn`; the answer may stop earlier and say where.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn extents(&self, disk: &str, lsn: u64, offset: u64, length: u64) -> Result<Extents, ClientError> {
        let query = [("lsn", lsn), ("offset", offset), ("length", length)];
        self.json(self.http.get(self.disk_url(disk, "/extents")).query(&query))
    }

    /// The bytes `[offset, offset + length)` right after record `lsn`; at most [`crate::limits::MAX_DATA_BYTES`].
    ///
    /// # Errors
    /// See [`ClientError`]; an answer of another length is `Answer`.
    pub fn data(&self, disk: &str, lsn: u64, offset: u64, length: u64) -> Result<Vec<u8>, ClientError> {
        let query = [("lsn", lsn), ("offset", offset), ("length", length)];
        let response = self.send(self.http.get(self.disk_url(disk, "/data")).query(&query))?;
        let mut bytes = Vec::new();
        // Read by read, each of which may take the whole timeout: over a slow link so much takes minutes.
        let read = response.take(length.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|error| self.broken(error))?;
        if bytes.len() as u64 != length {
            return Err(self.answer("data", "another number of bytes than was asked for"));
        }
        Ok(bytes)
    }

    fn disk_url(&self, disk: &str, rest: &str) -> String {
        format!("{}/v1/disks/{}{rest}", self.base, encode_segment(disk))
    }

    fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request)?;
        let bytes = response.bytes().map_err(|source| self.transport(source))?;
        serde_json::from_slice(&bytes).map_err(|e| self.answer("json", &e.to_string()))
    }

    fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().map_err(|source| self.transport(source))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = response.bytes().map_err(|source| self.transport(source))?;
        match serde_json::from_slice::<Problem>(&bytes) {
            Ok(problem) => Err(ClientError::Problem(Box::new(problem))),
            Err(_) => Err(self.answer("problem", &format!("status {status}"))),
        }
    }

    fn transport(&self, source: reqwest::Error) -> ClientError {
        ClientError::Transport { url: self.base.clone(), source: source.without_url() }
    }

    /// An answer that ended in the middle. The HTTP client's errors are inside the system's when a body is read.
    fn broken(&self, error: io::Error) -> ClientError {
        match error.downcast::<reqwest::Error>() {
            Ok(source) => self.transport(source),
            Err(other) => self.answer("data", &other.to_string()),
        }
    }

    fn answer(&self, what: &str, detail: &str) -> ClientError {
        ClientError::Answer { url: self.base.clone(), detail: format!("{what}: {detail}") }
    }
}

/// Reads the address of a server as a user gives it, for use as a parser of arguments.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn parse_server(text: &str) -> Result<String, String> {
    let base = text.trim_end_matches('/');
    let bad = |what: &str| Err(format!("{what}; give http://HOST:PORT, such as http://127.0.0.1:7410"));
    let Some((scheme, rest)) = text.split_once("://") else {
        return match base.is_empty() || base.contains(['/', ' ']) {
            true => bad(&format!("'{text}' is no address of a server")),
            false => Err(format!("'{text}' lacks its scheme; give http://{base}")),
        };
    };
    if scheme != "http" {
        return bad(&format!("a server speaks http, not '{scheme}'"));
    }
    let url = Url::parse(base).ok().filter(|url| url.has_host() && !rest.starts_with('/'));
    match url {
        None => bad(&format!("'{text}' names no host, or its port is none")),
        Some(url) if url.query().is_some() || url.fragment().is_some() => {
            bad(&format!("'{text}' has more than an address"))
        }
        Some(_) => Ok(base.to_owned()),
    }
}

/// Reads the name of a disk as a user gives it, for use as a parser of arguments.
///
/// # Errors
/// A sentence that says what would be a name.
pub fn parse_disk(text: &str) -> Result<String, String> {
    let is_uuid = text.parse::<journal_format::DiskId>().is_ok();
    let is_pair = text.rsplit_once('/').is_some_and(|(vm, device)| !vm.is_empty() && !device.is_empty());
    match is_uuid || is_pair {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "'{text}' names no disk; give its UUID, or its VM and device such as web1/virtio-disk0"
        )),
    }
}

/// Reads a point where the user sits: local times are in this machine's time zone, and "ago" counts from its clock.
///
/// # Errors
/// A problem of kind `BadPoint`, as the server would give it.
pub fn parse_point(text: &str) -> Result<PointSpec, Box<Problem>> {
    PointSpec::parse(text, &Zoned::now()).map_err(|e| {
        Box::new(Problem::new(Kind::BadPoint, e.to_string(), "see --help for the forms of a point"))
    })
}

/// Percent-encodes one segment of a path, so that `vm/device` stays one.
fn encode_segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    // A segment of only dots would be taken for "here" or "up".
    if matches!(text, "." | "..") { out.replace('.', "%2E") } else { out }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;

    /// A server that answers each request with 8 bytes, one after each pause; `pause` of the request's number.
    fn trickling(pause: fn(usize) -> Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let answer = move |mut stream: TcpStream, number| {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request)?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\n")?;
            for byte in 0..8 {
                thread::sleep(pause(number));
                stream.write_all(&[byte])?;
            }
            Ok::<_, io::Error>(())
        };
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                // Who waits no longer has closed it.
                let _ = answer(stream.expect("a client"), number);
            }
        });
        format!("http://{address}")
    }

    #[test]
    fn contents_may_take_longer_than_any_wait_for_some_of_them() {
        let waits = Duration::from_secs(2);
        let server = trickling(|number| Duration::from_millis(if number == 0 { 400 } else { 5000 }));
        let client = Client::waiting(&server, waits).expect("a client");
        assert_eq!(client.data("d", 1, 0, 8).expect("3.2 s in all"), [0, 1, 2, 3, 4, 5, 6, 7]);
        let error = client.data("d", 1, 0, 8).expect_err("silent for longer than it waits");
        assert_eq!(error.kind(), "server-not-reached", "{error}");
    }

    #[test]
    fn what_is_no_address_says_what_to_write() {
        let instead = |text: &str| parse_server(text).expect_err(text);
        assert!(instead("127.0.0.1:7410").ends_with("give http://127.0.0.1:7410"));
        assert!(instead("localhost:7410").ends_with("give http://localhost:7410"));
        for text in
            ["ftp://x", "https://x", "http://", "http:///x", "", "/", "http://h:99999", "http://h/?a=b"]
        {
            assert!(instead(text).contains("give http://HOST:PORT"), "{text}: {}", instead(text));
        }
        for text in ["http://127.0.0.1:7410", "http://[::1]:7410/", "http://cdp.example.org/behind/a/proxy"] {
            assert_eq!(parse_server(text).as_deref(), Ok(text.trim_end_matches('/')));
        }
    }

    #[test]
    fn what_is_no_name_of_a_disk_is_refused() {
        for text in ["", "/", "web1", "web1/", "/disk0", "6a7d0a54-8a2c-4c0e-9d0b"] {
            assert!(parse_disk(text).expect_err(text).contains("UUID"), "{text}");
        }
        for text in ["web1/disk0", "a/b/c", "6a7d0a54-8a2c-4c0e-9d0b-1f2e3d4c5b6a"] {
            assert_eq!(parse_disk(text).as_deref(), Ok(text));
        }
    }

    #[test]
    fn a_disk_name_stays_one_segment() {
        assert_eq!(encode_segment("vm 1/disk?0"), "vm%201%2Fdisk%3F0");
        assert_eq!(encode_segment(".."), "%2E%2E");
        assert_eq!(encode_segment("é"), "%C3%A9");
    }
}
