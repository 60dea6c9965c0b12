//! `/v1/disks/{disk}/bookmarks`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cdp_api::limits::MAX_BOOKMARK_BYTES;
use cdp_api::{Bookmark, CreateBookmark, Kind, PointSpec, Problem};
use journal_format::{DiskId, Lsn};

use crate::catalog::DiskRow;
use crate::core::Core;
use crate::describe;
use crate::fleet::{Command, Mode};
use crate::limits::{BOOKMARK_TIMEOUT, COMMAND_TIMEOUT};
use crate::resolve;
use crate::rest::extract::{ApiJson, DiskName};
use crate::rest::points::resolve_waiting;
use crate::rest::problem::{ApiError, agent_refused, bad_request, journal, store_failed};
use crate::rest::reading;

/// How often a new bookmark is looked for among the durable records.
const POLL: Duration = Duration::from_millis(10);

/// Names a point: now, or with `at` one that exists.
///
/// Now is a record of its own in the disk's history, put there by the host; so there is none on a disk that is not being
/// captured or whose agent is away. The newest point there is can always be named, as `latest`.
#[utoipa::path(post, path = "/v1/disks/{disk}/bookmarks", tag = "points", operation_id = "create_bookmark", params(
    ("disk" = String, Path, description = "UUID, or vm/device (as two segments or with the slash as %2F)"),
), request_body = CreateBookmark, responses(
    (status = 201, description = "The bookmark, durable", body = Bookmark),
    (status = 409, description = "The name is taken, or the point cannot be restored", body = Problem,
     content_type = "application/problem+json"),
    (status = 503, description = "No agent captures the disk, so now cannot be named", body = Problem,
     content_type = "application/problem+json"),
    (status = "default", description = "What went wrong", body = Problem, content_type = "application/problem+json"),
))]
pub(crate) async fn create(
    State(core): State<Arc<Core>>,
    disk: DiskName,
    ApiJson(wanted): ApiJson<CreateBookmark>,
) -> Result<(StatusCode, Json<Bookmark>), ApiError> {
    check_name(&wanted.name)?;
    let row = reading(&core, move |core| disk.find(core)).await?;
    let (read, name) = (row.clone(), wanted.name.clone());
    let gap_open = reading(&core, move |core| free_name(core, &read, &name)).await?;
    let bookmark = match wanted.at {
        Some(at) => {
            let spec = resolve::parse(&at, core.now_ns())?;
            at_point(&core, &row, wanted.name, spec).await?
        }
        None => now(&core, &row, wanted.name, gap_open).await?,
    };
    Ok((StatusCode::CREATED, Json(bookmark)))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    if !(1..=MAX_BOOKMARK_BYTES).contains(&name.len()) {
        return Err(bad_request(format!(
            "a bookmark's name has 1 to {MAX_BOOKMARK_BYTES} bytes, not {}",
            name.len()
        ))
        .into());
    }
    if name.chars().any(char::is_control) {
        return Err(bad_request("a bookmark's name has no control characters").into());
    }
    Ok(())
}

/// Refuses a name that is taken. Says whether the disk's newest gap is open.
fn free_name(core: &Core, row: &DiskRow, name: &str) -> Result<bool, ApiError> {
    let disk = journal(core, row.id)?;
    let history = disk.history();
    if let Some(old) = history.bookmarks.iter().find(|bookmark| bookmark.name == name) {
        let detail = format!("bookmark '{name}' exists, at lsn {}", old.lsn);
        return Err(Problem::new(Kind::BookmarkExists, detail, "choose another name").into());
    }
    Ok(describe::gap_is_open(row, &disk))
}

async fn at_point(
    core: &Arc<Core>,
    row: &DiskRow,
    name: String,
    spec: PointSpec,
) -> Result<Bookmark, ApiError> {
    let point = resolve_waiting(core, row, spec).await?;
    let id = row.id;
    reading(core, move |core| {
        let disk = journal(core, id)?;
        disk.add_bookmark(&name, Lsn(point.lsn)).map_err(|e| store_failed(&e))?;
        Ok(Bookmark { name, lsn: point.lsn, time: point.time, stamp_ns: point.stamp_ns })
    })
    .await
}

async fn now(core: &Arc<Core>, row: &DiskRow, name: String, gap_open: bool) -> Result<Bookmark, ApiError> {
    let mode = core.fleet.live(row.id, Instant::now()).filter(|live| live.fresh).map(|live| live.mode);
    let Some(mode @ (Mode::Tracking | Mode::Capturing)) = mode else {
        let why = match mode {
            Some(_) => "the disk is not being captured, so its history has no now",
            None => "the VM does not run or its agent is away: nobody can say what now is",
        };
        let hint = "try again when the disk is protected, or name its newest point: 'at' is 'latest'";
        return Err(Problem::new(Kind::AgentOffline, why, hint).into());
    };
    if gap_open || mode == Mode::Tracking {
        return Err(Problem::new(
            Kind::PointInGap,
            "the disk is still being synced; a bookmark set now could not be restored",
            "wait until its phase is 'protected'",
        )
        .into());
    }
    let command = core.fleet.command(row.id, Command::InsertBookmark(name.clone()), Instant::now());
    let away = || {
        Problem::new(
            Kind::AgentOffline,
            "the connection to the host's agent broke",
            "try again, or give a point with 'at'",
        )
    };
    let result = match tokio::time::timeout(COMMAND_TIMEOUT, command.ok_or_else(away)?).await {
        Ok(result) => result.map_err(|_| away())?,
        Err(_) => return Err(late("the host's agent did not answer in time").into()),
    };
    if !result.error.is_empty() {
        return Err(agent_refused(&result.error).into());
    }
    durable(core, row.id, name, Lsn(result.lsn)).await
}

/// Waits until the bookmark's record is durable, and reads it back from the journal.
async fn durable(core: &Arc<Core>, id: DiskId, name: String, lsn: Lsn) -> Result<Bookmark, ApiError> {
    let deadline = Instant::now() + BOOKMARK_TIMEOUT;
    loop {
        let wanted = name.clone();
        let found = reading(core, move |core| {
            let disk = journal(core, id)?;
            if disk.durable_lsn() < lsn {
                return Ok(None);
            }
            let history = disk.history();
            let found = history.bookmarks.iter().find(|b| b.name == wanted && b.lsn == lsn);
            Ok(found.map(Bookmark::from))
        })
        .await?;
        match found {
            Some(bookmark) => return Ok(bookmark),
            None if Instant::now() >= deadline => {
                return Err(late(&format!("the bookmark is set at lsn {lsn}, and not durable yet")).into());
            }
            None => tokio::time::sleep(POLL).await,
        }
    }
}

fn late(detail: &str) -> Problem {
    Problem::new(
        Kind::AgentTimeout,
        detail,
        "look at the disk's points before trying again; the lag may be large",
    )
}
