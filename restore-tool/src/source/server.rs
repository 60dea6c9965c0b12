//! History through a running server.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;

use cdp_api::{Client, ClientError, DiskSummary, ExtentKind, Kind, PointSpec, ResolvedPoint};

use super::{DiskName, Image, Listing, Source, first_from};
use crate::error::RestoreError;
use crate::limits::{REQUEST_BYTES, SERVER_REQUESTS, SMALL_HOLE_BYTES};

/// A server, spoken to over its REST API.
pub struct ServerSource {
    client: Client,
}

impl ServerSource {
    /// The server at `url`, such as `http://127.0.0.1:7410`. Nothing is sent yet.
    ///
    /// # Errors
    /// `Source` when the HTTP client cannot be set up.
    pub fn new(url: &str) -> Result<Self, RestoreError> {
        Client::new(url).map(|client| Self { client }).map_err(failed)
    }

    fn listing(&self, disk: DiskSummary) -> Result<Listing, RestoreError> {
        let points = self.client.points(&disk.id).map_err(failed)?;
        Ok(Listing { disk_bytes: disk.disk_bytes, name: name_of(disk), points })
    }
}

impl Source for ServerSource {
    fn list(&self, disk: Option<&str>) -> Result<Vec<Listing>, RestoreError> {
        if let Some(disk) = disk {
            let summary = self.client.disk(disk).map_err(failed)?.summary;
            return Ok(vec![self.listing(summary)?]);
        }
        let mut all = Vec::new();
        for disk in self.client.disks().map_err(failed)? {
            match self.listing(disk) {
                Ok(listing) => all.push(listing),
                // A disk that was never protected has nothing to restore.
                Err(RestoreError::Problem(problem)) if problem.kind == Kind::NoJournal => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    fn open(&self, disk: &str, at: &PointSpec) -> Result<Box<dyn Image>, RestoreError> {
        let name = name_of(self.client.disk(disk).map_err(failed)?.summary);
        let point = self.client.resolve(&name.id, at).map_err(failed)?;
        let disk_bytes = self.client.extents(&name.id, point.lsn, 0, 0).map_err(failed)?.disk_bytes;
        Ok(Box::new(ServerImage {
            client: self.client.clone(),
            name,
            point,
            disk_bytes,
            window: Window::default(),
        }))
    }
}

fn name_of(disk: DiskSummary) -> DiskName {
    DiskName { id: disk.id, vm: disk.vm, device: disk.device, host: disk.host }
}

fn failed(error: ClientError) -> RestoreError {
    match error {
        ClientError::Problem(problem) => RestoreError::Problem(problem),
        other => RestoreError::Source {
            what: "from the server".to_owned(),
            detail: other.to_string(),
            hint: format!("{}; with the server down, restore from its files with --store", other.hint()),
        },
    }
}

struct ServerImage {
    client: Client,
    name: DiskName,
    point: ResolvedPoint,
    disk_bytes: u64,
    window: Window,
}

/// The last answer about extents: all of `covers` is known, and `data` is what of it is not zero.
#[derive(Default)]
struct Window {
    covers: Range<u64>,
    data: Vec<Range<u64>>,
}

impl ServerImage {
    fn fetch(&self, from: u64) -> Result<Window, RestoreError> {
        let answer = self
            .client
            .extents(&self.name.id, self.point.lsn, from, self.disk_bytes - from)
            .map_err(failed)?;
        let end = answer.next_offset.unwrap_or(self.disk_bytes);
        if end <= from || end > self.disk_bytes {
            return Err(bad_answer("the server's answer about extents goes nowhere"));
        }
        let data = answer.extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
        let data: Vec<_> =
            data.map(|extent| extent.offset..extent.offset.saturating_add(extent.length)).collect();
        let ascending = data.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = data.iter().all(|stretch| stretch.start < stretch.end && stretch.end <= end);
        if !ascending || !inside {
            return Err(bad_answer("the server's extents overlap, are empty or lie outside the disk"));
        }
        Ok(Window { covers: from..end, data })
    }

    /// What to ask for so that all data in `[from, end)` comes: ascending, none longer than one answer can be. A small hole
    /// is asked for too: its zeroes cost less than another request.
    fn requests(&mut self, from: u64, end: u64) -> Result<Vec<Range<u64>>, RestoreError> {
        let mut requests: Vec<Range<u64>> = Vec::new();
        let mut position = from;
        while let Some(stretch) = self.next_data(position)?.filter(|stretch| stretch.start < end) {
            position = stretch.end.min(end);
            let joined = requests.last_mut().filter(|last| stretch.start - last.end <= SMALL_HOLE_BYTES);
            match joined {
                Some(last) => last.end = position,
                None => requests.push(stretch.start..position),
            }
            if position == end {
                break;
            }
        }
        let pieces = |request: Range<u64>| {
            let end = request.end;
            request.step_by(REQUEST_BYTES as usize).map(move |start| start..(start + REQUEST_BYTES).min(end))
        };
        Ok(requests.into_iter().flat_map(pieces).collect())
    }

    fn request(&self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError> {
        let length = into.len() as u64;
        let bytes = self.client.data(&self.name.id, self.point.lsn, offset, length).map_err(failed)?;
        into.copy_from_slice(&bytes);
        Ok(())
    }
}

fn next<T>(of: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    of.lock().unwrap_or_else(PoisonError::into_inner).next()
}

fn bad_answer(detail: &str) -> RestoreError {
    RestoreError::Source {
        what: "from the server".to_owned(),
        detail: detail.to_owned(),
        hint: "check that server and cdp-restore are of the same release".to_owned(),
    }
}

impl Image for ServerImage {
    fn disk(&self) -> &DiskName {
        &self.name
    }

    fn point(&self) -> &ResolvedPoint {
        &self.point
    }

    fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError> {
        let mut from = from;
        while from < self.disk_bytes {
            if !self.window.covers.contains(&from) {
                self.window = self.fetch(from)?;
            }
            if let Some(stretch) = first_from(&self.window.data, from) {
                return Ok(Some(stretch));
            }
            from = self.window.covers.end;
        }
        Ok(None)
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError> {
        let mut requests = Vec::new();
        let (mut position, end, mut rest) = (offset, offset + into.len() as u64, into);
        for wanted in self.requests(offset, end)? {
            let (zeroes, behind) = rest.split_at_mut((wanted.start - position) as usize);
            let (data, behind) = behind.split_at_mut((wanted.end - wanted.start) as usize);
            zeroes.fill(0);
            requests.push((wanted.start, data));
            (position, rest) = (wanted.end, behind);
        }
        rest.fill(0);
        let this = &*self;
        let (left, failure) = (Mutex::new(requests.into_iter()), Mutex::new(None));
        let work = || {
            while let Some((offset, into)) = next(&left) {
                if let Err(error) = this.request(offset, into) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    // The others finish what they have.
                    while next(&left).is_some() {}
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..SERVER_REQUESTS {
                // Without another thread this one asks for all.
                let _ = thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}
