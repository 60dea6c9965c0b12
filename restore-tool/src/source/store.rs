//! History from a store's files, with or without a server running.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cdp_api::{Bookmark, Gap, Kind, PointKind, PointSpec, Points, RecoverableRange, ResolvedPoint, time};
use journal_format::{ByteRange, DiskId, Lsn, Stamp};
use journal_store::{DiskStore, ExtentKind, Point, PointError, Store, StoreError, View};
use serde::Deserialize;

use super::{DiskName, Image, Listing, Source, first_from};
use crate::error::RestoreError;
use crate::limits::WINDOW_BYTES;

/// A store's directory, opened for reading.
pub struct StoreSource {
    store: Store,
    root: PathBuf,
}

impl StoreSource {
    /// Opens the store in `root`.
    ///
    /// # Errors
    /// `Source` when there is none, or it cannot be read.
    pub fn open(root: &Path) -> Result<Self, RestoreError> {
        let store = Store::open_read_only(root).map_err(failed)?;
        Ok(Self { store, root: root.to_owned() })
    }

    fn names(&self) -> Vec<(DiskId, DiskName)> {
        let damaged = self.store.damaged().into_iter().map(|(id, _)| id);
        self.store.disks().into_iter().chain(damaged).map(|id| (id, name_of(&self.root, id))).collect()
    }

    fn opened(&self, id: DiskId) -> Result<Arc<DiskStore>, RestoreError> {
        self.store.disk(id).ok_or_else(|| {
            let damaged = self.store.damaged().into_iter().find(|(disk, _)| *disk == id);
            match damaged {
                Some((_, why)) => RestoreError::Source {
                    what: format!("the journal of disk {id}"),
                    detail: why,
                    hint: "put back a copy of what is damaged".to_owned(),
                },
                None => no_such_disk(&id.to_string()),
            }
        })
    }

    /// The disk that `wanted` (UUID or `vm/device`) means.
    fn find(&self, wanted: &str) -> Result<(Arc<DiskStore>, DiskName), RestoreError> {
        let id = wanted.parse::<DiskId>().ok();
        let is_it = |(disk, name): &(DiskId, DiskName)| id == Some(*disk) || name.label() == wanted;
        let mut found: Vec<_> = self.names().into_iter().filter(is_it).collect();
        if found.len() > 1 {
            let detail = format!("several disks are called {wanted}");
            return Err(RestoreError::problem(
                Kind::AmbiguousDisk,
                detail,
                "give its UUID; 'list' shows them",
            ));
        }
        let (id, name) = found.pop().ok_or_else(|| no_such_disk(wanted))?;
        Ok((self.opened(id)?, name))
    }
}

impl Source for StoreSource {
    fn list(&self, disk: Option<&str>) -> Result<Vec<Listing>, RestoreError> {
        let disks = match disk {
            Some(wanted) => vec![self.find(wanted)?],
            None => {
                let open = |(id, name)| self.opened(id).map(|disk| (disk, name));
                self.names().into_iter().map(open).collect::<Result<_, _>>()?
            }
        };
        Ok(disks.into_iter().map(|(disk, name)| listing(&disk, name)).collect())
    }

    fn open(&self, disk: &str, at: &PointSpec) -> Result<Box<dyn Image>, RestoreError> {
        let (disk, name) = self.find(disk)?;
        let point = disk.resolve(&store_spec(at), now(), None).map_err(|error| refused(at, error))?;
        let view = disk.view(point.lsn).map_err(failed)?;
        Ok(Box::new(StoreImage { view, name, point: to_api(&point), window: 0..0, data: Vec::new() }))
    }
}

/// What the server wrote beside the journal of a disk.
#[derive(Default, Deserialize)]
#[serde(default)]
struct NameFile {
    vm: String,
    device: String,
    host: String,
}

/// A disk's names; only its UUID where the server has not written them, or not legibly.
fn name_of(root: &Path, id: DiskId) -> DiskName {
    let path = root.join("disks").join(id.to_string()).join("name.json");
    let file: NameFile =
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    DiskName { id: id.to_string(), vm: file.vm, device: file.device, host: file.host }
}

fn no_such_disk(wanted: &str) -> RestoreError {
    let detail = format!("the store has no disk {wanted}");
    RestoreError::problem(Kind::NoSuchDisk, detail, "'cdp-restore list' shows the disks, with their UUIDs")
}

fn failed(error: StoreError) -> RestoreError {
    RestoreError::Source {
        what: "the store".to_owned(),
        detail: error.to_string(),
        hint: "check --store; 'cdp-restore list --store DIR' shows what can be read".to_owned(),
    }
}

