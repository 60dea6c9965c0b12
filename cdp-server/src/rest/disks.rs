//! `/v1/disks` and `/v1/disks/{disk}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cdp_api::{Disk, DiskSummary, Problem};

use crate::core::Core;
use crate::describe;
use crate::rest::extract::DiskName;
use crate::rest::problem::ApiError;
use crate::rest::reading;

/// All disks, protected or not, in order of VM and device.
#[utoipa::path(get, path = "/v1/disks", tag = "disks", operation_id = "list_disks", responses(
    (status = 200, description = "The disks", body = Vec<DiskSummary>),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn list(State(core): State<Arc<Core>>) -> Result<Json<Vec<DiskSummary>>, ApiError> {
    reading(&core, |core| {
        let disks = core.catalog.disks()?;
        let disks = disks.iter().map(|row| describe::disk(core, row).map(|disk| disk.summary));
        Ok(Json(disks.collect::<Result<_, _>>()?))
    })
    .await
}

/// One disk with all that is known of it.
#[utoipa::path(get, path = "/v1/disks/{disk}", tag = "disks", operation_id = "get_disk", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), responses(
    (status = 200, description = "The disk", body = Disk),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn show(State(core): State<Arc<Core>>, disk: DiskName) -> Result<Json<Disk>, ApiError> {
    reading(&core, move |core| Ok(Json(describe::disk(core, &disk.find(core)?)?))).await
}
