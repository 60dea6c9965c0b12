//! What requests carry: the disk in the path, query, JSON body. Each failure is a problem, not axum's plain text.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use cdp_api::{Kind, Problem};
use journal_format::DiskId;
use serde::de::DeserializeOwned;

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::rest::problem::{ApiError, bad_request};

/// `{disk}` of the path: a UUID or `vm/device`, as one percent-encoded segment or as two.
#[derive(Clone, Debug)]
pub(crate) struct DiskName(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for DiskName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state).await;
        let params = params.map_err(|e| bad_request(e.to_string()))?;
        let segments: Vec<_> = params.iter().map(|(_, value)| value).collect();
        Ok(Self(segments.join("/")))
    }
}

impl DiskName {
    /// The disk with that name. Blocks on the catalog.
    pub(crate) fn find(&self, core: &Core) -> Result<DiskRow, ApiError> {
        if let Ok(id) = self.0.parse::<DiskId>()
            && let Some(row) = core.catalog.disk(id)?
        {
            return Ok(row);
        }
        let mut rows = core.catalog.disks_named(&self.0)?;
        match rows.len() {
            1 => Ok(rows.remove(0)),
            0 => Err(Problem::new(
                Kind::NoSuchDisk,
                format!("no disk is called '{}'", self.0),
                "GET /v1/disks (cdpctl disk list) shows them; a disk is named by its UUID or as vm/device",
            )
            .into()),
            _ => Err(ambiguous(core, &self.0, &rows).into()),
        }
    }
}

fn ambiguous(core: &Core, name: &str, rows: &[DiskRow]) -> Problem {
    let each = |row: &DiskRow| {
        let runs =
            if core.fleet.live(row.id, Instant::now()).is_some() { "runs now" } else { "does not run" };
        format!("{} on host {} ({runs})", row.id, row.host_name)
    };
    let all = rows.iter().map(each).collect::<Vec<_>>().join(", ");
    let hint = "use the UUID of the one you mean";
    Problem::new(Kind::AmbiguousDisk, format!("several disks are called '{name}': {all}"), hint)
}

/// A query that fits `T`.
#[derive(Clone, Debug)]
pub(crate) struct ApiQuery<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = Query::try_from_uri(&parts.uri).map_err(|e| bad_request(e.body_text()))?;
        Ok(Self(query.0))
    }
}

/// A JSON body that fits `T`.
///
/// The media type has to be JSON: a web page of another site can make a browser send a form or plain text here, but
/// not JSON.
#[derive(Clone, Debug)]
pub(crate) struct ApiJson<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<Core>> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<Core>) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(Problem::new(
                Kind::UnsupportedMediaType,
                "the body's media type is not JSON",
                "send the header Content-Type: application/json",
            )
            .into());
        }
        let body = Bytes::from_request(request, state).await.map_err(|e| bad_request(e.body_text()))?;
        let value = serde_json::from_slice(&body).map_err(|e| bad_request(format!("the body: {e}")))?;
        Ok(Self(value))
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}
