//! A worker that is about to go on where another agent's stopped.
//!
//! Two steps, because of what the filter holds: until it has the new outbox, the old one is what the next agent will
//! find if this one dies, and it speaks of a ring in which nothing has changed. Only then the ring is touched.

use std::io;
use std::sync::Arc;

use capture_ring::{Consumer, HostClock, Ring, RingError};
use journal_format::{DiskId, Epoch, Lsn};

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
    spool: Spool,
    consumer: Option<Consumer>,
    packed: Packed,
    freed: (Lsn, u8),
    last: Lsn,
}

impl Parked {
    /// Reads what the spool has behind the outbox.
    ///
    /// # Errors
    /// When a file of the spool cannot be read, or the spool does not go on where the outbox ends.
    pub fn new(adopted: Adopted, mut spool: Spool, of: (DiskId, Epoch)) -> io::Result<Self> {
        let Adopted { outbox: _, writer, packed, last, freed } = adopted;
        spool.pass(last)?;
        if spool.peek()?.is_some_and(|frame| frame.first_lsn != last.next()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the first frames in the spool are gone"));
        }
        Ok(Self { of, writer, spool, consumer: None, packed, freed, last })
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
        let (writer, packed) = (&mut self.writer, self.packed);
        let before = |lsn, piece| writer.freeing(lsn, piece);
        self.consumer =
            Some(Consumer::adopt(ring, clock, packed.lsn.next(), packed.stamp, self.freed, before)?);
        Ok(())
    }

    /// The worker.
    #[must_use]
    pub fn into_worker(self) -> Worker {
        let packer = Packer::new(self.of.0, self.of.1, self.packed.disk_bytes);
        Worker::new(self.of, self.consumer, self.writer, packer, self.spool, self.last)
    }
}
