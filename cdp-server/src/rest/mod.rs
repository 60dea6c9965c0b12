//! REST under `/v1`: routes, and what all requests have in common.
//!
//! Handlers run on the async runtime and never touch catalog or store there: what blocks goes through `reading`,
//! to the blocking pool, a bounded number at a time.

mod bookmarks;
mod contents;
mod disks;
mod extract;
mod points;
pub(crate) mod problem;
mod protection;
mod service;
mod verify;

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use cdp_api::{Kind, Problem};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Document;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::core::Core;
use crate::rest::problem::ApiError;

/// The committed OpenAPI document. A test compares it with [`document`].
const OPENAPI_JSON: &str = include_str!("../../../docs/openapi.json");

#[derive(OpenApi)]
#[openapi(info(
    title = "qemu-cdp",
    description = "Continuous data protection for QEMU disks. A disk is named by its UUID or as vm/device; a point in \
                   time is lsn:N, bookmark:NAME, latest, RFC 3339, a local time of the server, or relative such as -5m.",
    license(name = "MIT OR Apache-2.0"),
))]
struct Api;

fn documented() -> OpenApiRouter<Arc<Core>> {
    OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(disks::list))
        .routes(routes!(disks::show))
        .routes(routes!(protection::show, protection::put))
        .routes(routes!(points::show))
        .routes(routes!(bookmarks::create))
        .routes(routes!(contents::extents))
        .routes(routes!(contents::data))
        .routes(routes!(verify::start, verify::show))
        .routes(routes!(service::health))
        .routes(routes!(service::metrics))
}

/// The OpenAPI document as the code says it.
#[must_use]
pub fn document() -> Document {
    documented().split_for_parts().1
}

/// The router of the whole API.
pub(crate) fn router(core: Arc<Core>) -> Router {
    let (router, _) = documented().split_for_parts();
    router
        .route("/v1/openapi.json", get(service::openapi))
        .merge(two_segments())
        .fallback(problem::not_found)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(CatchPanicLayer::custom(problem::panicked))
        .with_state(core)
}

/// The same resources with `vm/device` written as two segments. OpenAPI knows no parameter of two segments, so they
/// are not in the document as addresses of their own. A device whose name is that of a resource (`points`, …) is
/// reached by its UUID, or with the slash as `%2F`.
fn two_segments() -> Router<Arc<Core>> {
    let disk = "/v1/disks/{disk}/{device}";
    let below = |resource: &str| format!("{disk}/{resource}");
    Router::new()
        .route(disk, get(disks::show))
        .route(&below("protection"), get(protection::show).put(protection::put))
        .route(&below("points"), get(points::show))
        .route(&below("bookmarks"), axum::routing::post(bookmarks::create))
        .route(&below("extents"), get(contents::extents))
        .route(&below("data"), get(contents::data))
        .route(&below("verify"), get(verify::show).post(verify::start))
}

/// Runs what blocks on catalog or store, off the async runtime.
async fn reading<T: Send + 'static>(
    core: &Arc<Core>,
    read: impl FnOnce(&Arc<Core>) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let stopping = |_| Problem::new(Kind::Unavailable, "the server is stopping", "try again once it is back");
    let permit = Arc::clone(&core.readers).acquire_owned().await.map_err(stopping)?;
    let read = move |core: &Arc<Core>| {
        let result = read(core);
        drop(permit);
        result
    };
    blocking(core, read).await
}

/// As [`reading`], for what does not read the store and must not wait for those who do.
async fn blocking<T: Send + 'static>(
    core: &Arc<Core>,
    work: impl FnOnce(&Arc<Core>) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let core = Arc::clone(core);
    let task = tokio::task::spawn_blocking(move || work(&core));
    match task.await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "a REST request's task failed");
            Err(Problem::new(Kind::Internal, "the request hit a fault of the server", "report it as a bug")
                .into())
        }
    }
}
