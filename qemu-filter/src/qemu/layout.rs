//! Where each QEMU release keeps its driver callbacks: tables, one for each family of releases.
//!
//! The layout is data because it is all that differs: the same code runs in every release. The tables are
//! printed by `scripts/layouts --rust` from a release's source. A table is chosen by the running QEMU's
//! own version and then compared with the process by [`super::verify`] before anything is changed.

use super::version::Version;

/// A field of `struct BlockDriver` that holds a function pointer: `CoPwritev` is `bdrv_co_pwritev`, and so on, as
/// documented in QEMU's `block_int-common.h`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum Callback {
    Open,
    Close,
    MakeEmpty,
    Inactivate,
    SnapshotGoto,
    RefreshLimits,
    DrainBegin,
    DrainEnd,
    ChildPerm,
    AioPwritev,
    AioPdiscard,
    CoPreadv,
    CoPreadvPart,
    CoWritev,
    CoPwritev,
    CoPwritevPart,
    CoPwriteZeroes,
    CoPdiscard,
    CoCopyRangeTo,
    CoBlockStatus,
    CoInvalidateCache,
    CoFlush,
    CoFlushToDisk,
    CoFlushToOs,
    CoTruncate,
    GetLength,
    CoPwritevCompressed,
    CoPwritevCompressedPart,
    CoZoneMgmt,
    CoZoneAppend,
    AioIoctl,
    CoIoctl,
}

/// How many kinds of [`Callback`] there are.
pub(crate) const CALLBACKS: usize = Callback::CoIoctl as usize + 1;

/// Offset of `format_name` in `struct BlockDriver`, in every release.
pub(crate) const FORMAT_NAME: usize = 0;
/// Offset of `instance_size` (an int), in every release.
pub(crate) const INSTANCE_SIZE: usize = 8;
/// Offset of `is_filter` (a bool), in every release.
pub(crate) const IS_FILTER: usize = 12;
/// Offset of `is_format` (a bool), in every release.
pub(crate) const IS_FORMAT: usize = 14;
/// Offset of `drv` in `struct BlockDriverState`, in every release; proven on the scratch node.
pub(crate) const STATE_DRV: usize = 16;
/// Offset of `opaque`, the driver's private state, in `struct BlockDriverState`, in every release: right behind `drv`.
pub(crate) const STATE_OPAQUE: usize = 24;
/// Offset of `open_flags` (an int) in `struct BlockDriverState`, in every release.
pub(crate) const STATE_OPEN_FLAGS: usize = 0;
/// Offset of `fd` (an int) in `BDRVRawState`, the private state of a `file` node (`block/file-posix.c`), in every release.
pub(crate) const RAW_STATE_FD: usize = 0;

/// Where a node (`struct BlockDriverState`) keeps what is asked about its requests; proven on the scratch node.
#[derive(Debug)]
pub(crate) struct NodeLayout {
    /// Offset of `bl.max_transfer` (a `uint32_t`).
    pub(crate) max_transfer: usize,
    /// Offset of `serialising_in_flight` (an `unsigned int`).
    pub(crate) serialising_in_flight: usize,
    /// Offset of the `QemuMutex` of the list; `None` where one thread has the node, and its coroutines a lock.
    pub(crate) reqs_lock: Option<usize>,
    /// Offset of `tracked_requests`, the pointer to the newest request.
    pub(crate) tracked_requests: usize,
}

/// How a mirror's job (`struct MirrorBlockJob` in `block/mirror.c`) says that it copies all of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Copied {
    /// `is_none_mode`, a bool, is false. (And there is no base.)
    UnlessNone,
    /// `sync_mode` is `MIRROR_SYNC_MODE_FULL`.
    Mode,
}

/// One family's layout of `struct BlockDriver` and of what is read of a node.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The releases it is right for, for messages.
    pub(crate) family: &'static str,
    /// First and last (major, minor) of the family.
    versions: ((u32, u32), (u32, u32)),
    /// Bytes of the structure.
    pub(crate) size: usize,
    /// Offset of the links of the list of drivers.
    pub(crate) list: usize,
    pub(crate) node: NodeLayout,
    /// How a mirror says what it copies.
    pub(crate) copied: Copied,
    callbacks: &'static [(Callback, usize)],
}

