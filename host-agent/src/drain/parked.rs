//! A worker that is about to go on where another agent's stopped.
//!
//! Two steps, because of what the filter holds: until it has the new outbox, the old one is what the next agent will
//! find if this one dies, and it speaks of a ring in which nothing has changed. Only then the ring is touched.

use std::io;
use std::sync::Arc;

use capture_ring::{Consumer, HostClock, Ring, RingError};
use journal_format::{DiskId, Epoch, Lsn, Op};

use super::worker::Worker;
use crate::outbox::adopt::Adopted;
use crate::outbox::{Outbox, OutboxWriter, Packed};
use crate::packer::Packer;
use crate::spool::Spool;

/// Everything of the worker but the ring's consumer.
#[derive(Debug)]
pub struct Parked {
    of: (DiskId, Epoch),
    writer: OutboxWriter,
    packer: Packer,
    spool: Spool,
    consumer: Option<Consumer>,
    /// The last record taken out of the ring.
    taken: Packed,
    left: Vec<u32>,
    last: Lsn,
}

impl Parked {
    /// Stages what the old outbox had staged, in the new one.
    ///
    /// # Errors
    /// When a file of the spool cannot be read, or the spool does not go on where the outbox ends.
    pub fn new(adopted: Adopted, mut spool: Spool, of: (DiskId, Epoch)) -> io::Result<Self> {
        let Adopted { outbox: _, mut writer, packed, last, staged, data, left } = adopted;
        spool.pass(last)?;
        if spool.peek()?.is_some_and(|frame| frame.first_lsn != last.next()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the first frames in the spool are gone"));
        }
        let mut packer = Packer::new(of.0, of.1, packed.disk_bytes);
        let mut taken = packed;
        for (number, record) in staged.iter().enumerate() {
            let span = match record.op {
                Op::Write { data, .. } | Op::Bookmark { name: data } => {
                    data.pos as usize..data.end() as usize
                }
                _ => 0..0,
            };
            packer.data().extend_from_slice(data.get(span).unwrap_or_default());
            packer.add(std::time::Duration::ZERO, *record);
            let is_last = number.saturating_add(1) == staged.len();
            writer.stage(record, packer.data_of(record), if is_last { &left } else { &[] });
            (taken.lsn, taken.stamp) = (record.lsn, record.stamp);
        }
        Ok(Self { of, writer, packer, spool, consumer: None, taken, left, last })
    }

    /// The new outbox, for the filter to hold.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        self.writer.outbox()
    }

    /// The last LSN of the frames in it.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.last
    }

    /// The filter holds the new outbox (or there is nothing to hold any more): takes the ring over.
    ///
    /// # Errors
    /// `Corrupt` when the ring does not go on where the outbox ends; it is unchanged then.
    pub fn resume(&mut self, ring: Option<(Arc<Ring>, HostClock)>) -> Result<(), RingError> {
        let Some((ring, clock)) = ring else { return Ok(()) };
        let (writer, taken) = (&mut self.writer, self.taken);
        let before = |piece| writer.freeing(taken.lsn, piece);
        self.consumer =
            Some(Consumer::adopt(ring, clock, taken.lsn.next(), taken.stamp, &self.left, before)?);
        Ok(())
    }

    /// The worker.
    #[must_use]
    pub fn into_worker(self) -> Worker {
        Worker::new(self.of, self.consumer, self.writer, self.packer, self.spool, self.last)
    }
}
