//! A blocking client of the API.

use std::time::Duration;

use jiff::Zoned;
use reqwest::blocking::{Client as Http, RequestBuilder, Response};
use serde::de::DeserializeOwned;

use crate::point_spec::PointSpec;
use crate::problem::{Kind, Problem};
use crate::types::{
    Bookmark, CreateBookmark, Disk, DiskSummary, Extents, Points, Protection, ProtectionState, ResolvedPoint,
};

/// Longest wait for an answer. Switching protection may wait for the agent, which has its own, shorter limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered with an error.
    #[error("{0}")]
    Problem(Box<Problem>),
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

    /// What to do next, for people.
    #[must_use]
    pub fn hint(&self) -> &str {
        match self {
            Self::Problem(problem) => &problem.hint,
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
    /// `Transport` when the HTTP client cannot be set up.
    pub fn new(base: &str) -> Result<Self, ClientError> {
        let base = base.trim_end_matches('/').to_owned();
        let http =
            Http::builder().timeout(REQUEST_TIMEOUT).connect_timeout(CONNECT_TIMEOUT).no_proxy().build();
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
        self.json(self.http.put(self.disk_url(disk, "/protection")).json(&Protection { enabled }))
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
        let bytes = response.bytes().map_err(|source| self.transport(source))?;
        if bytes.len() as u64 != length {
            return Err(self.answer("data", "another number of bytes than was asked for"));
        }
        Ok(bytes.into())
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

    fn answer(&self, what: &str, detail: &str) -> ClientError {
        ClientError::Answer { url: self.base.clone(), detail: format!("{what}: {detail}") }
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
    use super::*;

    #[test]
    fn a_disk_name_stays_one_segment() {
        assert_eq!(encode_segment("vm 1/disk?0"), "vm%201%2Fdisk%3F0");
        assert_eq!(encode_segment(".."), "%2E%2E");
        assert_eq!(encode_segment("é"), "%C3%A9");
    }
}
