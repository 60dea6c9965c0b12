//! What can be set.

use crate::limits;

/// How a store works. The default is right for servers and restores.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// A segment is sealed when its data file has grown to this, in bytes.
    pub segment_data_bytes: u64,
    /// A segment is sealed when its metadata file has grown to this, in bytes.
    pub segment_meta_bytes: u64,
    /// A segment is sealed when it holds this many records.
    pub segment_records: u64,
    /// Decompressed data that is kept for the next read, in bytes, for the whole store.
    pub cache_bytes: usize,
    /// Most threads that a commit uses to make files durable at the same time; with 1 the order of I/O is always the same.
    pub sync_threads: usize,
    /// Bytes of small frames' heads that wait in memory until they are written together, for each disk; with 0 each head is
    /// written at once.
    pub waiting_bytes: usize,
    /// Bytes of data that are gathered in memory and written together, for each disk: whole pages, at least one.
    pub piece_bytes: usize,
    /// Disks of one commit that may gather a whole piece before their step has brought one, and pieces whose memory is kept for the
    /// next, for the whole store; with 0 every step begins with small ones.
    pub whole_pieces: usize,
    /// Pieces of large steps that a thread of the store may have before it while the next is gathered, for the whole store; with 0 they
    /// are written by whoever appends, and the order of I/O is always the same.
    pub pieces_under_way: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            segment_data_bytes: limits::SEGMENT_DATA_BYTES,
            segment_meta_bytes: limits::SEGMENT_META_BYTES,
            segment_records: limits::SEGMENT_RECORDS,
            cache_bytes: limits::CACHE_BYTES,
            sync_threads: limits::SYNC_THREADS,
            waiting_bytes: limits::WAITING_BYTES,
            piece_bytes: limits::PIECE_BYTES,
            whole_pieces: limits::WHOLE_PIECES,
            pieces_under_way: limits::PIECES_UNDER_WAY,
        }
    }
}
