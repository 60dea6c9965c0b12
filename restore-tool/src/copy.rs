//! Copying an image block by block, and proving afterwards that the target holds it.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;

use blake3::Hash;

use crate::buffer::Buffer;
use crate::error::RestoreError;
use crate::limits::{BLOCK_BYTES, GRAIN_BYTES, STRETCH_BYTES, ZERO_BYTES};
use crate::output::Output;
use crate::restore::Stop;
use crate::source::Image;

/// What was written, block by block: enough to prove later that it is still there.
#[derive(Debug)]
pub(crate) struct Written {
    disk_bytes: u64,
    /// Ascending; between them are only zeroes.
    blocks: Vec<Block>,
    /// Bytes that are not holes.
    pub(crate) data_bytes: u64,
}

#[derive(Debug)]
struct Block {
    offset: u64,
    length: u64,
    hash: Hash,
}

/// What both passes need to know of their surroundings.
pub(crate) struct Pass<'a> {
    /// The target's name, for errors.
    pub(crate) path: &'a Path,
    /// Asked by a signal handler: stop soon.
    pub(crate) stop: &'a Stop,
    /// Told the position reached, in bytes of the disk.
    pub(crate) progress: &'a dyn Fn(u64),
}

impl Pass<'_> {
    fn reached(&self, position: u64) -> Result<(), RestoreError> {
        (self.progress)(position);
        if self.stop.is_asked() { Err(RestoreError::Interrupted) } else { Ok(()) }
    }

    fn failed(&self, operation: &'static str, offset: u64) -> impl FnOnce(io::Error) -> RestoreError {
        let path = self.path.to_owned();
        move |source| RestoreError::Output { path, operation, offset: Some(offset), source }
    }
}

/// A stretch of the disk that was read.
enum Stretch {
    /// Only zeroes, up to that position.
    Zeroes(u64),
    /// The first so many bytes of the buffer.
    Data(Buffer, usize),
}

/// Writes all of `image` to `output` and makes it durable. Each byte is written or zeroed exactly once, ascending. While one
/// stretch is written and made durable, another thread reads the next.
///
/// # Errors
/// `Source`, `Output` or `Interrupted`; the target is then incomplete.
pub(crate) fn copy(
    image: &mut dyn Image,
    output: &mut dyn Output,
    pass: &Pass,
) -> Result<Written, RestoreError> {
    let disk_bytes = image.disk_bytes();
    let mut written = Written { disk_bytes, blocks: Vec::new(), data_bytes: 0 };
    thread::scope(|scope| {
        // Whoever ends first, for whatever reason, drops its ends of both channels, and the other ends too.
        let (free, buffers) = mpsc::channel();
        let (read, stretches) = mpsc::sync_channel(0);
        for _ in 0..2 {
            // Sent to a receiver that is still here.
            let _ = free.send(Buffer::default());
        }
        let reader = thread::Builder::new().spawn_scoped(scope, move || read_all(image, &buffers, &read));
        let reader = reader.map_err(|error| no_reader(&error))?;
        let ended = write_all(stretches, &free, output, &mut written, pass);
        drop(free);
        // That it panicked is what `ended` says then.
        let _ = reader.join();
        ended
    })?;
    output.sync().map_err(pass.failed("making durable", 0))?;
    Ok(written)
}

