//! `/v1/disks/{disk}/extents` and `/v1/disks/{disk}/data`: a disk's contents at a point, for restore.

#![allow(unused_qualifications, reason = "the OpenAPI macro qualifies the query types")]

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use cdp_api::limits::{MAX_DATA_BYTES, MAX_EXTENTS};
use cdp_api::{Extent, ExtentKind, Extents, Kind, Problem};
use journal_format::{ByteRange, Lsn};
use journal_store::View;
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use utoipa::IntoParams;

use crate::core::Core;
use crate::limits::ANSWER_TIMEOUT;
use crate::resolve;
use crate::rest::extract::{ApiQuery, DiskName};
use crate::rest::problem::{ApiError, bad_request, journal, store_failed};
use crate::rest::reading;

/// Query of `extents` and `data`.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct RangeQuery {
    /// The point: right after this record. `points?at=` resolves others to it.
    lsn: u64,
    /// First byte, in bytes from the start of the disk; 0 when absent.
    #[serde(default)]
    offset: u64,
    /// Length in bytes; to the end of the disk when absent.
    length: Option<u64>,
}

/// What a range of the disk holds at a point; what lies past its end is left out. Long answers stop early and say in `next_offset` where to ask again.
#[utoipa::path(get, path = "/v1/disks/{disk}/extents", tag = "contents", operation_id = "get_extents", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
    RangeQuery,
), responses(
    (status = 200, description = "The extents", body = Extents),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn extents(
    State(core): State<Arc<Core>>,
    disk: DiskName,
    ApiQuery(query): ApiQuery<RangeQuery>,
) -> Result<Json<Extents>, ApiError> {
    reading(&core, move |core| {
        let view = open(core, &disk, query)?;
        let range = range(&view, clamped(&view, query))?;
        let mut answer =
            Extents { lsn: query.lsn, disk_bytes: view.disk_bytes(), extents: Vec::new(), next_offset: None };
        for extent in view.extents(range).map_err(|e| store_failed(&e))? {
            let extent = extent.map_err(|e| store_failed(&e))?;
            if answer.extents.len() == MAX_EXTENTS {
                answer.next_offset = Some(extent.range.offset());
                break;
            }
            answer.extents.push(to_api(&extent));
        }
        Ok(Json(answer))
    })
    .await
}

/// The bytes of a range of the disk at a point, at most 16 MiB.
#[utoipa::path(get, path = "/v1/disks/{disk}/data", tag = "contents", operation_id = "get_data", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
    RangeQuery,
), responses(
    (status = 200, description = "The bytes", body = Vec<u8>, content_type = "application/octet-stream"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn data(
    State(core): State<Arc<Core>>,
    disk: DiskName,
    ApiQuery(query): ApiQuery<RangeQuery>,
) -> Result<Response, ApiError> {
    let length = query.length.unwrap_or(MAX_DATA_BYTES).min(MAX_DATA_BYTES);
    let place = Arc::clone(&core.answers).acquire_many_owned(u32::try_from(length).unwrap_or(u32::MAX));
    let place = match tokio::time::timeout(ANSWER_TIMEOUT, place).await {
        Ok(Ok(place)) => place,
        _ => return Err(crowded().into()),
    };
    let bytes = reading(&core, move |core| {
        let view = open(core, &disk, query)?;
        let range = range(&view, query)?;
        if range.length() > MAX_DATA_BYTES {
            return Err(
                bad_request(format!("{} bytes at once; at most {MAX_DATA_BYTES}", range.length())).into()
            );
        }
        let mut bytes = vec![0; usize::try_from(range.length()).unwrap_or(0)];
        view.read(range.offset(), &mut bytes).map_err(|error| {
            if let Some(id) = disk.find(core).ok().map(|row| row.id) {
                core.note(id, &error);
            }
            store_failed(&error)
        })?;
        Ok(bytes)
    })
    .await?;
    let bytes = Bytes::from_owner(Answer { bytes, _place: place });
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

/// Bytes that keep their place among [`crate::limits::MAX_ANSWER_BYTES`] until they are sent.
struct Answer {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn crowded() -> Problem {
    Problem::new(
        Kind::Unavailable,
        "too many answers wait for clients to take them",
        "try again; if it goes on, look for clients that ask for contents and do not read them",
    )
}

fn open(core: &Core, disk: &DiskName, query: RangeQuery) -> Result<View, ApiError> {
    let id = disk.find(core)?.id;
    let disk = journal(core, id)?;
    resolve::view(&disk, Lsn(query.lsn))
}

/// The range asked for; to the end of the disk where no length is given.
fn range(view: &View, query: RangeQuery) -> Result<ByteRange, ApiError> {
    let disk_bytes = view.disk_bytes();
    let length = query.length.unwrap_or_else(|| disk_bytes.saturating_sub(query.offset));
    ByteRange::new(query.offset, length).filter(|range| range.end() <= disk_bytes).ok_or_else(|| {
        bad_request(format!("{length} bytes from {} pass the end of the disk, {disk_bytes}", query.offset))
            .into()
    })
}

/// The part of the range asked for that is on the disk.
fn clamped(view: &View, query: RangeQuery) -> RangeQuery {
    let offset = query.offset.min(view.disk_bytes());
    let left = view.disk_bytes() - offset;
    RangeQuery { offset, length: Some(query.length.map_or(left, |length| length.min(left))), ..query }
}

fn to_api(extent: &journal_store::Extent) -> Extent {
    let kind = match extent.kind {
        journal_store::ExtentKind::Data => ExtentKind::Data,
        journal_store::ExtentKind::Zero => ExtentKind::Zero,
    };
    Extent { offset: extent.range.offset(), length: extent.range.length(), kind }
}
