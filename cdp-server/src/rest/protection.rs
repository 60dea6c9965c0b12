//! `/v1/disks/{disk}/protection`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cdp_api::{Problem, Protection, ProtectionState};

use crate::core::Core;
use crate::describe;
use crate::protection::{self, Outcome};
use crate::rest::extract::{ApiJson, DiskName};
use crate::rest::problem::ApiError;
use crate::rest::reading;

/// Whether the disk is to be protected, and whether it is.
#[utoipa::path(get, path = "/v1/disks/{disk}/protection", tag = "protection", operation_id = "get_protection", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), responses(
    (status = 200, description = "The state", body = ProtectionState),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn show(
    State(core): State<Arc<Core>>,
    disk: DiskName,
) -> Result<Json<ProtectionState>, ApiError> {
    reading(&core, move |core| Ok(Json(describe::disk(core, &disk.find(core)?)?.summary.protection))).await
}

/// Switches protection on or off and says how, also while the VM runs. Idempotent.
///
/// Policies change at once; the ring's size counts from the next capture on.
///
/// The wish is kept over restarts of guest, agent and server. Waits for the host's agent, at most 30 seconds.
#[utoipa::path(put, path = "/v1/disks/{disk}/protection", tag = "protection", operation_id = "put_protection", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), request_body = Protection, responses(
    (status = 200, description = "Done: capture runs and the initial sync has begun, or has ended", body = ProtectionState),
    (status = 202, description = "Kept, and carried out as soon as agent and VM are there; `reason` says what is missing",
     body = ProtectionState),
    (status = 422, description = "A value is out of its range (kind `bad-value`); nothing was changed", body = Problem,
     content_type = "application/problem+json"),
    (status = 409, description = "The agent cannot do it (kind `agent-refused`)", body = Problem,
     content_type = "application/problem+json"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn put(
    State(core): State<Arc<Core>>,
    disk: DiskName,
    ApiJson(wanted): ApiJson<Protection>,
) -> Result<(StatusCode, Json<ProtectionState>), ApiError> {
    let row = reading(&core, move |core| disk.find(core)).await?;
    let outcome = protection::set(&core, &row, &wanted).await?;
    let state = reading(&core, move |core| {
        let row = core.catalog.disk(row.id)?.unwrap_or(row);
        Ok(describe::disk(core, &row)?.summary.protection)
    })
    .await?;
    Ok(match outcome {
        Outcome::Done => (StatusCode::OK, Json(state)),
        Outcome::Pending(reason) => (StatusCode::ACCEPTED, Json(ProtectionState { reason, ..state })),
    })
}