fn listing(disk: &DiskStore, name: DiskName) -> Listing {
    let history = disk.history();
    let range = |range: &journal_store::RecoverableRange| RecoverableRange {
        from_lsn: range.first.0.0,
        from_time: time::rfc3339(range.first.1.0),
        from_stamp_ns: range.first.1.0,
        to_lsn: range.last.0.0,
        to_time: time::rfc3339(range.last.1.0),
        to_stamp_ns: range.last.1.0,
    };
    let gap = |gap: &journal_store::Gap| Gap {
        from_lsn: gap.begin_lsn.0,
        from_time: time::rfc3339(gap.begin_stamp.0),
        from_stamp_ns: gap.begin_stamp.0,
        to_lsn: gap.end.map(|(lsn, _)| lsn.0),
        to_time: gap.end.map(|(_, stamp)| time::rfc3339(stamp.0)),
        to_stamp_ns: gap.end.map(|(_, stamp)| stamp.0),
        reason: gap.reason.as_str().to_owned(),
    };
    let bookmark = |mark: &journal_store::Bookmark| Bookmark {
        name: mark.name.clone(),
        lsn: mark.lsn.0,
        time: time::rfc3339(mark.stamp.0),
        stamp_ns: mark.stamp.0,
    };
    let points = Points {
        disk: name.id.clone(),
        recoverable: history.recoverable.iter().map(range).collect(),
        gaps: history.gaps.iter().map(gap).collect(),
        bookmarks: history.bookmarks.iter().map(bookmark).collect(),
        newest: disk.resolve(&journal_store::PointSpec::Latest, now(), None).ok().map(|point| to_api(&point)),
        resolved: None,
    };
    Listing { name, disk_bytes: disk.disk_bytes(), points }
}

fn store_spec(at: &PointSpec) -> journal_store::PointSpec {
    match at {
        PointSpec::Lsn(lsn) => journal_store::PointSpec::Lsn(Lsn(*lsn)),
        PointSpec::Time { stamp_ns } => journal_store::PointSpec::Stamp(Stamp(*stamp_ns)),
        PointSpec::Bookmark(name) => journal_store::PointSpec::Bookmark(name.clone()),
        PointSpec::Latest => journal_store::PointSpec::Latest,
    }
}

fn to_api(point: &Point) -> ResolvedPoint {
    use journal_store::PointKind as Stored;
    let kind = match point.kind {
        Stored::Write => PointKind::Write,
        Stored::Zero => PointKind::Zero,
        Stored::Discard => PointKind::Discard,
        Stored::Flush => PointKind::Flush,
        Stored::Resize => PointKind::Resize,
        Stored::Bookmark => PointKind::Bookmark,
        Stored::GapEnd => PointKind::GapEnd,
        Stored::GapBegin | Stored::Void => PointKind::Other,
    };
    ResolvedPoint::new(point.lsn.0, point.stamp.0, kind, point.exact)
}

fn now() -> Stamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn refused(at: &PointSpec, error: StoreError) -> RestoreError {
    let StoreError::Point(error) = error else {
        return failed(error);
    };
    let near = |point: Option<Point>| point.map(|point| to_api(&point));
    let (kind, detail, before, after) = match error {
        PointError::InGap { reason, before, after } => {
            let detail =
                format!("{at} lies in a gap ({}): writes of that time may be missing", reason.as_str());
            (Kind::PointInGap, detail, near(before), near(after))
        }
        PointError::OutOfRange { before, after } => {
            (Kind::PointOutOfRange, format!("{at} is out of range"), near(before), near(after))
        }
        PointError::NoSuchBookmark { .. } => (Kind::NoSuchBookmark, format!("there is no {at}"), None, None),
    };
    let hint = match kind {
        Kind::NoSuchBookmark => "'cdp-restore list' shows the bookmarks",
        _ => "restore one of the nearest points, or see 'cdp-restore list' for what can be restored",
    };
    let problem = cdp_api::Problem::new(kind, detail, hint).with_points(before, after);
    RestoreError::Problem(Box::new(problem))
}

struct StoreImage {
    view: View,
    name: DiskName,
    point: ResolvedPoint,
    /// Of this range, `data` says what is not zero.
    window: Range<u64>,
    data: Vec<Range<u64>>,
}

impl StoreImage {
    fn look_at(&mut self, from: u64) -> Result<(), RestoreError> {
        let length = WINDOW_BYTES.min(self.view.disk_bytes() - from);
        let Some(range) = ByteRange::new(from, length) else {
            let detail = format!("the disk has {} bytes, more than a disk can have", self.view.disk_bytes());
            return Err(RestoreError::Source { what: "the store".to_owned(), detail, hint: String::new() });
        };
        self.data.clear();
        for extent in self.view.extents(range).map_err(failed)? {
            if extent.kind == ExtentKind::Data {
                self.data.push(extent.range.offset()..extent.range.end());
            }
        }
        self.window = range.offset()..range.end();
        Ok(())
    }
}

impl Image for StoreImage {
    fn disk(&self) -> &DiskName {
        &self.name
    }

    fn point(&self) -> &ResolvedPoint {
        &self.point
    }

    fn disk_bytes(&self) -> u64 {
        self.view.disk_bytes()
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError> {
        let mut from = from;
        while from < self.view.disk_bytes() {
            if !self.window.contains(&from) {
                self.look_at(from)?;
            }
            if let Some(stretch) = first_from(&self.data, from) {
                return Ok(Some(stretch));
            }
            from = self.window.end;
        }
        Ok(None)
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError> {
        self.view.read(offset, into).map_err(failed)
    }
}
