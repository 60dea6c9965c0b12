//! What the fuzz targets of the agent's files do with their input. Shared by the libFuzzer targets in `fuzz_targets/` and
//! by the seeded in-tree test `tests/fuzz_smoke.rs`.
//!
//! Both begin with what an honest agent has left. The first byte of the input says whether checksums are made right after
//! everything else (no fuzzer guesses one); the rest is a list of changes, 11 bytes each: what, where, and a word.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use host_agent::drain::parked::Parked;
use host_agent::drain::worker::Pace;
use host_agent::limits::MIN_OUTBOX_BYTES;
use host_agent::outbox::adopt::{Adopted, adopt};
use host_agent::outbox::layout::{AREA_START, Header};
use host_agent::outbox::{Outbox, Packed, PackedFrame};
use host_agent::packer::Packer;
use host_agent::spool::{Spool, SpoolPlace};
use journal_format::{ByteRange, DataSpan, DiskId, Epoch, Frame, Lsn, Op, Record, Stamp};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Whose files they are.
pub const DISK: DiskId = DiskId([0x5a; 16]);
/// Of which epoch.
pub const EPOCH: Epoch = Epoch(7);
/// The first LSN.
pub const FIRST: u64 = 41;
/// Size of the disk.
pub const DISK_BYTES: u64 = 1 << 30;

/// Bytes of an entry before its frame: its own header and that of the message.
pub const ENTRY_HEAD: usize = 64 + 16;
/// Bytes of data in each of the frames here.
const DATA_BYTES: usize = 200;
/// Changes that are made, at most.
const CHANGES: usize = 32;

/// The `number`-th frame of the epoch: two writes, of data that does not compress.
pub fn frame(number: u64, data_bytes: usize) -> PackedFrame {
    let mut packer = Packer::new(DISK, EPOCH, DISK_BYTES);
    for half in 0..2 {
        let (record, noise) = write(number * 2 + half, data_bytes / 2, packer.data().len());
        packer.append(&noise);
        packer.add(Duration::ZERO, record);
    }
    packer.close().expect("it encodes").expect("it has records")
}

/// The `number`-th record of the epoch, whose data lies at `pos` of its frame's.
fn write(number: u64, data_bytes: usize, pos: usize) -> (Record, Vec<u8>) {
    let mut state = number + 1;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    });
    let noise: Vec<u8> = noise.take(data_bytes).collect();
    let (lsn, data) = (FIRST + number, DataSpan { pos: pos as u32, len: noise.len() as u32 });
    let range = ByteRange::new(lsn * 65536, noise.len() as u64).expect("on the disk");
    let op = Op::Write { range, data, fill: false, fua: false };
    (Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op }, noise)
}

/// The encoded frame.
pub fn encoded(frame: &PackedFrame) -> Vec<u8> {
    [frame.head.as_slice(), &frame.data].concat()
}

/// Puts the checksum of the first `length - 4` bytes at `at` into the next four.
fn seal(bytes: &mut [u8], at: usize, length: usize) {
    if let Some(sealed) = bytes.get_mut(at..at + length) {
        let crc = crc32c::crc32c(&sealed[..length - 4]);
        sealed[length - 4..].copy_from_slice(&crc.to_le_bytes());
    }
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    let room = bytes.len().saturating_sub(at).min(new.len());
    if room > 0 {
        bytes[at..at + room].copy_from_slice(&new[..room]);
    }
}

/// What, where, and a word.
fn changes(input: &[u8]) -> impl Iterator<Item = (u8, usize, [u8; 8])> + '_ {
    input.chunks_exact(11).take(CHANGES).map(|change| {
        let place = usize::from(u16::from_le_bytes([change[1], change[2]]));
        (change[0], place, change[3..].try_into().expect("eight bytes"))
    })
}

/// Overwrites the frame of the entry at `at` with another of the same length: sound, and perhaps not the one that belongs there.
fn exchange(bytes: &mut [u8], at: usize, number: u8) {
    let other = encoded(&frame(u64::from(number % 8), DATA_BYTES));
    put(bytes, at + ENTRY_HEAD, &other);
}

/// A part of an outbox that is worth changing.
struct Window {
    at: usize,
    bytes: Vec<u8>,
}

/// An outbox as a filter has kept it.
struct Kept {
    file: File,
    windows: Vec<Window>,
    /// Where entries begin in the last window.
    entries: Vec<usize>,
}

