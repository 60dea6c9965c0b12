//! Requests that QEMU hands to a driver in parts: each is one record, or lies in a gap, and what is captured makes the
//! image that is there.

mod support;

use journal_format::{ByteRange, GapReason, Op};

use support::agent::{Agent, Taken, wait_for};
use support::programs::{Ends, QemuIo, Site, open};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const QCOW2: &str =
    "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=FILE,file.discard=unmap";
/// A disk that takes 64 KiB at a time, which the format above it takes over.
const SMALL_TRANSFERS: &str = "driver=raw,node-name=disk,file.driver=blkdebug,file.max-transfer=65536,\
                               file.image.driver=file,file.image.filename=FILE";

/// qed flushes when it allocates, so the error is for a flush after a first read: the initial sync's.
const FAILING_FLUSH: &str = "driver=qed,node-name=disk,file.driver=blkdebug,file.inject-error.0.event=read_aio,\
                             file.inject-error.0.iotype=flush,file.inject-error.0.once=on,\
                             file.image.driver=file,file.image.filename=FILE";

/// Changes of the guest, and gaps.
fn changes(records: &[Taken]) -> Vec<Op> {
    let is_one = |op: &Op| match op {
        Op::Write { fill, .. } | Op::Zero { fill, .. } => !fill,
        Op::Discard { .. } | Op::GapBegin { .. } | Op::GapEnd { .. } => true,
        _ => false,
    };
    records.iter().map(|taken| taken.record.op).filter(is_one).collect()
}