/// Writes the stretches that come until the disk is whole, and gives their buffers back.
fn write_all(
    stretches: Receiver<Result<Stretch, RestoreError>>,
    free: &Sender<Buffer>,
    output: &mut dyn Output,
    written: &mut Written,
    pass: &Pass,
) -> Result<(), RestoreError> {
    let mut position = 0;
    while position < written.disk_bytes {
        match stretches.recv().unwrap_or_else(|_| Err(reader_panicked()))? {
            Stretch::Zeroes(end) => {
                while position < end {
                    let length = (end - position).min(ZERO_BYTES);
                    output.zero(position, length).map_err(pass.failed("zeroing", position))?;
                    position += length;
                    pass.reached(position)?;
                }
            }
            Stretch::Data(buffer, length) => {
                for bytes in buffer[..length].chunks(BLOCK_BYTES as usize) {
                    let data = write_sparse(output, position, bytes);
                    written.data_bytes += data.map_err(pass.failed("writing", position))?;
                    let (length, hash) = (bytes.len() as u64, blake3::hash(bytes));
                    written.blocks.push(Block { offset: position, length, hash });
                    position += length;
                    pass.reached(position)?;
                }
                // Not only at the end: the disk works while the next stretch is read and decompressed.
                output.sync().map_err(pass.failed("making durable", position))?;
                // A reader that has read everything takes no buffer back.
                let _ = free.send(buffer);
            }
        }
    }
    Ok(())
}

fn no_reader(error: &io::Error) -> RestoreError {
    RestoreError::Source {
        what: "the journal".to_owned(),
        detail: format!("no thread can be started to read it: {error}"),
        hint: "raise the limit of processes (ulimit -u, or that of the container or service)".to_owned(),
    }
}

fn reader_panicked() -> RestoreError {
    RestoreError::Source {
        what: "the journal".to_owned(),
        detail: "the thread that reads it panicked".to_owned(),
        hint: "report this as a bug".to_owned(),
    }
}

/// Reads all of `image`, stretch by stretch, until that is done, fails, or nobody wants more.
fn read_all(
    image: &mut dyn Image,
    buffers: &Receiver<Buffer>,
    read: &SyncSender<Result<Stretch, RestoreError>>,
) {
    let mut position = 0;
    while position < image.disk_bytes() {
        let stretch = read_next(image, &mut position, buffers);
        if read.send(stretch.and_then(|stretch| stretch.ok_or(RestoreError::Interrupted))).is_err() {
            return;
        }
    }
}

/// Reads the stretch that begins at `position`, which is then at its end; `None` when no buffer comes back.
fn read_next(
    image: &mut dyn Image,
    position: &mut u64,
    buffers: &Receiver<Buffer>,
) -> Result<Option<Stretch>, RestoreError> {
    let (begin, disk_bytes) = (*position, image.disk_bytes());
    // Data is read by whole blocks.
    let mut next_block = |from: u64| {
        let data = image.next_data(from)?.map_or(disk_bytes, |stretch| stretch.start);
        Ok(if data == disk_bytes { disk_bytes } else { data - data % BLOCK_BYTES })
    };
    let data = next_block(begin)?;
    if data > begin {
        *position = data;
        return Ok(Some(Stretch::Zeroes(data)));
    }
    let mut end = begin;
    while end < disk_bytes && end - begin < STRETCH_BYTES && next_block(end)? == end {
        end = (end + BLOCK_BYTES).min(disk_bytes);
    }
    let Ok(mut buffer) = buffers.recv() else { return Ok(None) };
    let length = (end - begin) as usize;
    buffer.grow(length);
    image.read(begin, &mut buffer[..length])?;
    *position = end;
    Ok(Some(Stretch::Data(buffer, length)))
}

/// Writes the grains that are not zero and zeroes the others, in as few calls as possible. Returns the bytes written.
fn write_sparse(output: &mut dyn Output, offset: u64, bytes: &[u8]) -> io::Result<u64> {
    let mut written = 0;
    let mut at = 0;
    while at < bytes.len() {
        let zero = is_zero(grain(bytes, at));
        let mut end = at;
        while end < bytes.len() && is_zero(grain(bytes, end)) == zero {
            end = (end + GRAIN_BYTES).min(bytes.len());
        }
        if zero {
            output.zero(offset + at as u64, (end - at) as u64)?;
        } else {
            output.write(offset + at as u64, &bytes[at..end])?;
            written += (end - at) as u64;
        }
        at = end;
    }
    Ok(written)
}

