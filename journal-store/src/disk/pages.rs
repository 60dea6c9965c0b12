//! Whole pages that are gathered in memory before they are written: what can go past the page cache.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use journal_format::segment::PAGE_BYTES;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::behind::{Behind, Piece, UnderWay};
use crate::io::{File, copy_around_caches};
use crate::limits::DIRECT_BYTES;
use crate::pool::Pool;

/// So many times smaller a piece is where there is no room for a whole one.
const SMALL_PIECES: usize = 16;

const PAGE: usize = PAGE_BYTES as usize;

/// A page of memory that begins where a page begins, as writing past the page cache needs it.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Debug)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; PAGE]);

const _: () = assert!(align_of::<Page>() == PAGE && size_of::<Page>() == PAGE);

/// What the disks of a store share to write pages.
#[derive(Debug)]
pub(crate) struct PageWriting {
    /// Pages that were gathered and written, for the next disk that needs some.
    pub(crate) free: Pool<Vec<Page>>,
    /// Whether pages that should have gone past the page cache went through it.
    pub(crate) cached: AtomicBool,
    pub(super) behind: Behind,
    piece_bytes: usize,
    /// Disks that may still gather a whole piece before their step has brought one: as many as memory is kept for.
    rooms: Mutex<usize>,
}

impl PageWriting {
    /// For pieces of so many bytes, with memory for so many of them, of which at most so many are under way while the next is
    /// gathered.
    pub(crate) fn new(piece_bytes: usize, whole_pieces: usize, under_way: usize) -> Self {
        let free = Pool::new(whole_pieces.saturating_mul(piece_bytes));
        let (cached, rooms) = (AtomicBool::new(false), Mutex::new(whole_pieces));
        Self { free, cached, behind: Behind::new(under_way), piece_bytes, rooms }
    }

    fn rooms(&self) -> MutexGuard<'_, usize> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes memory back.
    pub(super) fn put(&self, pages: Vec<Page>) {
        let bytes = pages.capacity().saturating_mul(PAGE);
        self.free.put(pages, bytes);
    }
}

/// Bytes that wait to be written, from the begin of a page on. It has memory only while something waits.
#[derive(Debug)]
pub(super) struct Gathered {
    shared: Arc<PageWriting>,
    /// Grows up to a small piece as it is filled: a disk that writes little holds little.
    pages: Vec<Page>,
    used_bytes: usize,
    /// Bytes of this durability step that were written, or are on their way.
    step_bytes: usize,
    /// Whether it has one of [`PageWriting::rooms`], until the step ends.
    has_room: bool,
    under_way: UnderWay,
}

impl Gathered {
    /// Nothing yet.
    pub(super) fn new(shared: Arc<PageWriting>) -> Self {
        let under_way = UnderWay::default();
        Self { shared, pages: Vec::new(), used_bytes: 0, step_bytes: 0, has_room: false, under_way }
    }

    /// Bytes that wait.
    pub(super) const fn len(&self) -> usize {
        self.used_bytes
    }

    /// Whether it is full: then it ends with a page.
    pub(super) fn is_full(&self) -> bool {
        self.used_bytes == self.most_pages() * PAGE
    }

    /// Whether pieces are whole ones now, past the page cache: there is room for one, or this step has had as much already.
    fn is_large(&self) -> bool {
        self.has_room || self.step_bytes >= self.shared.piece_bytes
    }

    /// Pages that a piece may have now. Small ones for one disk among many, until its step is large.
    fn most_pages(&self) -> usize {
        let most = self.shared.piece_bytes / PAGE;
        let most = if self.is_large() { most } else { most / SMALL_PIECES };
        if most == 0 { 1 } else { most }
    }

