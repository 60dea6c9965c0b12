//! `/v1/disks/{disk}/points`.

#![allow(unused_qualifications, reason = "the OpenAPI macro qualifies the query types")]

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use cdp_api::{PointSpec, Points, Problem, ResolvedPoint};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use utoipa::IntoParams;

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::limits::COVER_TIMEOUT;
use crate::resolve::{self, Answer};
use crate::rest::extract::{ApiQuery, DiskName};
use crate::rest::problem::{ApiError, journal};
use crate::rest::reading;

/// How often a question that waits looks again.
const POLL: Duration = Duration::from_millis(25);

/// Query of `points`.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct PointsQuery {
    /// A point in time to resolve: lsn:N, bookmark:NAME, latest, RFC 3339, a local time of the server, or how long
    /// ago, such as -5m. A time to the second means the start of that second.
    at: Option<String>,
}

/// What of the disk can be restored: ranges, gaps, bookmarks; and with `at` what that point resolves to.
///
/// A time newer than the newest record of a disk that is being captured waits up to two seconds, until the host has
/// said that everything before it has arrived.
#[utoipa::path(get, path = "/v1/disks/{disk}/points", tag = "points", operation_id = "get_points", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
    PointsQuery,
), responses(
    (status = 200, description = "The points", body = Points),
    (status = 409, description = "`at` is in a gap or out of range; `before` and `after` are the nearest good points",
     body = Problem, content_type = "application/problem+json"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn show(
    State(core): State<Arc<Core>>,
    disk: DiskName,
    ApiQuery(query): ApiQuery<PointsQuery>,
) -> Result<Json<Points>, ApiError> {
    let row = reading(&core, move |core| disk.find(core)).await?;
    let resolved = match query.at {
        Some(at) => Some(resolve_waiting(&core, &row, resolve::parse(&at, core.now_ns())?).await?),
        None => None,
    };
    reading(&core, move |core| {
        let disk = match core.faults.of(row.id) {
            // Of a journal that cannot be opened nobody can say that it has no points.
            Some(_) => Some(journal(core, row.id)?),
            None => core.store.disk(row.id),
        };
        let points = resolve::points(&row, disk.as_deref());
        Ok(Json(Points { resolved, ..points }))
    })
    .await
}

/// Resolves a point; where more may be on its way, waits for it a little.
pub(crate) async fn resolve_waiting(
    core: &Arc<Core>,
    row: &DiskRow,
    spec: PointSpec,
) -> Result<ResolvedPoint, ApiError> {
    let deadline = Instant::now() + COVER_TIMEOUT;
    loop {
        let (id, spec) = (row.id, spec.clone());
        let answer = reading(core, move |core| {
            let disk = journal(core, id)?;
            resolve::resolve(core, &disk, &spec)
        })
        .await?;
        match answer {
            Answer::Is(point) => return Ok(point),
            Answer::NotYet(point) if Instant::now() >= deadline => return Ok(point),
            Answer::NotYet(_) => sleep(POLL).await,
        }
    }
}