impl Layout {
    /// The table for a version, if there is one.
    pub(crate) fn for_version(version: &Version) -> Option<&'static Self> {
        let wanted = (version.major, version.minor);
        FAMILIES.iter().copied().find(|layout| layout.versions.0 <= wanted && wanted <= layout.versions.1)
    }

    /// Offset of a callback, or `None` when these releases have no such field.
    pub(crate) fn offset(&self, callback: Callback) -> Option<usize> {
        self.callbacks.iter().find(|(known, _)| *known == callback).map(|(_, offset)| *offset)
    }

    /// All families, for messages: "7.2, 10.0, 10.2 to 11.1".
    pub(crate) fn known() -> String {
        FAMILIES.iter().map(|layout| layout.family).collect::<Vec<_>>().join(", ")
    }
}

/// All tables.
pub(crate) static FAMILIES: [&Layout; 3] = [&V7_2, &V10_0, &V10_2];

static V7_2: Layout = Layout {
    family: "7.2",
    versions: ((7, 2), (7, 2)),
    // scripts/layouts --rust, from the source of 7.2.0.
    size: 848,
    list: 432,
    node: NodeLayout {
        max_transfer: 16504,
        serialising_in_flight: 16944,
        reqs_lock: None,
        tracked_requests: 17016,
    },
    copied: Copied::UnlessNone,
    callbacks: &[
        (Callback::Open, 144),
        (Callback::Close, 160),
        (Callback::MakeEmpty, 192),
        (Callback::Inactivate, 232),
        (Callback::SnapshotGoto, 248),
        (Callback::RefreshLimits, 320),
        (Callback::ChildPerm, 408),
        (Callback::AioPwritev, 472),
        (Callback::AioPdiscard, 488),
        (Callback::CoPreadv, 504),
        (Callback::CoPreadvPart, 512),
        (Callback::CoWritev, 520),
        (Callback::CoPwritev, 528),
        (Callback::CoPwritevPart, 536),
        (Callback::CoPwriteZeroes, 544),
        (Callback::CoPdiscard, 552),
        (Callback::CoCopyRangeTo, 568),
        (Callback::CoBlockStatus, 576),
        (Callback::CoInvalidateCache, 608),
        (Callback::CoFlush, 616),
        (Callback::CoFlushToDisk, 632),
        (Callback::CoFlushToOs, 640),
        (Callback::CoTruncate, 648),
        (Callback::GetLength, 656),
        (Callback::CoPwritevCompressed, 680),
        (Callback::CoPwritevCompressedPart, 688),
        (Callback::AioIoctl, 760),
        (Callback::CoIoctl, 768),
    ],
};

static V10_0: Layout = Layout {
    family: "10.0",
    versions: ((10, 0), (10, 0)),
    // scripts/layouts --rust, from the source of 10.0.2.
    size: 848,
    list: 440,
    node: NodeLayout {
        max_transfer: 16504,
        serialising_in_flight: 16968,
        reqs_lock: Some(16984),
        tracked_requests: 17032,
    },
    copied: Copied::UnlessNone,
    callbacks: &[
        (Callback::Open, 144),
        (Callback::Close, 152),
        (Callback::MakeEmpty, 184),
        (Callback::Inactivate, 224),
        (Callback::SnapshotGoto, 240),
        (Callback::RefreshLimits, 312),
        (Callback::DrainBegin, 344),
        (Callback::DrainEnd, 352),
        (Callback::ChildPerm, 416),
        (Callback::AioPwritev, 480),
        (Callback::AioPdiscard, 496),
        (Callback::CoPreadv, 512),
        (Callback::CoPreadvPart, 520),
        (Callback::CoWritev, 528),
        (Callback::CoPwritev, 536),
        (Callback::CoPwritevPart, 544),
        (Callback::CoPwriteZeroes, 552),
        (Callback::CoPdiscard, 560),
        (Callback::CoCopyRangeTo, 576),
        (Callback::CoBlockStatus, 584),
        (Callback::CoInvalidateCache, 616),
        (Callback::CoFlush, 624),
        (Callback::CoFlushToDisk, 640),
        (Callback::CoFlushToOs, 648),
        (Callback::CoTruncate, 656),
        (Callback::GetLength, 664),
        (Callback::CoPwritevCompressed, 688),
        (Callback::CoPwritevCompressedPart, 696),
        (Callback::CoZoneMgmt, 752),
        (Callback::CoZoneAppend, 760),
        (Callback::AioIoctl, 792),
        (Callback::CoIoctl, 800),
    ],
};