    /// Takes as much of `bytes` as it has room for; what is left.
    pub(super) fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        if !self.is_large() && self.used_bytes.saturating_add(bytes.len()) > self.most_pages() * PAGE {
            self.take_room();
        }
        let room = (self.most_pages() * PAGE).saturating_sub(self.used_bytes);
        let (now, later) = bytes.split_at(room.min(bytes.len()));
        let end = self.used_bytes.saturating_add(now.len());
        let large = self.is_large();
        self.grow(end.div_ceil(PAGE));
        if let Some(place) = self.pages.as_mut_bytes().get_mut(self.used_bytes..end) {
            // ORDERING: Relaxed: it is only about speed. What goes through the page cache is read by this core next.
            if large && !self.shared.cached.load(Ordering::Relaxed) {
                copy_around_caches(place, now);
            } else {
                place.copy_from_slice(now);
            }
        }
        self.used_bytes = end;
        later
    }

    /// Asks for room for a whole piece, which not all disks of a commit can have.
    fn take_room(&mut self) {
        let mut rooms = self.shared.rooms();
        (*rooms, self.has_room) = rooms.checked_sub(1).map_or((0, false), |left| (left, true));
    }

    /// Writes what waits, with zeroes up to the end of the last page, at `position`: a full piece, or the rest of a step. A large one
    /// may still be on its way afterwards.
    ///
    /// # Errors
    /// What the operating system says, of this piece or of an earlier one.
    pub(super) fn write(&mut self, file: &Arc<dyn File>, position: u64) -> io::Result<()> {
        let direct = self.is_large() && (self.is_full() || self.used_bytes >= DIRECT_BYTES);
        let pages = self.padded();
        if !direct {
            return file.write_at(pages, position);
        }
        let bytes = pages.len();
        let (file, pages) = (Arc::clone(file), std::mem::take(&mut self.pages));
        let (shared, ticket) = (Arc::clone(&self.shared), self.under_way.ticket());
        self.shared.behind.write(Piece { file, pages, bytes, position, shared, ticket });
        self.under_way.so_far()
    }

    /// What waits, with zeroes up to the end of the last page.
    fn padded(&mut self) -> &[u8] {
        let end = self.used_bytes.next_multiple_of(PAGE);
        let bytes = self.pages.as_mut_bytes();
        if let Some(rest) = bytes.get_mut(self.used_bytes..end) {
            rest.fill(0);
        }
        bytes.get(..end).unwrap_or_default()
    }

    /// Nothing waits any more, and more will come.
    pub(super) const fn clear(&mut self) {
        self.step_bytes = self.step_bytes.saturating_add(self.used_bytes);
        self.used_bytes = 0;
    }

    /// The step ends, nothing waits any more, and nothing is on its way; the memory is for others.
    ///
    /// # Errors
    /// As [`Gathered::write`].
    pub(super) fn finish(&mut self) -> io::Result<()> {
        // Then the memory of what was on its way is there for the next, too.
        let written = self.under_way.all();
        self.give_up();
        written
    }

    /// Nothing waits any more, and the memory is for others; what is on its way is not waited for.
    pub(super) fn give_up(&mut self) {
        (self.used_bytes, self.step_bytes) = (0, 0);
        self.shared.put(std::mem::take(&mut self.pages));
        if std::mem::take(&mut self.has_room) {
            *self.shared.rooms() += 1;
        }
    }

    /// Has memory for so many pages, at least. What it holds from before is never read before it is written.
    fn grow(&mut self, pages: usize) {
        if self.pages.is_empty() {
            self.pages = self.shared.free.take().unwrap_or_default();
        }
        if self.pages.len() < pages {
            // Whoever has room for a whole piece takes it at once: growing costs a copy into new memory each time.
            let most = self.most_pages();
            let more = if self.is_large() { most } else { pages.max(self.pages.len() * 2).min(most) };
            self.pages.resize(more, Page::new_zeroed());
        }
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        // Nobody is left to be told; what was not made durable was never promised.
        let _lost = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use journal_format::{
        ByteRange, Codec, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, Stamp, frame,
    };

    use super::*;
    use crate::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage};
    use crate::{Store, StoreConfig};

    #[test]
    fn it_holds_what_it_was_given_and_memory_only_while_something_waits() {
        let shared = Arc::new(PageWriting::new(4 * SMALL_PIECES * PAGE, 2, 0));
        let mut gathered = Gathered::new(Arc::clone(&shared));
        assert_eq!(gathered.fill(&[1; 5000]).len(), 0);
        assert_eq!(gathered.fill(&[2; 100]).len(), 0);
        let expected = [vec![1; 5000], vec![2; 100], vec![0; 2 * PAGE - 5100]].concat();
        assert_eq!(gathered.len(), 5100);
        assert_eq!(gathered.padded(), expected);
        assert!(gathered.padded().as_ptr().cast::<Page>().is_aligned());
        assert_eq!((gathered.fill(&[3; 4 * PAGE]).len(), gathered.is_full()), (0, false));
        assert_eq!(gathered.len(), 5100 + 4 * PAGE);
        gathered.finish().unwrap();
        assert_eq!(gathered.len(), 0);
        assert_eq!(shared.free.bytes(), 4 * SMALL_PIECES * PAGE, "it had taken a whole piece");
        // What was there before shows nowhere.
        let mut other = Gathered::new(Arc::clone(&shared));
        other.fill(&[4; 10]);
        assert_eq!(other.padded(), [vec![4; 10], vec![0; PAGE - 10]].concat());
        assert_eq!(shared.free.bytes(), 0);
        drop(other);
        assert!(shared.free.bytes() > 0, "it is not lost with a disk");
    }

    #[test]
    fn a_few_disks_gather_whole_pieces_and_many_do_when_their_step_is_large() {
        let storage = MemStorage::new();
        crate::io::Storage::create_dir(&storage, std::path::Path::new("/")).unwrap();
        let file = crate::io::Storage::create(&storage, std::path::Path::new("/file")).unwrap();
        let piece = 4 * SMALL_PIECES * PAGE;
        let shared = Arc::new(PageWriting::new(piece, 4, 0));
        let small = piece / SMALL_PIECES;
        let mut few: Vec<Gathered> = (0..4).map(|_| Gathered::new(Arc::clone(&shared))).collect();
        for one in &mut few {
            assert_eq!(one.fill(&vec![1; small]).len(), 0);
            assert_eq!((one.is_large(), one.is_full()), (false, true), "a small step needs no room");
            assert_eq!(one.fill(&vec![1; small]).len(), 0);
            assert_eq!((one.len(), one.is_large(), one.is_full()), (2 * small, true, false));
        }
        // No room is left: small pieces through the cache, until the step has brought a piece.
        let mut more = Gathered::new(Arc::clone(&shared));
        let mut pieces = Vec::new();
        for _ in 0..SMALL_PIECES + 2 {
            more.fill(&vec![1; piece]);
            assert!(more.is_full());
            more.write(&file, 0).unwrap();
            pieces.push((more.len(), more.is_large()));
            more.clear();
        }
        assert_eq!(pieces[..SMALL_PIECES], [(small, false); SMALL_PIECES]);
        assert_eq!(pieces[SMALL_PIECES..], [(piece, true); 2]);
        more.finish().unwrap();
        assert!(shared.free.bytes() >= piece, "memory of pieces comes back");
        // A step that ends, and a disk that goes, leave their room to others; whoever had none leaves none.
        more.fill(&vec![1; 2 * small]);
        assert_eq!((more.len(), more.is_large()), (small, false));
        few[0].finish().unwrap();
        more.clear();
        more.fill(&vec![1; 2 * small]);
        assert_eq!((more.len(), more.is_large()), (2 * small, true));
        assert_eq!(*shared.rooms(), 0);
        // As does one that will write no more, though somebody keeps it.
        let memory = shared.free.bytes();
        few[1].give_up();
        assert_eq!((*shared.rooms(), few[1].len()), (1, 0));
        assert!(shared.free.bytes() > memory);
        drop((few, more));
        assert_eq!(*shared.rooms(), 4);
    }
    /// Fails writes to metadata files, once it is told to: a frame's data waits then, and its head never comes.
    #[derive(Default, Debug)]
    struct NoHeads(AtomicBool);

    impl Hook for NoHeads {
        fn before(&self, call: &Call<'_>) -> Answer {
            let is_head = call.kind == CallKind::Write && call.path.to_string_lossy().contains("meta-");
            if is_head && self.0.load(Ordering::Relaxed) {
                return Answer::Fail(io::ErrorKind::StorageFull.into());
            }
            Answer::Go
        }
    }

    #[test]
    fn a_disk_that_is_poisoned_gives_its_memory_back_though_somebody_keeps_it() {
        const DISK: DiskId = DiskId([7; 16]);
        const BYTES: u32 = 256 << 10;
        let hook = Arc::new(NoHeads::default());
        let storage = HookStorage::new(Arc::new(MemStorage::new()), Arc::clone(&hook) as Arc<dyn Hook>);
        let config = StoreConfig { waiting_bytes: 0, ..StoreConfig::default() };
        let (rooms, piece) = (config.whole_pieces, config.piece_bytes);
        let store = Store::open_with("/store", Arc::new(storage), config).unwrap();
        let disk = store.open_or_create(DISK, 1 << 30).unwrap();
        let frame = |first: u64, ops: &[Op]| {
            let records: Vec<_> = (first..)
                .zip(ops)
                .map(|(lsn, op)| Record { lsn: Lsn(lsn), stamp: Stamp(lsn), op: *op })
                .collect();
            let meta = FrameMeta {
                disk: DISK,
                epoch: Epoch(1),
                first_lsn: Lsn(first),
                disk_bytes: 1 << 30,
                codec: Codec::Raw,
                raw_bytes: BYTES,
            };
            frame::encode(&meta, &records, &vec![1; BYTES as usize]).unwrap()
        };
        let range = ByteRange::new(0, BYTES.into()).unwrap();
        let write = Op::Write { range, data: DataSpan { pos: 0, len: BYTES }, fill: false, fua: false };
        let begins = Op::GapBegin { reason: GapReason::Attach, generation: 1 };
        store.append(&Frame::parse(&frame(1, &[begins, write])).unwrap()).unwrap();
        assert_eq!(*disk.env.pages.rooms(), rooms - 1, "more waits than a small piece has");
        hook.0.store(true, Ordering::Relaxed);
        store.append(&Frame::parse(&frame(3, &[write])).unwrap()).unwrap_err();
        assert!(disk.is_poisoned());
        assert_eq!((*disk.env.pages.rooms(), disk.env.pages.free.bytes()), (rooms, piece));
    }
}
