//! `/healthz`, `/metrics` and `/v1/openapi.json`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use cdp_api::{Kind, Problem};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::core::Core;
use crate::describe;
use crate::metrics::{self, Sample};
use crate::rest::problem::ApiError;
use crate::rest::reading;

/// The server answers and reads its catalog.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`; `degraded` while the journals of some disks take no writes or are damaged.
    status: String,
    /// How many disks have a fault; GET /v1/disks says which and why.
    faults: usize,
    /// The drill that is under way (`--drill`); absent when nothing fails on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drill: Option<String>,
    /// The server's version.
    version: String,
    /// Connected agents.
    agents: usize,
}

/// Whether the server works.
#[utoipa::path(get, path = "/healthz", tag = "service", operation_id = "health", responses(
    (status = 200, description = "It works", body = Health),
    (status = "default", description = "It does not", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn health(State(core): State<Arc<Core>>) -> Result<Json<Health>, ApiError> {
    reading(&core, |core| {
        core.catalog.disks()?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let faults = core.faults.count();
        let status = if faults == 0 { "ok" } else { "degraded" }.to_owned();
        let (drill, agents) = (core.drill.clone(), core.fleet.agents());
        Ok(Json(Health { status, faults, drill, version, agents }))
    })
    .await
}

/// Lag, ring fill, ingest and sizes, per disk, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "service", operation_id = "metrics", responses(
    (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn metrics(State(core): State<Arc<Core>>) -> Result<Response, ApiError> {
    let text = reading(&core, |core| {
        let mut samples = Vec::new();
        for row in core.catalog.disks()? {
            samples.push(Sample { disk: describe::disk(core, &row)?, ingested: core.counters.of(row.id) });
        }
        let failed = |_| Problem::new(Kind::Internal, "the metrics do not encode", "report it as a bug");
        Ok(metrics::encode(&samples, core.fleet.agents(), core.drill.is_some()).map_err(failed)?)
    })
    .await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// The text of the committed document, so that what is served is what was reviewed.
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], super::OPENAPI_JSON).into_response()
}
