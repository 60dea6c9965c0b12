//! Appends frames of 4 KiB writes to a store in a folder and prints the rate and the bytes of metadata for each record.
//!
//! `cargo run --release -p journal-store --example append_bench -- /folder [MiB]`

use std::time::Instant;

use journal_format::{
    ByteRange, DataSpan, DiskId, Epoch, Frame, FrameMeta, GapReason, Lsn, Op, Record, Stamp, codec, frame,
};
use journal_store::Store;

const WRITE_BYTES: u32 = 4096;
const WRITES_PER_FRAME: u32 = 128;
const DISK_BYTES: u64 = 64 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("give an empty folder to write to")?;
    let mib: u64 = args.next().map_or(Ok(1024), |text| text.parse())?;
    let (store, disk) = (Store::open(&folder)?, DiskId(*b"append-benchmark"));
    let journal = store.open_or_create(disk, DISK_BYTES)?;
    let mut packed = Vec::new();
    let (mut lsn, mut random) = (Lsn::FIRST, 88_172_645_463_325_252_u64);
    let raw_bytes = WRITE_BYTES * WRITES_PER_FRAME;
    let (begun, frames) = (Instant::now(), (mib << 20) / u64::from(raw_bytes));
    for number in 0..frames {
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut raw: Vec<u8> = (0..raw_bytes / 8).flat_map(|_| next().to_le_bytes()).collect();
        let mut records = Vec::new();
        for i in 0..WRITES_PER_FRAME {
            let range =
                ByteRange::new((next() % (DISK_BYTES >> 12)) << 12, u64::from(WRITE_BYTES)).ok_or("range")?;
            let data = DataSpan { pos: i * WRITE_BYTES, len: WRITE_BYTES };
            let gap = Op::GapBegin { reason: GapReason::Attach, generation: 1 };
            let op = if lsn == Lsn::FIRST { gap } else { Op::Write { range, data, fill: false, fua: false } };
            records.push(Record { lsn, stamp: Stamp(lsn.0), op });
            lsn = lsn.next();
        }
        let first_lsn = records.first().map_or(lsn, |record| record.lsn);
        let codec = codec::compress(&mut raw, 1, &mut packed);
        let meta = FrameMeta { disk, epoch: Epoch(1), first_lsn, disk_bytes: DISK_BYTES, codec, raw_bytes };
        let bytes = frame::encode(&meta, &records, &packed)?;
        store.append(&Frame::parse(&bytes)?)?;
        if number % 8 == 7 || number + 1 == frames {
            store.commit().into_iter().next().map_or(Ok(()), |(_, error)| Err(error))?;
        }
    }
    let (seconds, stats) = (begun.elapsed().as_secs_f64(), journal.stats());
    println!(
        "{:.0} MB/s with making the frames, a commit each 4 MiB",
        stats.raw_bytes as f64 / 1e6 / seconds
    );
    println!(
        "{:.1} bytes of metadata and index a record",
        stats.stored_meta_bytes as f64 / stats.records as f64
    );
    Ok(())
}
