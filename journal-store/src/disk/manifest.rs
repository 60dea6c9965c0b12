//! The manifest: making a disk, reading which segments are live, and removing what is not.

use std::collections::BTreeSet;

use journal_format::manifest::{LiveSegment, Manifest};
use journal_format::segment::{SEGMENT_HEADER_PAGE_BYTES, SegmentKind};
use journal_format::{DiskId, Lsn, SegmentNumber};

use super::Env;
use super::open::Opener;
use super::seal::{make_segment, put_manifest};
use crate::damage::{Damage, DamageKind};
use crate::error::StoreError;
use crate::files::{self, OwnFile};
use crate::io::Access;

/// Whether the folder holds a journal; refuses a folder that lost its manifest.
pub(crate) fn exists(env: &Env, disk: DiskId) -> Result<bool, StoreError> {
    let dir = files::disk_dir(&env.root, disk);
    let names = match env.storage.list(&dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StoreError::io("list", &dir)(error)),
    };
    if names.iter().any(|name| name == files::MANIFEST || *name == files::copy_of(files::MANIFEST)) {
        return Ok(true);
    }
    for name in names.iter().filter(|name| matches!(files::parse_name(name), Some(OwnFile::Segment(..)))) {
        let path = dir.join(name);
        let file = env.storage.open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
        if file.len().map_err(StoreError::io("read the length of", &path))? > SEGMENT_HEADER_PAGE_BYTES as u64
        {
            let detail = "the manifest is missing, but there are segments";
            return Err(StoreError::damaged(
                disk,
                &dir.join(files::MANIFEST),
                (Lsn::FIRST, Lsn::MAX),
                detail,
            ));
        }
    }
    Ok(false)
}

/// Makes a disk of which nothing is recorded. Opening it makes it durable.
pub(crate) fn create(env: &Env, disk: DiskId, disk_bytes: u64) -> Result<(), StoreError> {
    let (storage, dir) = (&*env.storage, files::disk_dir(&env.root, disk));
    storage.create_dir(&dir).map_err(StoreError::io("create", &dir))?;
    let mut manifest = Manifest::new(disk, disk_bytes);
    let (segment, first_lsn) = (manifest.next_segment, Lsn::FIRST);
    make_segment(env, &dir, disk, segment, first_lsn)?;
    files::sync_dir(storage, &dir)?;
    manifest.segments.push(LiveSegment { segment, first_lsn, sealed: None });
    manifest.next_segment = segment.next();
    put_manifest(storage, &dir, &manifest)
}

/// Reads a manifest that can be used for that disk; the error says what is wrong.
pub(super) fn parse_manifest(bytes: &[u8], disk: DiskId) -> Result<Manifest, String> {
    let manifest = Manifest::parse(bytes).map_err(|error| error.to_string())?;
    if manifest.disk != disk {
        return Err("it is the manifest of another disk".into());
    }
    if manifest.segments.last().is_none_or(|live| live.sealed.is_some()) {
        return Err("it names no active segment".into());
    }
    Ok(manifest)
}

impl Opener<'_> {
    /// Reads the manifest. With leave to write, makes it and its copy the same, removes what it does not name, and makes
    /// the folder durable as it is.
    pub(super) fn read_manifest(&mut self) -> Result<Manifest, StoreError> {
        let path = self.dir.join(files::MANIFEST);
        let everything = (Lsn::FIRST, Lsn::MAX);
        let damaged = |detail: String| StoreError::damaged(self.disk, &path, everything, detail);
        let parse = |bytes: &[u8]| parse_manifest(bytes, self.disk);
        let pair = files::read_pair(&*self.env.storage, &self.dir, files::MANIFEST, parse)?
            .ok_or_else(|| damaged("the manifest is missing".into()))?
            .map_err(damaged)?;
        let manifest = pair.value;
        if pair.from_copy {
            self.check_newest(&manifest)?;
        }
        if let Some((place, detail)) = pair.damage {
            let damage = Damage::new(self.disk, (&place, 0), everything, DamageKind::Manifest, detail);
            self.state.noted.push(damage);
        }
        if self.writable {
            if pair.differ {
                put_manifest(&*self.env.storage, &self.dir, &manifest)?;
            }
            self.remove_orphans(&manifest)?;
            // A process that died between a rename and this left names that are not durable yet.
            files::sync_dir(&*self.env.storage, &self.dir)?;
        }
        Ok(manifest)
    }

    /// Refuses a manifest that was taken from its copy if there are segments that it does not know: then it is an old one.
    fn check_newest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        for name in self.env.storage.list(&self.dir).map_err(StoreError::io("list", &self.dir))? {
            let Some(OwnFile::Segment(SegmentKind::Meta, number)) = files::parse_name(&name) else {
                continue;
            };
            let path = self.dir.join(&name);
            let file = self.env.storage.open(&path, Access::Read).map_err(StoreError::io("open", &path))?;
            let length = file.len().map_err(StoreError::io("read the length of", &path))?;
            if number >= manifest.next_segment && length > SEGMENT_HEADER_PAGE_BYTES as u64 {
                let detail = "the manifest cannot be read, and its copy is older than the newest segment";
                let path = self.dir.join(files::MANIFEST);
                return Err(StoreError::damaged(self.disk, &path, (Lsn::FIRST, Lsn::MAX), detail));
            }
        }
        Ok(())
    }

    /// Removes what a crash left behind and the manifest does not name.
    fn remove_orphans(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let storage = &self.env.storage;
        let live: BTreeSet<SegmentNumber> = manifest.segments.iter().map(|live| live.segment).collect();
        let sealed =
            |number| manifest.segments.iter().any(|live| live.segment == number && live.sealed.is_some());
        for name in storage.list(&self.dir).map_err(StoreError::io("list", &self.dir))? {
            let orphan = match files::parse_name(&name) {
                None => false,
                Some(OwnFile::Temporary) => true,
                Some(OwnFile::Segment(SegmentKind::Index, number)) => !sealed(number),
                Some(OwnFile::Segment(_, number)) => !live.contains(&number),
            };
            if orphan {
                let path = self.dir.join(name);
                storage.remove(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        Ok(())
    }
}
