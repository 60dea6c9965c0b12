//! What changed between two points.

use journal_format::index::chunk_of;
use journal_format::limits::INDEX_CHUNK_BYTES;
use journal_format::{ByteRange, Lsn};

use super::View;
use super::plan::Planner;
use crate::error::StoreError;

/// Ranges that were changed, in order, neighbours merged.
#[derive(Debug)]
pub(super) struct Changes {
    newer: View,
    after: Lsn,
    end: u64,
    /// Up to here everything is in `found`.
    position: u64,
    /// Long zeroes, merged, in order; those before `position` are gone.
    zeroes: std::iter::Peekable<std::vec::IntoIter<ByteRange>>,
    /// Changes that were worked out and not yet returned, in order.
    found: std::collections::VecDeque<ByteRange>,
}

impl Changes {
    /// Changes with LSNs after `after`, up to those of `newer`, at offsets before `end`.
    pub(super) fn between(newer: View, after: Lsn, end: u64) -> Self {
        let planner = Planner::new(&newer, after, newer.lsn);
        let whole = ByteRange::new(0, end);
        let zeroes = whole.map(|whole| planner.zeroes(whole)).unwrap_or_default();
        let clipped = zeroes.into_iter().flatten().filter_map(|(_, zeroes)| zeroes.intersection(whole?));
        let zeroes = merge(clipped.collect()).into_iter().peekable();
        let nothing = after >= newer.lsn;
        let position = if nothing { end } else { 0 };
        Self { newer, after, end, position, zeroes, found: std::collections::VecDeque::new() }
    }

    /// Works out the changes of the next chunk that has any, with the long zeroes before and in it.
    fn advance(&mut self) -> Result<(), StoreError> {
        let planner = Planner::new(&self.newer, self.after, self.newer.lsn);
        let content = planner.next_content(self.position, self.end)?;
        let mut changes = Vec::new();
        let mut next = self.end;
        if let Some(start) = content {
            let chunk = chunk_of(start);
            next = (u64::from(chunk) + 1).saturating_mul(INDEX_CHUNK_BYTES).min(self.end);
            changes = planner.extents(chunk)?;
        }
        while let Some(zeroes) = self.zeroes.next_if(|zeroes| zeroes.offset() < next) {
            changes.push(zeroes);
        }
        if let Some(rest) = ByteRange::new(0, self.end) {
            let clipped = changes.iter().filter_map(|change| change.intersection(rest)).collect();
            self.take(merge(clipped));
        }
        self.position = next;
        Ok(())
    }

    /// Appends changes, which begin at or after the chunk of the last found one.
    fn take(&mut self, changes: Vec<ByteRange>) {
        for change in changes {
            match self.found.back_mut() {
                Some(last) if change.offset() <= last.end() => *last = union(*last, change),
                _ => self.found.push_back(change),
            }
        }
    }
}

impl Iterator for Changes {
    type Item = Result<ByteRange, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        // The last one found may still grow by the next chunk's.
        while self.found.len() < 2 && self.position < self.end {
            if let Err(error) = self.advance() {
                self.found.clear();
                self.position = self.end;
                return Some(Err(error));
            }
        }
        self.found.pop_front().map(Ok)
    }
}

fn union(a: ByteRange, b: ByteRange) -> ByteRange {
    let start = a.offset().min(b.offset());
    ByteRange::new(start, a.end().max(b.end()) - start).unwrap_or(a)
}

/// Sorts ranges and makes one of those that overlap or touch.
fn merge(mut ranges: Vec<ByteRange>) -> Vec<ByteRange> {
    ranges.sort_unstable_by_key(|range| range.offset());
    let mut merged: Vec<ByteRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.offset() <= last.end() => *last = union(*last, range),
            _ => merged.push(range),
        }
    }
    merged
}