/// The changes of the guest and of resyncs, after the gap that a failed write has begun.
fn after_failure(records: &[Taken]) -> Vec<Op> {
    let changes = changes(records);
    assert!(matches!(changes[0], Op::GapBegin { reason: GapReason::WriteFailed, .. }), "{changes:?}");
    changes
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

fn zero(offset: u64, length: u64) -> Op {
    Op::Zero { range: range(offset, length), fill: false, fua: false, may_unmap: false }
}

/// What it covers, for a write.
fn written(op: &Op) -> Option<ByteRange> {
    match op {
        Op::Write { range, .. } => Some(*range),
        _ => None,
    }
}

/// An 8 MiB disk, captured after `first`; `run` gets it when it is synced. The records from then on.
fn captured(format: &str, options: &str, first: &str, run: impl FnOnce(&mut QemuIo)) -> Vec<Taken> {
    let site = Site::new();
    site.create(format, "disk", "8M");
    let agent = Agent::listen(site.path());
    let (mut program, mut filter) = open(&site, &agent, &options.replace("FILE", &site.inside("disk")));
    program.must(first);
    let tap = filter.attach("disk");
    tap.wait_synced();
    let before = tap.records().len();
    run(&mut program);
    tap.wait_synced();
    program.must("write -P 0xee 0 512");
    let image = tap.image();
    filter.detach("disk");
    program.quit_anyhow();
    assert!(image == site.contents(format, "disk"), "the captured image differs");
    tap.finish().split_off(before)
}

fn changes_of(format: &str, options: &str, commands: &[&str]) -> Vec<Op> {
    let records = captured(format, options, "write -P 1 0 8M", |program| {
        for command in commands {
            program.must(command);
        }
    });
    let mut changes = changes(&records);
    assert_eq!(changes.pop().as_ref().and_then(written), Some(range(0, 512)));
    changes
}

#[test]
fn zeroes_across_clusters_are_one_record() {
    let commands = ["write -z 100k 300k", "write -z 64k 64k", "write -z 5k 1k", "write -z 513k 200k"];
    let expected = [zero(100 * KIB, 300 * KIB), zero(64 * KIB, 64 * KIB), zero(5 * KIB, KIB)];
    let changes = changes_of("qcow2", QCOW2, &commands);
    assert_eq!(changes[..3], expected);
    assert_eq!(changes[3..], [zero(513 * KIB, 200 * KIB)]);
}

/// qed takes whole sectors: the first and the last bytes are padded to them, in writes of data.
#[test]
fn zeroes_that_are_padded_are_one_record_of_what_the_guest_asked_for() {
    let options = "driver=qed,node-name=disk,file.driver=file,file.filename=FILE";
    let changes = changes_of("qed", options, &["write -z 1000 300000", "write -z 700000 100"]);
    assert_eq!(changes[0], zero(1000, 300_000));
    assert_eq!(changes.len(), 2, "{changes:?}");
}

/// Where padding makes a part all 0, `detect-zeroes` makes zeroes of it, which begin before the request.
#[test]
fn zeroes_whose_padding_is_found_to_be_zero_are_one_record() {
    let options = "driver=qed,node-name=disk,detect-zeroes=on,file.driver=file,file.filename=FILE";
    let commands = ["write -P 0 512 488", "write -P 0 301000 56", "write -z 1000 300000", "write -z 2100 10"];
    let changes = changes_of("qed", options, &commands);
    assert_eq!(changes[2..], [zero(1000, 300_000), zero(2100, 10)], "{changes:?}");
    assert!(changes[..2].iter().all(|op| written(op).is_some()), "{changes:?}");
}

/// These know no zeroes, and get data: vhdx in whole sectors, the first and the last padded.
#[test]
fn zeroes_of_drivers_without_zeroes_are_one_record() {
    let options = "driver=DRIVER,node-name=disk,file.driver=file,file.filename=FILE";
    let commands = ["write -z 1000 300000"];
    let changes = changes_of("vhdx", &options.replace("DRIVER", "vhdx"), &commands);
    assert_eq!(changes, [zero(1000, 300_000)]);
    let changes = changes_of("vdi", &options.replace("DRIVER", "vdi"), &commands);
    assert_eq!(changes.iter().filter_map(written).collect::<Vec<_>>(), [range(1000, 300_000)]);
}

#[test]
fn a_discard_is_one_record_of_what_the_driver_discards() {
    let changes = changes_of("qcow2", QCOW2, &["discard 100k 300k", "discard 70k 10k"]);
    assert_eq!(changes, [Op::Discard { range: range(128 * KIB, 256 * KIB) }]);
}

#[test]
fn a_write_longer_than_the_driver_takes_is_one_record() {
    let commands = ["write -P 7 100k 700k", "writev -P 8 1M 1000k 3k 512 70k", "write -f -P 9 3M 64k"];
    let changes = changes_of("raw", SMALL_TRANSFERS, &commands);
    let ranges: Vec<_> = changes.iter().filter_map(written).collect();
    assert_eq!(ranges[0], range(100 * KIB, 700 * KIB));
    assert_eq!(ranges[1..], [range(MIB, 1073 * KIB + 512), range(3 * MIB, 64 * KIB)]);
}

/// Longer than a record can be: no point of it is offered, and every point after it is.
#[test]
fn a_write_longer_than_a_record_lies_in_a_gap() {
    for (options, parts) in [(SMALL_TRANSFERS, 80), (&QCOW2.replace("qcow2", "raw")[..], 2)] {
        let changes = changes_of("raw", options, &["write -P 7 1M 5M"]);
        let (Op::GapBegin { reason, generation }, Some(Op::GapEnd { generation: ended })) =
            (changes[0], changes.last())
        else {
            panic!("{changes:?}");
        };
        assert_eq!((reason, generation), (GapReason::LargeRequest, *ended));
        let ranges: Vec<_> = changes.iter().filter_map(written).collect();
        assert_eq!(ranges.len(), parts);
        assert_eq!(ranges.iter().map(|range| range.length()).sum::<u64>(), 5 * MIB);
    }
}

/// The limits of NBD: 32 MiB of data or zeroes at a time. The server stores nothing.
#[test]
fn parts_of_a_network_disk_are_one_record() {
    const DISK: &str =
        r#"{"driver": "null-co", "node-name": "disk", "size": 268435456, "read-zeroes": true}"#;
    let site = Site::new();
    let mut server = site.command("qemu-storage-daemon");
    server.args(["--blockdev", DISK]);
    server.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", site.inside("nbd"))]);
    server.args(["--export", "type=nbd,id=e,name=disk,node-name=disk,writable=on"]);
    let _server = Ends(server.spawn().unwrap());
    wait_for("the server's socket", || site.path().join("nbd").exists().then_some(()));
    let agent = Agent::listen(site.path());
    let options = format!(
        "driver=nbd,node-name=disk,discard=unmap,export=disk,server.type=unix,server.path={}",
        site.inside("nbd")
    );
    let (mut program, mut filter) = open(&site, &agent, &options);
    let tap = filter.attach("disk");
    tap.wait_synced();
    let before = changes(&tap.records()).len();
    program.must("write -z 1M 100M");
    program.must("write -P 7 1M 40M");
    program.must("flush");
    tap.wait_synced();
    let changes = changes(&tap.records()).split_off(before);
    filter.detach("disk");
    program.quit();
    assert_eq!(changes[0], zero(MIB, 100 * MIB));
    assert!(matches!(changes[1], Op::GapBegin { reason: GapReason::LargeRequest, .. }));
    assert_eq!(changes.iter().filter_map(written).map(|range| range.length()).sum::<u64>(), 40 * MIB);
    assert!(matches!(changes.last(), Some(Op::GapEnd { .. })));
}

/// Many at once, and plain writes between them: no two records of one request, and the image is the disk's.
#[test]
fn parts_of_requests_in_flight_together_stay_apart() {
    let mut commands = Vec::new();
    for i in 0..40 {
        let at = (i % 10) * 800 + 30;
        commands.push(format!("aio_write -z -q {at}k {}k", 100 + i));
        commands.push(format!("aio_write -q -P {} {}k 150k", i + 2, at + 120));
    }
    commands.push("aio_flush".to_owned());
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    let changes = changes_of("qcow2", QCOW2, &commands);
    assert_eq!(changes.len(), 80, "{changes:?}");
}

/// The third of eight parts fails: the guest is told so, and what is on the disk is read back.
#[test]
fn a_request_whose_later_part_fails_is_read_back() {
    let options = format!(
        "{SMALL_TRANSFERS},file.inject-error.0.event=none,file.inject-error.0.iotype=write,\
         file.inject-error.0.sector=2400,file.inject-error.0.once=on"
    );
    let records = captured("raw", &options, "write -P 1 0 1M", |program| {
        let answer = program.run("write -P 9 1M 512k");
        assert!(answer.contains("failed"), "{answer}");
    });
    let changes = after_failure(&records);
    assert_eq!(changes.iter().filter_map(written).collect::<Vec<_>>(), [range(0, 512)]);
}

/// A request whose flush in its midst fails, so that QEMU gives it up without another call of the driver.
const GIVEN_UP: &str = "write -z -f 1000 300000";

fn give_up(program: &mut QemuIo) {
    let answer = program.run(GIVEN_UP);
    assert!(answer.contains("failed"), "{answer}");
}

/// A flush in the midst of a request fails, so that QEMU gives it up without another call of the driver. Others that
/// overlap must not wait for it for good, and what it did is read back.
#[test]
fn a_request_that_qemu_gives_up_between_two_parts_is_read_back() {
    let records = captured("qed", FAILING_FLUSH, "write -P 1 0 8M", |program| {
        give_up(program);
        // A read has its coroutine now, so that nobody comes and finds out.
        program.must("break read_aio here");
        program.must("aio_read -q 4M 4k");
        program.must("wait_break here");
        // Waits until QEMU has been asked.
        program.must("write -P 2 0 200k");
        program.must("resume here");
        program.must("aio_flush");
        program.must(GIVEN_UP);
    });
    let changes = after_failure(&records);
    assert_eq!(changes.iter().find_map(written), Some(range(0, 200 * KIB)), "{changes:?}");
    let zeroes: Vec<_> = changes.iter().filter(|op| matches!(op, Op::Zero { .. })).copied().collect();
    assert_eq!(zeroes, [zero(1000, 300_000)]);
}

/// As above, but the coroutine comes with its next request at once.
#[test]
fn a_request_does_not_go_on_with_one_that_was_given_up() {
    let records = captured("qed", FAILING_FLUSH, "write -P 1 0 8M", |program| {
        give_up(program);
        program.must(GIVEN_UP);
    });
    let changes = after_failure(&records);
    assert_eq!(changes[1], zero(1000, 300_000));
}