static V10_2: Layout = Layout {
    family: "10.2 to 11.1",
    versions: ((10, 2), (11, 1)),
    // scripts/layouts --rust, from the source of 10.2.2.
    size: 840,
    list: 440,
    node: NodeLayout {
        max_transfer: 16504,
        serialising_in_flight: 16968,
        reqs_lock: Some(16984),
        tracked_requests: 17032,
    },
    copied: Copied::Mode,
    callbacks: &[
        (Callback::Open, 144),
        (Callback::Close, 152),
        (Callback::MakeEmpty, 184),
        (Callback::Inactivate, 224),
        (Callback::SnapshotGoto, 240),
        (Callback::RefreshLimits, 312),
        (Callback::DrainBegin, 344),
        (Callback::DrainEnd, 352),
        (Callback::ChildPerm, 416),
        (Callback::AioPwritev, 480),
        (Callback::CoPreadv, 504),
        (Callback::CoPreadvPart, 512),
        (Callback::CoWritev, 520),
        (Callback::CoPwritev, 528),
        (Callback::CoPwritevPart, 536),
        (Callback::CoPwriteZeroes, 544),
        (Callback::CoPdiscard, 552),
        (Callback::CoCopyRangeTo, 568),
        (Callback::CoBlockStatus, 576),
        (Callback::CoInvalidateCache, 608),
        (Callback::CoFlush, 616),
        (Callback::CoFlushToDisk, 632),
        (Callback::CoFlushToOs, 640),
        (Callback::CoTruncate, 648),
        (Callback::GetLength, 656),
        (Callback::CoPwritevCompressed, 680),
        (Callback::CoPwritevCompressedPart, 688),
        (Callback::CoZoneMgmt, 744),
        (Callback::CoZoneAppend, 752),
        (Callback::AioIoctl, 784),
        (Callback::CoIoctl, 792),
    ],
};

const fn within(layout: &Layout) -> bool {
    let mut index = 0;
    while index < layout.callbacks.len() {
        let offset = layout.callbacks[index].1;
        if !offset.is_multiple_of(8) || offset + 8 > layout.size {
            return false;
        }
        index += 1;
    }
    layout.callbacks.len() <= CALLBACKS
}

const _: () = assert!(within(&V7_2) && within(&V10_0) && within(&V10_2));

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap()
    }

    #[test]
    fn each_release_gets_the_table_of_its_family() {
        for (text, family) in
            [("7.2.22", "7.2"), ("10.0.2", "10.0"), ("10.2.2", "10.2 to 11.1"), ("11.1.3", "10.2 to 11.1")]
        {
            assert_eq!(
                Layout::for_version(&version(text)).map(|layout| layout.family),
                Some(family),
                "{text}"
            );
        }
    }

    #[test]
    fn a_release_without_a_table_gets_none() {
        for text in ["6.2.0", "7.1.0", "8.2.2", "9.0.0", "10.1.0", "11.2.0", "12.0.0"] {
            assert!(Layout::for_version(&version(text)).is_none(), "{text}");
        }
    }

    #[test]
    fn no_table_names_an_offset_twice() {
        for layout in FAMILIES {
            for (index, (callback, offset)) in layout.callbacks.iter().enumerate() {
                for (other, other_offset) in &layout.callbacks[..index] {
                    assert!(callback != other && offset != other_offset, "{}: {callback:?}", layout.family);
                }
            }
        }
    }
}
