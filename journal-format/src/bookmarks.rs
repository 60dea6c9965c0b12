//! The bookmarks of a disk that operators set by name and LSN. Layout: `docs/formats/manifest.md`.
//!
//! Bookmarks that come as records are in the metadata volume too; this file has all of them, so that a listing reads one
//! small file. It is replaced as a whole, like the manifest.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{FormatError, FormatErrorKind};
use crate::layout::{header_crc, layout};
use crate::limits::{MAX_BOOKMARK_BYTES, MAX_BOOKMARKS};
use crate::units::{DiskId, Lsn, Stamp};

/// First eight bytes of the file.
pub const BOOKMARKS_MAGIC: [u8; 8] = *b"CDPBOOKM";
/// The version this code writes, and the only one it reads.
pub const BOOKMARKS_VERSION: u16 = 1;
/// Encoded size of the file's header, in bytes.
pub const BOOKMARKS_HEADER_BYTES: usize = 64;
/// Encoded size of one bookmark without its name, in bytes.
pub const BOOKMARK_BYTES: usize = 24;

const _: () = assert!(size_of::<BookmarksHeader>() == BOOKMARKS_HEADER_BYTES);
const _: () = assert!(size_of::<RawBookmark>() == BOOKMARK_BYTES);

/// A named point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bookmark {
    /// The state after this record.
    pub lsn: Lsn,
    /// That record's stamp.
    pub stamp: Stamp,
    /// 1 to [`MAX_BOOKMARK_BYTES`] bytes, unique on the disk.
    pub name: String,
}

/// The 64 bytes before the bookmarks.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BookmarksHeader {
    magic: [u8; 8],
    version: U16,
    header_bytes: U16,
    bookmark_count: U32,
    disk: [u8; 16],
    body_bytes: U32,
    body_crc: U32,
    reserved: [u8; 20],
    header_crc: U32,
}

layout!(BookmarksHeader {
    magic,
    version,
    header_bytes,
    bookmark_count,
    disk,
    body_bytes,
    body_crc,
    reserved,
    header_crc
});

/// The 24 bytes before a bookmark's name.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBookmark {
    lsn: U64,
    stamp: U64,
    name_bytes: U16,
    reserved: [u8; 6],
}

layout!(RawBookmark { lsn, stamp, name_bytes, reserved });

/// Encodes the whole file.
///
/// # Errors
/// `Invalid` for an empty, too long or repeated name; `TooLarge` for too many bookmarks.
pub fn encode(disk: DiskId, bookmarks: &[Bookmark]) -> Result<Vec<u8>, FormatError> {
    check(bookmarks)?;
    let too_large = || FormatError::new(FormatErrorKind::TooLarge, "bookmarks", "more than the limit");
    let mut body = Vec::new();
    for bookmark in bookmarks {
        let raw = RawBookmark {
            lsn: U64::new(bookmark.lsn.0),
            stamp: U64::new(bookmark.stamp.0),
            name_bytes: U16::new(u16::try_from(bookmark.name.len()).map_err(|_| too_large())?),
            reserved: [0; 6],
        };
        body.extend_from_slice(raw.as_bytes());
        body.extend_from_slice(bookmark.name.as_bytes());
    }
    let mut header = BookmarksHeader {
        magic: BOOKMARKS_MAGIC,
        version: U16::new(BOOKMARKS_VERSION),
        header_bytes: U16::new(BOOKMARKS_HEADER_BYTES as u16),
        bookmark_count: U32::new(u32::try_from(bookmarks.len()).map_err(|_| too_large())?),
        disk: disk.0,
        body_bytes: U32::new(u32::try_from(body.len()).map_err(|_| too_large())?),
        body_crc: U32::new(crc32c::crc32c(&body)),
        reserved: [0; 20],
        header_crc: U32::new(0),
    };
    header.header_crc = U32::new(header_crc(header.as_bytes()));
    let mut out = header.as_bytes().to_vec();
    out.append(&mut body);
    Ok(out)
}

