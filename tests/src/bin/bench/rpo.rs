//! How far the durable history is behind the guest: from a write's completion (its stamp) to the acknowledgement that says
//! it is durable, as it comes back to the agent's host.
//!
//! A relay between agent and server reads what passes: stamps from the frames, durable LSNs from the acknowledgements. So the
//! whole way is in the number, the relay too; QEMU, filter, agent and server run as they always do.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use cdp_api::Protection;
use cdp_tests::network::Watch;
use journal_format::frame::FRAME_HEADER_BYTES;
use journal_format::wire::{self, Ack, MESSAGE_HEADER_BYTES, MessageHeader, MessageType};
use journal_format::{DiskId, Frame, FrameHeader, Lsn, Op, Stamp};

use crate::Effort;
use crate::export::{Export, finish};
use crate::machine::{self, SINK_CORE};
use crate::ours::Ours;
use crate::report::{Report, Row};
use crate::variants::{Medium, PATTERNS, Variant};

/// Shares of what the pipeline can take, in percent.
const SHARES: [u64; 2] = [50, 90];
/// Tries of the disk alone.
const SYNCS: usize = 50;
const SYNC_BYTES: usize = 64 << 10;

pub(crate) fn run(effort: Effort, report: &mut Report) {
    let relay = Arc::new(Relay::default());
    let ours = Ours::start_watched(Arc::clone(&relay) as Arc<dyn Watch>);
    let (images, store_disk) = (Medium::Tmpfs.directory(), machine::directory_on_disk());
    for pattern in [PATTERNS[1], PATTERNS[2]] {
        for round in 0..effort.rounds {
            report.begin_round(effort);
            let mut export = Export::start(&ours, Variant::OursOn, images.path(), "bench-rpo", SINK_CORE);
            hold_back(&ours);
            relay.take();
            let began = Instant::now();
            let _load = finish(export.load(pattern, effort.seconds, None));
            ours.catch_up("bench-rpo");
            let most = relay.take().len() as f64 / began.elapsed().as_secs_f64();
            for share in SHARES {
                let table = format!("{}, {share} % of the most", pattern.name);
                report.add(disk_alone(
                    Row::new(
                        "from completion to durable",
                        "disk",
                        &table,
                        "write + fdatasync of 64 KiB",
                        round,
                    ),
                    store_disk.path(),
                ));
                relay.take();
                let rate = most * share as f64 / 100.0;
                let seen = finish(export.load(pattern, effort.seconds, Some(rate)));
                ours.catch_up("bench-rpo");
                let mut row = Row::new("from completion to durable", "disk", &table, "qemu-cdp", round);
                set(&mut row, relay.take());
                row.set("writes_per_s", seen.iops);
                report.add(row);
            }
            export.daemon.terminate();
        }
    }
}

/// Has the guest wait for room in the ring: what the pipeline cannot take is not captured later, in one piece.
fn hold_back(ours: &Ours) {
    let (policy, throttle_ms) = (Some("throttle".to_owned()), Some(10_000));
    let how = Protection { enabled: true, policy, throttle_ms, ..Protection::default() };
    let disk = ours.site.disk("bench-rpo", "");
    ours.site.client().put_protection(&disk, &how).expect("a policy");
}

/// Sets the percentiles of some times in seconds.
fn set(row: &mut Row, mut seconds: Vec<f64>) {
    seconds.sort_by(f64::total_cmp);
    for (name, of_100) in [("p50_ms", 50), ("p99_ms", 99), ("max_ms", 100)] {
        let at = (seconds.len() * of_100 / 100).min(seconds.len().saturating_sub(1));
        row.set(name, seconds.get(at).copied().unwrap_or_default() * 1000.0);
    }
}

/// What the disk below the store needs for the least that any journal does.
fn disk_alone(mut row: Row, directory: &Path) -> Row {
    let file = File::create(directory.join("sync")).expect("a file");
    let bytes = vec![1; SYNC_BYTES];
    let times = (0..SYNCS).map(|number| {
        let began = Instant::now();
        file.write_all_at(&bytes, (number * SYNC_BYTES) as u64).expect("written");
        file.sync_data().expect("durable");
        began.elapsed().as_secs_f64()
    });
    set(&mut row, times.collect());
    row
}

/// What passes between agent and server.
#[derive(Debug, Default)]
struct Relay {
    to_server: Mutex<Messages>,
    to_agent: Mutex<Messages>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Guests' writes that are not acknowledged, by disk.
    waiting: HashMap<DiskId, VecDeque<(Lsn, Stamp)>>,
    /// From completion to durable, in seconds.
    lags: Vec<f64>,
}

/// One direction of a connection, cut into messages.
#[derive(Debug, Default)]
struct Messages {
    bytes: Vec<u8>,
    /// Bytes of a frame's data that are still to come, and of no interest.
    skip: usize,
}

impl Messages {
    /// Takes bytes; calls `each` for every message that is whole, of frames with the head only.
    fn take(&mut self, mut bytes: &[u8], each: &mut dyn FnMut(MessageType, &[u8])) {
        loop {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            let wanted = self.wanted();
            let missing = wanted.saturating_sub(self.bytes.len()).min(bytes.len());
            self.bytes.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.bytes.len() < wanted {
                return;
            }
            if self.wanted() > wanted {
                continue;
            }
            let (kind, length) = MessageHeader::parse(&self.bytes).expect("a header");
            each(kind, &self.bytes[MESSAGE_HEADER_BYTES..]);
            self.skip = MESSAGE_HEADER_BYTES + length - self.bytes.len();
            self.bytes.clear();
        }
    }

    /// Bytes of the present message that are kept, as far as that is known yet.
    fn wanted(&self) -> usize {
        let Some(body) = self.bytes.get(MESSAGE_HEADER_BYTES..) else { return MESSAGE_HEADER_BYTES };
        let (kind, length) = MessageHeader::parse(&self.bytes).expect("a header");
        let keep = match kind {
            MessageType::Frame => FrameHeader::parse(body)
                .map_or(FRAME_HEADER_BYTES, |header| FRAME_HEADER_BYTES + header.records_len()),
            _ => length,
        };
        MESSAGE_HEADER_BYTES + keep
    }
}

impl Relay {
    /// The lags since the last call.
    fn take(&self) -> Vec<f64> {
        std::mem::take(&mut lock(&self.seen).lags)
    }

    fn frame(&self, head: &[u8]) {
        let frame = Frame::from_head(head).expect("a frame");
        let mut seen = lock(&self.seen);
        let waiting = seen.waiting.entry(frame.header().disk()).or_default();
        let writes = frame.records().filter(|record| matches!(record.op, Op::Write { fill: false, .. }));
        waiting.extend(writes.map(|record| (record.lsn, record.stamp)));
    }

    fn acknowledged(&self, ack: &Ack) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let disk = wire::disk_id(&ack.disk).expect("a disk");
        let seen = &mut *lock(&self.seen);
        let waiting = seen.waiting.entry(disk).or_default();
        while let Some((_, stamp)) = waiting.pop_front_if(|(lsn, _)| lsn.0 <= ack.durable_lsn) {
            seen.lags.push(now.saturating_sub(Duration::from_nanos(stamp.0)).as_secs_f64());
        }
    }
}

impl Watch for Relay {
    fn passed(&self, to_server: bool, bytes: &[u8]) {
        let messages = if to_server { &self.to_server } else { &self.to_agent };
        lock(messages).take(bytes, &mut |kind, body| match kind {
            MessageType::Frame => self.frame(body),
            MessageType::Ack => self.acknowledged(&wire::decode(body).expect("an acknowledgement")),
            _ => {}
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic before")
}