impl Kept {
    /// Three frames.
    fn new() -> Self {
        let packed = Packed { lsn: Lsn(FIRST - 1), stamp: Stamp(0), disk_bytes: DISK_BYTES };
        let (outbox, mut writer) =
            Outbox::create(DISK, EPOCH, 8 << 10, packed, packed.lsn).expect("an outbox");
        let (mut entries, mut area) = (Vec::new(), 0);
        for number in 0..3 {
            let frame = frame(number, DATA_BYTES);
            writer.push(&frame).expect("room");
            entries.push(area);
            area = (area + ENTRY_HEAD + frame.bytes()).next_multiple_of(64);
        }
        let read = |at: usize, length: usize| {
            let mut bytes = vec![0; length];
            outbox.memory().file().read_exact_at(&mut bytes, at as u64).expect("read");
            Window { at, bytes }
        };
        let windows = vec![read(0, size_of::<Header>()), read(AREA_START, area)];
        let length = outbox.memory().len() as u64;
        let fd = memfd_create(c"kept", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
        let file = File::from(fd.expect("a memfd"));
        file.set_len(length).expect("its size");
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("sealed");
        Self { file, windows, entries }
    }

    /// Changes it as the input says.
    fn change(&self, input: &[u8]) {
        let mut windows: Vec<Vec<u8>> = self.windows.iter().map(|window| window.bytes.clone()).collect();
        let (flags, input) = input.split_first().map_or((0, input), |(flags, input)| (*flags, input));
        for (what, place, word) in changes(input) {
            let window = usize::from(what % 2);
            let at = place % windows[window].len();
            match what >> 6 {
                0 => exchange(&mut windows[1], self.entries[place % self.entries.len()], word[0]),
                // Numbers near the ones that are there get further.
                1 => put(&mut windows[window], at, &word[..1]),
                _ => put(&mut windows[window], at / 8 * 8, &word),
            }
        }
        if flags & 1 != 0 {
            seal(&mut windows[0], 0, 64);
            self.entries.iter().for_each(|at| seal(&mut windows[1], *at, 64));
        }
        for (window, bytes) in self.windows.iter().zip(&windows) {
            self.file.write_all_at(bytes, window.at as u64).expect("written");
        }
    }
}

/// What an outbox gives out: whole frames of the epoch, one after the other; how far they reach.
fn frames(outbox: &Outbox) -> Option<Lsn> {
    let mut last: Option<Lsn> = None;
    for entry in outbox.entries(Lsn::ZERO, Lsn::MAX, usize::MAX, usize::MAX) {
        let mut bytes = vec![0; entry.len];
        outbox.memory().file().read_exact_at(&mut bytes, entry.at as u64).expect("read");
        let frame = Frame::parse(&bytes[16..]).expect("only whole frames are taken over");
        assert_eq!((frame.header().disk(), frame.header().epoch()), (DISK, EPOCH));
        assert!(last.is_none_or(|last| last.next() == frame.header().first_lsn()), "a hole");
        last = Some(frame.header().last_lsn());
    }
    last
}

fn check(adopted: &Adopted) {
    let last = frames(&adopted.outbox);
    assert!(last.is_none_or(|last| last == adopted.last) && adopted.last == adopted.packed.lsn);
}

/// An outbox that was kept by somebody who changed it: it is not adopted, or what comes out keeps every rule and ends.
pub fn outbox(input: &[u8]) {
    thread_local!(static KEPT: Kept = Kept::new());
    KEPT.with(|kept| {
        kept.change(input);
        let Ok(adopted) = adopt(&kept.file, DISK, EPOCH, MIN_OUTBOX_BYTES, None) else { return };
        check(&adopted);
        // What an agent made can be adopted from it.
        let again = adopt(adopted.outbox.memory().file(), DISK, EPOCH, 0, None).expect("an agent's own");
        assert_eq!((again.last, again.packed, again.freed), (adopted.last, adopted.packed, adopted.freed));
        let nowhere = SpoolPlace { folder: PathBuf::from("/nonexistent"), limit_bytes: 0, drill: None };
        let spool = Spool::open(&nowhere, DISK, EPOCH);
        let mut worker = Parked::new(adopted, spool, (DISK, EPOCH)).expect("no spool").into_worker();
        let step = worker.step(Duration::ZERO, None).expect("nothing is left to do");
        assert_eq!(step.pace, Pace::Ended);
    });
}

/// A file of a spool.
#[derive(Clone)]
struct SpoolFile {
    name: String,
    bytes: Vec<u8>,
    entries: Vec<usize>,
}

/// Where spools of this process are made.
fn folder() -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
    std::env::temp_dir().join(format!("cdp-fuzz-spool-{}-{thread}", std::process::id()))
}