fn grain(bytes: &[u8], at: usize) -> &[u8] {
    &bytes[at..(at + GRAIN_BYTES).min(bytes.len())]
}

fn is_zero(bytes: &[u8]) -> bool {
    // By pieces, which the compiler looks at with wide registers.
    bytes.chunks(64).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Reads the target back and compares: blocks by their hash, everything else with zeroes.
///
/// # Errors
/// `Verify` for the first block that differs, `Output` when reading fails, or `Interrupted`.
pub(crate) fn verify(output: &mut dyn Output, written: &Written, pass: &Pass) -> Result<(), RestoreError> {
    let mut buffer = Buffer::default();
    buffer.grow(BLOCK_BYTES as usize);
    let mut position = 0;
    for block in &written.blocks {
        verify_zeroes(output, position, block.offset, &mut buffer, pass)?;
        let bytes = &mut buffer[..block.length as usize];
        output.read(block.offset, bytes).map_err(pass.failed("reading back", block.offset))?;
        if blake3::hash(bytes) != block.hash {
            return Err(differs(pass, block.offset, block.length));
        }
        position = block.offset + block.length;
        pass.reached(position)?;
    }
    verify_zeroes(output, position, written.disk_bytes, &mut buffer, pass)
}

fn verify_zeroes(
    output: &mut dyn Output,
    mut position: u64,
    end: u64,
    buffer: &mut [u8],
    pass: &Pass,
) -> Result<(), RestoreError> {
    while position < end {
        position =
            output.next_stored(position, end).map_err(pass.failed("looking for holes in", position))?;
        let length = (end - position).min(BLOCK_BYTES);
        let bytes = &mut buffer[..length as usize];
        output.read(position, bytes).map_err(pass.failed("reading back", position))?;
        if !is_zero(bytes) {
            return Err(differs(pass, position, length));
        }
        position += length;
        pass.reached(position)?;
    }
    Ok(())
}

fn differs(pass: &Pass, offset: u64, length: u64) -> RestoreError {
    RestoreError::Verify { path: pass.path.to_owned(), offset, length }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use cdp_api::{PointKind, ResolvedPoint};
    use proptest::prelude::*;

    use super::*;
    use crate::output::{Qcow2File, RawFile};
    use crate::source::DiskName;

    /// An image in memory whose stretches of data may lie anywhere and may hold zeroes too.
    struct Memory {
        name: DiskName,
        point: ResolvedPoint,
        bytes: Vec<u8>,
        stretches: Vec<Range<u64>>,
    }

    impl std::fmt::Debug for Memory {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{} bytes, data in {:?}", self.bytes.len(), self.stretches)
        }
    }

    impl Memory {
        fn new(bytes: Vec<u8>, stretches: Vec<Range<u64>>) -> Self {
            let name =
                DiskName { id: String::new(), vm: String::new(), device: String::new(), host: String::new() };
            Self { name, point: ResolvedPoint::new(1, 1, PointKind::Write, true), bytes, stretches }
        }
    }

    impl Image for Memory {
        fn disk(&self) -> &DiskName {
            &self.name
        }
        fn point(&self) -> &ResolvedPoint {
            &self.point
        }
        fn disk_bytes(&self) -> u64 {
            self.bytes.len() as u64
        }
        fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError> {
            let next = self.stretches.iter().find(|stretch| stretch.end > from);
            Ok(next.map(|stretch| stretch.start.max(from)..stretch.end))
        }
        fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), RestoreError> {
            into.copy_from_slice(&self.bytes[offset as usize..offset as usize + into.len()]);
            Ok(())
        }
    }

    /// A target in memory that held something else before, and may lie or fail.
    struct Target {
        bytes: Vec<u8>,
        /// The write with this number is lost.
        loses: Option<usize>,
        /// The write with this number finds no space.
        full_at: Option<usize>,
        writes: usize,
    }

    impl Target {
        fn of(length: usize) -> Self {
            Self { bytes: vec![0xaa; length], loses: None, full_at: None, writes: 0 }
        }
        fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.writes += 1;
            if self.full_at == Some(self.writes) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if self.loses != Some(self.writes) {
                self.bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data);
            }
            Ok(())
        }
    }

    impl Output for Target {
        fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.put(offset, data)
        }
        fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
            self.put(offset, &vec![0; length as usize])
        }
        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn next_stored(&mut self, from: u64, _end: u64) -> io::Result<u64> {
            Ok(from)
        }
        fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            into.copy_from_slice(&self.bytes[offset as usize..offset as usize + into.len()]);
            Ok(())
        }
    }

    fn quietly<T>(run: impl FnOnce(&Pass) -> T) -> T {
        let stop = Stop::default();
        run(&Pass { path: Path::new("target"), stop: &stop, progress: &|_| () })
    }

    fn restore(image: &mut Memory, output: &mut dyn Output) -> Result<Written, RestoreError> {
        quietly(|pass| {
            let written = copy(image, output, pass)?;
            verify(output, &written, pass)?;
            Ok(written)
        })
    }

    /// Three blocks and a bit, with data at both ends, across a block's border, and stretches that hold zeroes.
    fn example() -> Memory {
        let block = BLOCK_BYTES;
        let stretches = vec![0..10_000, block - 5..block + 5_000, 3 * block + 4096..3 * block + 12_000];
        let mut bytes = vec![0; 3 * block as usize + 12_000];
        for stretch in &stretches {
            bytes[stretch.start as usize..stretch.end as usize].fill(7);
        }
        bytes[4096..8192].fill(0);
        Memory::new(bytes, stretches)
    }

    #[test]
    fn a_target_that_held_something_else_holds_the_image_afterwards() {
        let mut image = example();
        let mut target = Target::of(image.bytes.len());
        let written = restore(&mut image, &mut target).expect("restores");
        assert!(target.bytes == image.bytes);
        assert!(written.data_bytes < 40_000, "zeroes are not written as data: {}", written.data_bytes);
    }

    #[test]
    fn every_lost_write_is_found() {
        let mut count = Target::of(example().bytes.len());
        restore(&mut example(), &mut count).expect("restores");
        for lost in 1..=count.writes {
            let mut target = Target::of(example().bytes.len());
            target.loses = Some(lost);
            let found = restore(&mut example(), &mut target);
            assert!(matches!(found, Err(RestoreError::Verify { .. })), "lost write {lost}: {found:?}");
        }
    }

    #[test]
    fn a_full_target_is_said_to_be_full() {
        let mut target = Target::of(example().bytes.len());
        target.full_at = Some(3);
        let error = restore(&mut example(), &mut target).expect_err("it is full");
        assert!(error.hint().contains("free some space"), "{error}: {}", error.hint());
    }

    /// Does nothing, and gets a signal when it is asked to zero.
    struct Signalled<'a> {
        stop: &'a Stop,
        zeroed: u64,
    }

    impl Output for Signalled<'_> {
        fn write(&mut self, _offset: u64, _data: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn zero(&mut self, _offset: u64, length: u64) -> io::Result<()> {
            let _ = self.stop.ask();
            self.zeroed += length;
            Ok(())
        }
        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn next_stored(&mut self, from: u64, _end: u64) -> io::Result<u64> {
            Ok(from)
        }
        fn read(&mut self, _offset: u64, _into: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_signal_stops_it_inside_a_long_stretch_of_zeroes() {
        let stop = Stop::default();
        let pass = Pass { path: Path::new("target"), stop: &stop, progress: &|_| () };
        let mut output = Signalled { stop: &stop, zeroed: 0 };
        let (end, stretches) = mpsc::sync_channel(1);
        end.send(Ok(Stretch::Zeroes(1 << 40))).expect("it is read");
        let mut written = Written { disk_bytes: 1 << 40, blocks: Vec::new(), data_bytes: 0 };
        let ended = write_all(stretches, &mpsc::channel().0, &mut output, &mut written, &pass);
        assert!(matches!(ended, Err(RestoreError::Interrupted)));
        assert_eq!(output.zeroed, ZERO_BYTES, "nothing after the signal");
    }

    #[test]
    fn a_signal_stops_it() {
        let stop = Stop::default();
        assert!(stop.ask());
        let pass = Pass { path: Path::new("target"), stop: &stop, progress: &|_| () };
        let mut target = Target::of(example().bytes.len());
        assert!(matches!(copy(&mut example(), &mut target, &pass), Err(RestoreError::Interrupted)));
    }

    /// An image that cannot be read without a panic.
    struct Panics(Memory);

    impl Image for Panics {
        fn disk(&self) -> &DiskName {
            self.0.disk()
        }
        fn point(&self) -> &ResolvedPoint {
            self.0.point()
        }
        fn disk_bytes(&self) -> u64 {
            self.0.disk_bytes()
        }
        fn next_data(&mut self, from: u64) -> Result<Option<Range<u64>>, RestoreError> {
            self.0.next_data(from)
        }
        fn read(&mut self, _offset: u64, _into: &mut [u8]) -> Result<(), RestoreError> {
            panic!("on purpose")
        }
    }

    #[test]
    fn a_reader_that_panics_is_an_error_of_the_restore() {
        let mut target = Target::of(example().bytes.len());
        let error = quietly(|pass| copy(&mut Panics(example()), &mut target, pass)).expect_err("no image");
        assert!(error.hint().contains("report this"), "{error}: {}", error.hint());
    }

    fn qemu_img(arguments: &[&str], files: &[&Path]) {
        let status =
            std::process::Command::new("qemu-img").args(arguments).args(files).status().expect("qemu-img");
        assert!(status.success(), "qemu-img {arguments:?}: {status}");
    }

    fn any_image() -> impl Strategy<Value = Memory> {
        let length = 1..3 * BLOCK_BYTES;
        let stretch = (0..3 * BLOCK_BYTES, 1..600_000_u64, any::<u8>());
        (length, prop::collection::vec(stretch, 0..8)).prop_map(|(length, mut list)| {
            list.sort_unstable();
            let mut bytes = vec![0; length as usize];
            let mut stretches: Vec<Range<u64>> = Vec::new();
            for (offset, size, value) in list {
                let start = offset.max(stretches.last().map_or(0, |last| last.end));
                let end = (start + size).min(length);
                if start < end {
                    bytes[start as usize..end as usize].fill(value);
                    stretches.push(start..end);
                }
            }
            Memory::new(bytes, stretches)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_image_reaches_a_raw_file(mut image in any_image()) {
            let file = tempfile::NamedTempFile::new().expect("file");
            let mut output = RawFile::create(file.reopen().expect("file"), image.disk_bytes()).expect("create");
            restore(&mut image, &mut output).expect("restores");
            prop_assert!(std::fs::read(file.path()).expect("file") == image.bytes);
        }

        #[test]
        fn any_image_reaches_a_qcow2_file(mut image in any_image()) {
            let file = tempfile::NamedTempFile::new().expect("file");
            let mut output = Qcow2File::create(file.reopen().expect("file"), image.disk_bytes()).expect("create");
            restore(&mut image, &mut output).expect("restores");
            drop(output);
            let raw = tempfile::NamedTempFile::new().expect("file");
            std::fs::write(raw.path(), &image.bytes).expect("write");
            qemu_img(&["check", "-q", "-f", "qcow2"], &[file.path()]);
            // QEMU counts in sectors; the rest of the last one is zeroes in both.
            raw.as_file().set_len(image.disk_bytes().next_multiple_of(512)).expect("size");
            qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[raw.path(), file.path()]);
        }
    }
}
