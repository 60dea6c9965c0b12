//! Number types that cross borders between crates, so that an LSN is never taken for an offset.

use core::fmt;
use core::str::FromStr;

use crate::error::FormatError;

/// Log sequence number: the per-disk number of a record, from 1, without holes.
///
/// `Lsn::ZERO` is "before the first record": the state of a disk of which nothing is recorded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Before the first record.
    pub const ZERO: Self = Self(0);
    /// The first record of a disk.
    pub const FIRST: Self = Self(1);
    /// No record can have this number; as a bound it means "the newest".
    pub const MAX: Self = Self(u64::MAX);

    /// The number after this one; saturates at [`Lsn::MAX`], which no record reaches.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number before this one; `ZERO` for `ZERO`.
    #[must_use]
    pub const fn prev(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    /// `self + count`, saturating.
    #[must_use]
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }

    /// How many records lie in `(earlier, self]`; 0 when `earlier` is not smaller.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn:{}", self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an image looks like from outside: its files' identities, sizes and times of change, and the host's boot. Two equal
/// tags say that nobody has written to it in between. `docs/decisions/0011-a-close-names-its-image.md` says what goes into it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ImageTag(pub [u8; 16]);

impl ImageTag {
    /// As two little-endian numbers, as records carry it.
    #[must_use]
    pub fn halves(self) -> [u64; 2] {
        let all = u128::from_le_bytes(self.0);
        [all as u64, (all >> 64) as u64]
    }

    /// Back from [`ImageTag::halves`].
    #[must_use]
    pub fn from_halves([first, second]: [u64; 2]) -> Self {
        Self((u128::from(second) << 64 | u128::from(first)).to_le_bytes())
    }
}

/// Instant on the host's hybrid clock: nanoseconds since 1970-01-01T00:00:00 UTC.
///
/// `max(last + 1, wall clock)`, one clock per host, so stamps of all disks of a host are comparable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp(pub u64);

impl Stamp {
    /// Before every record.
    pub const ZERO: Self = Self(0);
    /// After every record.
    pub const MAX: Self = Self(u64::MAX);
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, ns) = (self.0.checked_div(1_000_000_000), self.0.checked_rem(1_000_000_000));
        write!(f, "stamp:{}.{:09}", s.unwrap_or(0), ns.unwrap_or(0))
    }
}

/// One capture session of a disk, from switching on to switching off; numbered per disk from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Epoch(pub u64);

/// Number of a segment; per disk from 1, never used again. Its files are `data-N.seg`, `meta-N.seg`, `index-N.idx`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct SegmentNumber(pub u32);

impl SegmentNumber {
    /// The number after this one; saturating.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for SegmentNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position on a disk, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct ByteOffset(pub u64);

/// A run of bytes on a disk: `[offset, offset + length)`.
///
/// Constructed only by [`ByteRange::new`], so the end always fits in 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ByteRange {
    offset: u64,
    length: u64,
}

impl ByteRange {
    /// `None` when the end would pass `limits::MAX_DISK_BYTES`.
    #[must_use]
    pub const fn new(offset: u64, length: u64) -> Option<Self> {
        match offset.checked_add(length) {
            Some(end) if end <= crate::limits::MAX_DISK_BYTES => Some(Self { offset, length }),
            _ => None,
        }
    }

    /// First byte.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub const fn length(self) -> u64 {
        self.length
    }

    /// One past the last byte.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether it covers no byte.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Whether the two share at least one byte.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        !self.is_empty() && !other.is_empty() && self.offset < other.end() && other.offset < self.end()
    }

    /// The bytes that both cover, or `None`.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self { offset: start, length: end.saturating_sub(start) })
    }
}

/// Identity of a protected disk: a UUID, stable across restarts of its VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DiskId(pub [u8; 16]);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DiskId {
    type Err = FormatError;

    /// Reads the 8-4-4-4-12 hexadecimal form, either case.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || {
            FormatError::invalid("disk id", "expected a UUID such as 6a7d0a54-8a2c-4c0e-9d0b-1f2e3d4c5b6a")
        };
        if text.len() != 36 {
            return Err(bad());
        }
        let mut id = [0_u8; 16];
        let mut digits = text.bytes().enumerate().filter(|(i, _)| !matches!(i, 8 | 13 | 18 | 23));
        let dashes =
            text.bytes().enumerate().filter(|(i, b)| matches!(i, 8 | 13 | 18 | 23) && *b == b'-').count();
        if dashes != 4 {
            return Err(bad());
        }
        for byte in &mut id {
            let mut nibble = || digits.next().and_then(|(_, b)| char::from(b).to_digit(16)).ok_or_else(bad);
            let (high, low) = (nibble()?, nibble()?);
            *byte = u8::try_from((high << 4) | low).map_err(|_| bad())?;
        }
        Ok(Self(id))
    }
}