fn place() -> SpoolPlace {
    // Files of 1 KiB, and some.
    SpoolPlace { folder: folder(), limit_bytes: 16 << 10, drill: None }
}

/// Frames in the honest spool.
const SPOOLED: u64 = 6;

fn honest() -> Vec<SpoolFile> {
    let place = SpoolPlace { limit_bytes: 5 << 10, ..place() };
    let mut spool = Spool::begin(&place, DISK, EPOCH);
    for number in 0..SPOOLED {
        assert!(spool.append(Duration::ZERO, &frame(number, DATA_BYTES)), "room");
    }
    let listed = std::fs::read_dir(place.folder.join(DISK.to_string())).expect("it is there");
    let mut files: Vec<SpoolFile> = listed
        .map(|file| {
            let file = file.expect("listed");
            let bytes = std::fs::read(file.path()).expect("read");
            let each = (ENTRY_HEAD + frame(0, DATA_BYTES).bytes()).next_multiple_of(64);
            let entries = (64..bytes.len()).step_by(each).collect();
            SpoolFile { name: file.file_name().into_string().expect("ASCII"), bytes, entries }
        })
        .collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    spool.clear();
    assert!(files.len() > 1, "several files");
    files
}

/// A spool that something happened to: it gives whole frames that follow each other, or ends; and goes on behind them.
pub fn spool(input: &[u8]) {
    thread_local!(static HONEST: Vec<SpoolFile> = honest());
    let mut files: Vec<Option<SpoolFile>> = HONEST.with(|files| files.iter().cloned().map(Some).collect());
    let (flags, input) = input.split_first().map_or((0, input), |(flags, input)| (*flags, input));
    let count = files.len();
    for (what, at, word) in changes(input) {
        let number = usize::from(what) % count;
        let Some(file) = &mut files[number] else { continue };
        match what >> 5 {
            0 => exchange(&mut file.bytes, file.entries[at % file.entries.len()], word[0]),
            1 => file.bytes.truncate(at),
            2 => files[number] = None,
            3 => file.bytes.resize(file.bytes.len() + at % 5000, 0),
            4 => put(&mut file.bytes, at, &word[..1]),
            _ => put(&mut file.bytes, at / 8 * 8, &word),
        }
    }
    let place = place();
    let folder = place.folder.join(DISK.to_string());
    std::fs::create_dir_all(&folder).expect("a folder");
    for mut file in files.into_iter().flatten() {
        if flags & 1 != 0 {
            let heads = std::iter::once(0).chain(file.entries.iter().copied());
            heads.for_each(|at| seal(&mut file.bytes, at, 64));
        }
        std::fs::write(folder.join(&file.name), &file.bytes).expect("written");
    }
    let _ = host_agent::spool::left_behind(&place);
    let mut spool = Spool::open(&place, DISK, EPOCH);
    let given = read_spool(&mut spool);
    assert_eq!(spool.last().map(|last| last.lsn), given.map(|(_, last)| last));
    if let Some((first, last)) = given {
        assert_eq!(spool.first_lsn(), Some(first));
        // The frame behind it, which begins with an odd LSN as all of them do.
        let next = frame((last.0 + 1 - FIRST) / 2, DATA_BYTES);
        assert!(spool.append(Duration::ZERO, &next));
        drop(spool);
        spool = Spool::open(&place, DISK, EPOCH);
        assert_eq!(read_spool(&mut spool), Some((first, next.last_lsn)));
    }
    spool.clear();
    std::fs::remove_dir(&place.folder).expect("nothing is left behind");
}

/// Reads everything; from where to where.
fn read_spool(spool: &mut Spool) -> Option<(Lsn, Lsn)> {
    let mut given: Option<(Lsn, Lsn)> = None;
    while let Some(next) = spool.peek().expect("what was looked at has not changed") {
        assert!(given.is_none_or(|(_, last)| last.next() == next.first_lsn), "a hole");
        let meant = frame((next.first_lsn.0 - FIRST) / 2, DATA_BYTES);
        assert!(encoded(next) == encoded(&meant), "another frame than what was spooled");
        given = Some((given.map_or(next.first_lsn, |(first, _)| first), next.last_lsn));
        spool.advance();
    }
    given
}
