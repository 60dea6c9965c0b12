//! Compares a layout table with the running process before anything is changed.
//!
//! QEMU exports three of its drivers as data: raw, qcow2 and file. What is known of them from their source is
//! the same in every release that has a table: their names, what they are, which callbacks they fill and
//! which they leave empty. A table with one offset wrong finds an empty field where a function must be, or a
//! function where nothing must be, or something that is not QEMU's code.

use super::driver::Driver;
use super::layout::{Callback, Layout};
use super::maps::Maps;
use super::symbols::Symbols;
use super::types::BlockDriver;

/// What is known of an exported driver.
struct Known {
    name: &'static str,
    is_format: bool,
    filled: &'static [Callback],
    empty: &'static [Callback],
}

use Callback::{
    AioIoctl, AioPdiscard, AioPwritev, ChildPerm, Close, CoBlockStatus, CoCopyRangeTo, CoFlush,
    CoFlushToDisk, CoFlushToOs, CoInvalidateCache, CoIoctl, CoPdiscard, CoPreadv, CoPreadvPart,
    CoPwriteZeroes, CoPwritev, CoPwritevCompressed, CoPwritevCompressedPart, CoPwritevPart, CoTruncate,
    CoWritev, CoZoneAppend, CoZoneMgmt, DrainBegin, DrainEnd, GetLength, Inactivate, MakeEmpty, Open,
    RefreshLimits, SnapshotGoto,
};

const RAW: Known = Known {
    name: "raw",
    is_format: true,
    filled: &[
        Open,
        RefreshLimits,
        ChildPerm,
        CoPreadv,
        CoPwritev,
        CoPwriteZeroes,
        CoPdiscard,
        CoCopyRangeTo,
        CoBlockStatus,
        CoTruncate,
        GetLength,
        CoIoctl,
    ],
    empty: &[
        DrainBegin,
        DrainEnd,
        Close,
        MakeEmpty,
        Inactivate,
        SnapshotGoto,
        AioPwritev,
        AioPdiscard,
        CoPreadvPart,
        CoWritev,
        CoPwritevPart,
        CoInvalidateCache,
        CoFlush,
        CoFlushToDisk,
        CoFlushToOs,
        CoPwritevCompressed,
        CoPwritevCompressedPart,
        AioIoctl,
    ],
};

const QCOW2: Known = Known {
    name: "qcow2",
    is_format: true,
    filled: &[
        Open,
        Close,
        MakeEmpty,
        Inactivate,
        SnapshotGoto,
        RefreshLimits,
        ChildPerm,
        CoPreadvPart,
        CoPwritevPart,
        CoPwriteZeroes,
        CoPdiscard,
        CoCopyRangeTo,
        CoBlockStatus,
        CoInvalidateCache,
        CoFlushToOs,
        CoTruncate,
        CoPwritevCompressedPart,
    ],
    empty: &[
        DrainBegin,
        DrainEnd,
        AioPwritev,
        AioPdiscard,
        CoPreadv,
        CoWritev,
        CoPwritev,
        CoFlush,
        CoFlushToDisk,
        GetLength,
        CoPwritevCompressed,
        CoZoneMgmt,
        CoZoneAppend,
        AioIoctl,
        CoIoctl,
    ],
};

/// `bdrv_open` is not listed: 7.2 opens it through another field.
const FILE: Known = Known {
    name: "file",
    is_format: false,
    filled: &[
        Close,
        RefreshLimits,
        CoPreadv,
        CoPwritev,
        CoPwriteZeroes,
        CoPdiscard,
        CoCopyRangeTo,
        CoBlockStatus,
        CoInvalidateCache,
        CoFlushToDisk,
        CoTruncate,
        GetLength,
    ],
    empty: &[
        DrainBegin,
        DrainEnd,
        MakeEmpty,
        Inactivate,
        SnapshotGoto,
        ChildPerm,
        AioPwritev,
        AioPdiscard,
        CoPreadvPart,
        CoWritev,
        CoPwritevPart,
        CoFlush,
        CoFlushToOs,
        CoPwritevCompressed,
        CoPwritevCompressedPart,
        CoZoneMgmt,
        CoZoneAppend,
        AioIoctl,
        CoIoctl,
    ],
};

/// Compares the table with raw, qcow2 and file of this process.
///
/// # Errors
/// What did not fit, for the operator.
pub(crate) fn verify(layout: &'static Layout, symbols: &Symbols, maps: &Maps) -> Result<(), String> {
    for (driver, known) in [(symbols.bdrv_raw, RAW), (symbols.bdrv_qcow2, QCOW2), (symbols.bdrv_file, FILE)] {
        verify_one(driver, &known, layout, maps).map_err(|what| format!("{}: {what}", known.name))?;
    }
    let permissions = Driver::new(symbols.bdrv_qcow2, layout, maps).map(|driver| driver.callback(ChildPerm));
    if permissions != Some(symbols.bdrv_default_perms as *const () as usize) {
        return Err("qcow2: bdrv_child_perm is not bdrv_default_perms".to_owned());
    }
    Ok(())
}

fn verify_one(
    driver: *mut BlockDriver,
    known: &Known,
    layout: &'static Layout,
    maps: &Maps,
) -> Result<(), String> {
    let driver = Driver::new(driver, layout, maps).ok_or("its table is not mapped")?;
    if driver.format_name(maps).as_deref() != Some(known.name) {
        return Err("format_name is something else".to_owned());
    }
    if driver.is_filter() || driver.is_format() != known.is_format || driver.instance_size() <= 0 {
        return Err("is_filter, is_format or instance_size is something else".to_owned());
    }
    if !driver.is_writable(maps) {
        return Err("its table cannot be written".to_owned());
    }
    for &callback in known.filled {
        if layout.offset(callback).is_some() && !maps.is_code(driver.callback(callback)) {
            return Err(format!("{callback:?} is not a function"));
        }
    }
    match known.empty.iter().find(|&&callback| driver.callback(callback) != 0) {
        Some(callback) => Err(format!("{callback:?} is not empty")),
        None => Ok(()),
    }
}