/// Reads and checks a whole file; returns whose it is, and the bookmarks in the order in which they were given.
///
/// # Errors
/// `Truncated` when bytes are missing; otherwise what is wrong with it.
pub fn parse(bytes: &[u8]) -> Result<(DiskId, Vec<Bookmark>), FormatError> {
    let (header, body) =
        BookmarksHeader::ref_from_prefix(bytes).map_err(|_| FormatError::truncated("bookmarks"))?;
    header.check()?;
    if body.len() < header.body_bytes.get() as usize {
        return Err(FormatError::truncated("bookmarks"));
    }
    if body.len() > header.body_bytes.get() as usize {
        return Err(FormatError::invalid("bookmarks", "bytes after the last bookmark"));
    }
    if header.body_crc.get() != crc32c::crc32c(body) {
        return Err(FormatError::new(FormatErrorKind::Checksum, "bookmarks", "torn or corrupt"));
    }
    let mut bookmarks = Vec::new();
    let mut rest = body;
    while !rest.is_empty() {
        let (bookmark, after) = parse_one(rest)?;
        bookmarks.push(bookmark);
        rest = after;
    }
    if bookmarks.len() != header.bookmark_count.get() as usize {
        return Err(FormatError::invalid("bookmarks", "another number of bookmarks than the header says"));
    }
    check(&bookmarks)?;
    Ok((DiskId(header.disk), bookmarks))
}

fn parse_one(bytes: &[u8]) -> Result<(Bookmark, &[u8]), FormatError> {
    let bad = |detail| FormatError::invalid("bookmarks", detail);
    let (raw, rest) = RawBookmark::ref_from_prefix(bytes).map_err(|_| bad("a bookmark is cut short"))?;
    if raw.reserved != [0; 6] {
        return Err(bad("a reserved byte is not zero"));
    }
    let (name, rest) =
        rest.split_at_checked(usize::from(raw.name_bytes.get())).ok_or_else(|| bad("a name is cut short"))?;
    let name = core::str::from_utf8(name).map_err(|_| bad("a name is not UTF-8"))?;
    let bookmark = Bookmark { lsn: Lsn(raw.lsn.get()), stamp: Stamp(raw.stamp.get()), name: name.to_owned() };
    Ok((bookmark, rest))
}

fn check(bookmarks: &[Bookmark]) -> Result<(), FormatError> {
    let bad = |detail| Err(FormatError::invalid("bookmarks", detail));
    if bookmarks.len() > MAX_BOOKMARKS as usize {
        return Err(FormatError::new(FormatErrorKind::TooLarge, "bookmarks", "more than the limit"));
    }
    if bookmarks.iter().any(|b| b.name.is_empty() || b.name.len() > MAX_BOOKMARK_BYTES as usize) {
        return bad("a name is empty or longer than 255 bytes");
    }
    if bookmarks.iter().any(|b| b.lsn == Lsn::ZERO || b.lsn == Lsn::MAX) {
        return bad("an LSN that no record has");
    }
    let mut names: Vec<&str> = bookmarks.iter().map(|b| b.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() == bookmarks.len() { Ok(()) } else { bad("two bookmarks have the same name") }
}

impl BookmarksHeader {
    fn check(&self) -> Result<(), FormatError> {
        let err = |kind, detail| Err(FormatError::new(kind, "bookmarks", detail));
        if self.magic != BOOKMARKS_MAGIC {
            return err(FormatErrorKind::Magic, "this file holds no bookmarks");
        }
        if self.version.get() != BOOKMARKS_VERSION {
            return err(FormatErrorKind::Version, "written by a newer release; upgrade this one");
        }
        if usize::from(self.header_bytes.get()) != BOOKMARKS_HEADER_BYTES {
            return err(FormatErrorKind::Invalid, "the header's length is not 64");
        }
        if self.header_crc.get() != header_crc(self.as_bytes()) {
            return err(FormatErrorKind::Checksum, "the header is torn or corrupt");
        }
        if self.reserved != [0; 20] {
            return err(FormatErrorKind::Invalid, "a reserved byte is not zero");
        }
        Ok(())
    }
}
