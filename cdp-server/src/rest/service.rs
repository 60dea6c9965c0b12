//! `/healthz`, `/metrics` and `/v1/openapi.json`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use cdp_api::{Kind, Problem};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::fleet::Mode;
use crate::metrics::{self, Sample};
use crate::rest::problem::ApiError;
use crate::rest::{blocking, reading};
use crate::{describe, faults};

/// Whether the server works, and what it should protect is protected.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`; `degraded` while any of the numbers below is not 0; `failing` while the catalog cannot be used.
    status: String,
    /// How many disks have a fault (their journal takes no writes or is damaged, or their host's spool fails); GET /v1/disks
    /// says which and why.
    faults: usize,
    /// How many disks that should be protected belong to hosts whose agents are not connected.
    offline: usize,
    /// How many disks that should be protected are not, although their VMs run: capture has not begun, or the ring was full.
    unprotected: usize,
    /// What is wrong with the catalog; absent when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    catalog: Option<String>,
    /// The drill that is under way (`--drill`); absent when nothing fails on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drill: Option<String>,
    /// The server's version.
    version: String,
    /// Connected agents.
    agents: usize,
}

impl Health {
    fn of(core: &Core) -> Self {
        let (version, now) = (env!("CARGO_PKG_VERSION").to_owned(), Instant::now());
        let (drill, agents) = (core.drill.clone(), core.fleet.agents());
        let mut this = Self { drill, version, agents, ..Self::default() };
        let disks = core.catalog.check().and_then(|()| core.catalog.disks());
        match disks {
            Ok(disks) => disks.iter().for_each(|disk| this.count(core, disk, now)),
            Err(error) => this.catalog = Some(error.to_string()),
        }
        let is_whole = this.faults + this.offline + this.unprotected == 0;
        this.status = match (&this.catalog, is_whole) {
            (Some(_), _) => "failing",
            (None, false) => "degraded",
            (None, true) => "ok",
        }
        .to_owned();
        this
    }

    fn count(&mut self, core: &Core, disk: &DiskRow, now: Instant) {
        let live = core.fleet.live(disk.id, now);
        if core.faults.of(disk.id).is_some() || live.as_ref().and_then(faults::spool).is_some() {
            self.faults += 1;
        }
        if disk.protect != Some(true) {
            return;
        }
        match live {
            Some(live) if live.fresh && live.mode == Mode::Capturing => {}
            Some(_) => self.unprotected += 1,
            None if !disk.host.is_some_and(|host| core.fleet.has_agent(host)) => self.offline += 1,
            // The disk may have become another one, under another name.
            None if disk.host.is_some_and(|host| core.fleet.vm_runs(host, &disk.vm)) => self.unprotected += 1,
            // A VM that does not run needs no protection.
            None => {}
        }
    }
}

/// Whether the server works, and protects what it should: 503 only when the server itself does not work, which `failing` means.
#[utoipa::path(get, path = "/healthz", tag = "service", operation_id = "health", responses(
    (status = 200, description = "It works; the status is ok or degraded", body = Health),
    (status = 503, description = "Its catalog cannot be used; the status is failing", body = Health),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn health(State(core): State<Arc<Core>>) -> Result<(StatusCode, Json<Health>), ApiError> {
    // Not behind those who read the store: that may hang.
    let health = blocking(&core, |core| Ok(Health::of(core))).await?;
    let code = if health.catalog.is_some() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    Ok((code, Json(health)))
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
