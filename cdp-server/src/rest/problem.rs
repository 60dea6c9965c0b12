//! Every error that REST answers, as `application/problem+json`.

use std::any::Any;
use std::sync::Arc;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cdp_api::problem::PROBLEM_JSON;
use cdp_api::{FaultKind, Kind, Problem};

use journal_format::DiskId;
use journal_store::{DiskStore, StoreError};

use crate::core::Core;
use crate::error::ServerError;

/// A problem on its way out.
#[derive(Debug)]
pub(crate) struct ApiError(pub(crate) Box<Problem>);

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self(Box::new(problem))
    }
}

impl From<ServerError> for ApiError {
    fn from(error: ServerError) -> Self {
        from_server_error(&error).into()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&*self.0).unwrap_or_default();
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON))];
        (status, kind, body).into_response()
    }
}

/// A fault of the server or its disks. Logged here, because nobody above can do more about it.
pub(crate) fn from_server_error(error: &ServerError) -> Problem {
    tracing::error!(%error, "a REST request failed");
    match error {
        ServerError::Store(error) => problem_of(error),
        ServerError::Stopping => {
            Problem::new(Kind::Unavailable, error.to_string(), "try again once it is back")
        }
        _ => Problem::new(Kind::Internal, error.to_string(), "see the server's log, and report it as a bug"),
    }
}

pub(crate) fn agent_refused(reason: &str) -> Problem {
    Problem::new(
        Kind::AgentRefused,
        format!("the host's agent refuses: {reason}"),
        "do what the reason says; the agent's log on the host may say more",
    )
}

pub(crate) fn bad_request(detail: impl Into<String>) -> Problem {
    Problem::new(Kind::BadRequest, detail, "see /v1/openapi.json for what the request takes")
}

/// Answer of every address that is none.
pub(crate) async fn not_found(uri: axum::http::Uri) -> ApiError {
    Problem::new(
        Kind::NotFound,
        format!("there is nothing at {}", uri.path()),
        "see /v1/openapi.json; in a disk's name, write / once between VM and device, other slashes as %2F",
    )
    .into()
}

/// Answer of an address that is asked in a way it does not know.
pub(crate) async fn method_not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    Problem::new(
        Kind::MethodNotAllowed,
        format!("{} does not know {method}", uri.path()),
        "see /v1/openapi.json for the methods it knows",
    )
    .into()
}

/// Answer of a handler that panicked.
pub(crate) fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    let problem = Problem::new(
        Kind::Internal,
        "the request hit a fault of the server",
        "the server goes on; report it as a bug with the server's log",
    );
    ApiError::from(problem).into_response()
}

/// The disk's journal; or why there is none to read.
pub(crate) fn journal(core: &Core, id: DiskId) -> Result<Arc<DiskStore>, ApiError> {
    core.store.disk(id).ok_or_else(|| match core.faults.of(id) {
        Some(fault) => {
            let kind = if fault.kind == FaultKind::Damaged { Kind::Damaged } else { Kind::StoreFailed };
            Problem::new(kind, fault.message, fault.hint).into()
        }
        None => no_journal(id).into(),
    })
}

fn no_journal(id: DiskId) -> Problem {
    Problem::new(
        Kind::NoJournal,
        format!("disk {id} has no journal"),
        "switch protection on (cdpctl protect), and wait for the first record",
    )
}

/// The store cannot do it. Logged here, because nobody above can do more about it.
pub(crate) fn store_failed(error: &StoreError) -> Problem {
    tracing::error!(%error, "a REST request failed");
    problem_of(error)
}

fn problem_of(error: &StoreError) -> Problem {
    match error {
        StoreError::Damaged { .. } => Problem::new(
            Kind::Damaged,
            error.to_string(),
            "points that do not need it can be restored; cdpctl verify shows everything that is damaged",
        ),
        _ => Problem::new(
            Kind::StoreFailed,
            error.to_string(),
            "check the store's disk (full, read-only, broken) and the server's log",
        ),
    }
}
