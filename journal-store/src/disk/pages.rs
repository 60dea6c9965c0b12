//! Whole pages that are gathered in memory before they are written: what can go past the page cache.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use journal_format::segment::PAGE_BYTES;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::behind::{Behind, Piece, UnderWay};
use crate::io::File;
use crate::limits::{DIRECT_BYTES, FREE_PIECE_BYTES};
use crate::pool::Pool;

/// So many times smaller pieces are until a step is large.
const SMALL_PIECES: usize = 16;

/// A step of so many pieces has the next begin with a large one. Of many disks that have a piece or two each, as a commit of them
/// all brings, the pieces would need more memory than is kept.
const LARGE_PIECES: usize = 4;

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
}

impl PageWriting {
    /// For pieces of so many bytes, of which at most so many are under way while the next is gathered.
    pub(crate) fn new(piece_bytes: usize, under_way: usize) -> Self {
        let (free, cached) = (Pool::new(FREE_PIECE_BYTES), AtomicBool::new(false));
        Self { free, cached, behind: Behind::new(under_way), piece_bytes }
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
    /// Grows as it is filled: a disk that writes little holds little.
    pages: Vec<Page>,
    used_bytes: usize,
    /// Bytes of this durability step that were written, or are on their way.
    step_bytes: usize,
    /// Whether the step before had [`LARGE_PIECES`]: the next will most likely be large.
    was_large: bool,
    under_way: UnderWay,
}

impl Gathered {
    /// Nothing yet.
    pub(super) fn new(shared: Arc<PageWriting>) -> Self {
        let under_way = UnderWay::default();
        Self { shared, pages: Vec::new(), used_bytes: 0, step_bytes: 0, was_large: false, under_way }
    }

    /// Bytes that wait.
    pub(super) const fn len(&self) -> usize {
        self.used_bytes
    }

    /// Whether it is full: then it ends with a page.
    pub(super) fn is_full(&self) -> bool {
        self.used_bytes == self.most_pages() * PAGE
    }

    /// Whether this step has had a piece's worth already, or the one before: then the next pieces are whole ones, past the page cache.
    fn is_large(&self) -> bool {
        self.was_large || self.step_bytes >= self.shared.piece_bytes
    }

    /// Pages that a piece may have now. Small ones until the step is large: one disk among many holds little.
    fn most_pages(&self) -> usize {
        let most = self.shared.piece_bytes / PAGE;
        let most = if self.is_large() { most } else { most / SMALL_PIECES };
        if most == 0 { 1 } else { most }
    }

    /// Takes as much of `bytes` as it has room for; what is left.
    pub(super) fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let room = (self.most_pages() * PAGE).saturating_sub(self.used_bytes);
        let (now, later) = bytes.split_at(room.min(bytes.len()));
        let end = self.used_bytes.saturating_add(now.len());
        self.grow(end.div_ceil(PAGE));
        if let Some(place) = self.pages.as_mut_bytes().get_mut(self.used_bytes..end) {
            place.copy_from_slice(now);
        }
        self.used_bytes = end;
        later
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
        let step_bytes = self.step_bytes.saturating_add(self.used_bytes);
        self.was_large = step_bytes >= LARGE_PIECES * self.shared.piece_bytes;
        (self.used_bytes, self.step_bytes) = (0, 0);
        self.shared.put(std::mem::take(&mut self.pages));
        self.under_way.all()
    }

    /// Has memory for so many pages, at least. What it holds from before is never read before it is written.
    fn grow(&mut self, pages: usize) {
        if self.pages.is_empty() {
            self.pages = self.shared.free.take().unwrap_or_default();
        }
        if self.pages.len() < pages {
            // Of a step that is large itself much more will come; a disk that only had a large one before holds what it needs.
            let (most, is_large) = (self.most_pages(), self.step_bytes >= self.shared.piece_bytes);
            let more = if is_large { most } else { pages.max(self.pages.len() * 2).min(most) };
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
    use super::*;

    #[test]
    fn it_holds_what_it_was_given_and_memory_only_while_something_waits() {
        let shared = Arc::new(PageWriting::new(4 * SMALL_PIECES * PAGE, 0));
        let mut gathered = Gathered::new(Arc::clone(&shared));
        assert_eq!(gathered.fill(&[1; 5000]).len(), 0);
        assert_eq!(gathered.fill(&[2; 100]).len(), 0);
        let expected = [vec![1; 5000], vec![2; 100], vec![0; 2 * PAGE - 5100]].concat();
        assert_eq!(gathered.len(), 5100);
        assert_eq!(gathered.padded(), expected);
        assert!(gathered.padded().as_ptr().cast::<Page>().is_aligned());
        assert_eq!((gathered.fill(&[3; 4 * PAGE]).len(), gathered.is_full()), (5100, true));
        gathered.finish().unwrap();
        assert_eq!(gathered.len(), 0);
        assert!((4 * PAGE..8 * PAGE).contains(&shared.free.bytes()), "{}", shared.free.bytes());
        // What was there before shows nowhere.
        let mut other = Gathered::new(Arc::clone(&shared));
        other.fill(&[4; 10]);
        assert_eq!(other.padded(), [vec![4; 10], vec![0; PAGE - 10]].concat());
        assert_eq!(shared.free.bytes(), 0);
        drop(other);
        assert!(shared.free.bytes() > 0, "it is not lost with a disk");
    }

    #[test]
    fn a_small_step_goes_through_the_cache_and_a_large_one_past_it() {
        let storage = crate::io::MemStorage::new();
        crate::io::Storage::create_dir(&storage, std::path::Path::new("/")).unwrap();
        let file = crate::io::Storage::create(&storage, std::path::Path::new("/file")).unwrap();
        let shared = Arc::new(PageWriting::new(SMALL_PIECES * PAGE, 0));
        let mut gathered = Gathered::new(Arc::clone(&shared));
        let mut pieces = Vec::new();
        for _ in 0..SMALL_PIECES + LARGE_PIECES - 1 {
            gathered.fill(&vec![1; SMALL_PIECES * PAGE]);
            assert!(gathered.is_full());
            gathered.write(&file, 0).unwrap();
            pieces.push((gathered.len() / PAGE, gathered.is_large()));
            gathered.clear();
        }
        assert_eq!(pieces[..SMALL_PIECES], [(1, false); SMALL_PIECES]);
        assert_eq!(pieces[SMALL_PIECES..], [(SMALL_PIECES, true); LARGE_PIECES - 1]);
        gathered.finish().unwrap();
        assert!(shared.free.bytes() >= SMALL_PIECES * PAGE, "memory of pieces comes back");
        drop(shared.free.take());
        gathered.fill(&[1; 2 * PAGE]);
        assert_eq!(
            (gathered.len(), gathered.is_large()),
            (2 * PAGE, true),
            "the next step will be large too"
        );
        assert_eq!(gathered.pages.len(), 2, "but it holds what it was given");
        gathered.write(&file, 0).unwrap();
        gathered.clear();
        gathered.finish().unwrap();
        gathered.fill(&[1; 2 * PAGE]);
        assert_eq!((gathered.len(), gathered.is_large()), (PAGE, false), "it was not: back to small pieces");
    }
}
