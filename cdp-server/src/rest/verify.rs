//! `/v1/disks/{disk}/verify`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cdp_api::{Kind, Problem, Verification};

use crate::checks;
use crate::core::Core;
use crate::rest::extract::DiskName;
use crate::rest::problem::{ApiError, journal};
use crate::rest::reading;

/// Begins a check of everything that the disk's journal holds: every byte of data, records and indexes.
///
/// It runs in the background, one disk at a time; ask with GET how far it is. While one is under way, asking for another
/// gives that one. A check that found damage sets the disk's `fault`, one that found none takes it away.
#[utoipa::path(post, path = "/v1/disks/{disk}/verify", tag = "disks", operation_id = "start_verification", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), responses(
    (status = 202, description = "It has begun, or was under way", body = Verification),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn start(
    State(core): State<Arc<Core>>,
    disk: DiskName,
) -> Result<(StatusCode, Json<Verification>), ApiError> {
    reading(&core, move |core| {
        let disk = journal(core, disk.find(core)?.id)?;
        Ok((StatusCode::ACCEPTED, Json(checks::start(core, disk)?)))
    })
    .await
}

/// The last check of the disk's journal since the server started: how far it is, and what it found.
#[utoipa::path(get, path = "/v1/disks/{disk}/verify", tag = "disks", operation_id = "get_verification", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), responses(
    (status = 200, description = "The check", body = Verification),
    (status = 404, description = "No check was begun since the server started", body = Problem,
     content_type = "application/problem+json"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn show(
    State(core): State<Arc<Core>>,
    disk: DiskName,
) -> Result<Json<Verification>, ApiError> {
    reading(&core, move |core| {
        let id = disk.find(core)?.id;
        let none = || {
            let detail = format!("disk {id} was not checked since the server started");
            Problem::new(Kind::NotFound, detail, "begin a check with POST (cdpctl verify)")
        };
        Ok(Json(core.checks.of(id).ok_or_else(none)?))
    })
    .await
}
