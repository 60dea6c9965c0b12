//! Hashes of 64 KiB chunks of a disk, by which agent and server find out what differs.
//!
//! blake3, the first 16 bytes. Its enemy is chance: two different chunks have the same hash once in 2^128 pairs. (A guest
//! that wanted two of its own chunks to collide would need 2^64 tries, and would spoil nothing but its own history.)

use crate::limits::DIRTY_CHUNK_BYTES;

/// Bytes of disk behind one hash: those behind one bit of the dirty bitmap.
pub const CHUNK_BYTES: usize = DIRTY_CHUNK_BYTES as usize;
/// Encoded size of a hash, in bytes.
pub const CHUNK_HASH_BYTES: usize = 16;

/// Hash of a chunk's contents. A chunk that the disk's end cuts is hashed as if zeroes followed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChunkHash(pub [u8; CHUNK_HASH_BYTES]);

impl ChunkHash {
    /// Stands for a chunk whose contents are not known; as a hash no chunk has it in practice, and one that had would
    /// only be copied without need.
    pub const UNKNOWN: Self = Self([0; CHUNK_HASH_BYTES]);

    /// The hash of a chunk that begins with these bytes and has zeroes behind them. What is longer than a chunk is
    /// cut.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];
        let data = data.get(..CHUNK_BYTES).unwrap_or(data);
        let mut hasher = blake3::Hasher::new();
        hasher.update(data);
        hasher.update(ZEROES.get(data.len()..).unwrap_or_default());
        let mut hash = [0; CHUNK_HASH_BYTES];
        hasher.finalize_xof().fill(&mut hash);
        Self(hash)
    }

    /// The hashes in the bytes of a message; a rest that is no whole hash is left out.
    pub fn all_in(bytes: &[u8]) -> impl Iterator<Item = Self> {
        bytes.as_chunks().0.iter().map(|hash| Self(*hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_chunk_has_the_hash_of_one_with_zeroes_behind() {
        let mut whole = vec![7; 5000];
        let cut = ChunkHash::of(&whole);
        whole.resize(CHUNK_BYTES, 0);
        assert_eq!(ChunkHash::of(&whole), cut);
        whole[CHUNK_BYTES - 1] = 1;
        assert_ne!(ChunkHash::of(&whole), cut);
    }

    #[test]
    fn the_hash_is_the_beginning_of_blake3() {
        let data = [3; CHUNK_BYTES];
        assert_eq!(ChunkHash::of(&data).0, blake3::hash(&data).as_bytes()[..CHUNK_HASH_BYTES]);
        assert_ne!(ChunkHash::of(&[]), ChunkHash::UNKNOWN);
    }
}
