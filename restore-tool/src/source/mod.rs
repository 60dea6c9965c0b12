//! Where history comes from: a store's files, or a server. Both say the same in the API's types.

mod server;
mod store;

use std::ops::Range;

use cdp_api::{PointSpec, Points, ResolvedPoint};
use serde::Serialize;

pub use self::server::ServerSource;
pub use self::store::StoreSource;
use crate::error::RestoreError;

/// A disk that has a journal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DiskName {
    /// Its UUID.
    pub id: String,
    /// Name of its VM; empty when unknown.
    pub vm: String,
    /// Device in the VM; empty when unknown.
    pub device: String,
    /// Host it was last seen on; empty when unknown.
    pub host: String,
}

impl DiskName {
    /// `vm/device`, or the UUID where those are unknown.
    #[must_use]
    pub fn label(&self) -> String {
        if self.vm.is_empty() && self.device.is_empty() {
            self.id.clone()
        } else {
            format!("{}/{}", self.vm, self.device)
        }
    }
}

/// A disk with its history, as `list` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Listing {
    /// Whose.
    #[serde(flatten)]
    pub name: DiskName,
    /// Its newest size in bytes.
    pub disk_bytes: u64,
    /// What can be restored.
    pub points: Points,
}

/// A place that holds journals.
pub trait Source {
    /// The disks that have a journal, or only the one that `disk` (UUID or `vm/device`) names.
    ///
    /// # Errors
    /// `Problem` when no disk, or more than one, has that name; `Source` when the place cannot be read.
    fn list(&self, disk: Option<&str>) -> Result<Vec<Listing>, RestoreError>;

    /// Resolves a point of a disk and opens the disk's image there; nothing of it is read yet.
    ///
    /// # Errors
    /// `Problem` when there is no such disk or the point cannot be restored (with the nearest points that can).
    fn open(&self, disk: &str, at: &PointSpec) -> Result<Box<dyn Image>, RestoreError>;
}

/// A disk at one point. It may be read by another thread than the one that opened it.
pub trait Image: Send {
    /// Whose.
    fn disk(&self) -> &DiskName;

    /// The point, resolved.
    fn point(&self) -> &ResolvedPoint;

    /// Size of the disk at that point, in bytes.
    fn disk_bytes(&self) -> u64;

    /// The first stretch at or after `from` that may hold anything but zeroes, in bytes of disk; `None` when only zeroes
    /// follow. Asking in ascending order is cheap.
    ///
    /// # Errors
    /// `Source` when the journal cannot be read.
    fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError>;

    /// Reads `into.len()` bytes from `offset` on, within the disk: data and zeroes alike. What is returned has passed the
    /// journal's checksums. Many MiB at once cost far less by the byte than few.
    ///
    /// # Errors
    /// `Source` when the journal cannot be read or is corrupt.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError>;
}

/// The next stretch of data at or after `from` among `stretches`, which ascend.
fn first_from(stretches: &[Range<u64>], from: u64) -> Option<Range<u64>> {
    let next = stretches.partition_point(|s| s.end <= from);
    stretches.get(next).map(|s| s.start.max(from)..s.end)
}
