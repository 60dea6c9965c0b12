//! Every kind of request, through the drivers of the real `qemu-io`: what is captured makes the image that is there.

mod support;

use journal_format::Op;

use support::agent::{Agent, Taken};
use support::programs::{Site, open};

fn guest_records(records: &[Taken]) -> Vec<&Taken> {
    records
        .iter()
        .filter(|taken| match taken.record.op {
            Op::Write { fill, .. } | Op::Zero { fill, .. } => !fill,
            Op::Discard { .. } | Op::Flush | Op::Resize { .. } => true,
            _ => false,
        })
        .collect()
}

/// Opens an 8 MiB image, lets the guest do `commands` while it is captured, and compares.
fn captured_image_is_the_image(format: &str, options: &str, commands: &[&str]) -> Vec<Taken> {
    let site = Site::new();
    site.create(format, "disk", "8M");
    let agent = Agent::listen(site.path());
    let options = options.replace("FILE", &site.inside("disk"));
    let (mut program, mut filter) = open(&site, &agent, &options);
    program.must("write -P 1 100k 70k");
    let tap = filter.attach("disk");
    for command in commands {
        program.must(command);
    }
    tap.wait_synced();
    program.must("write -P 0xee 1M 4k");
    let image = tap.image();
    filter.detach("disk");
    program.must("write -P 0xdd 2M 4k");
    program.must("flush");
    program.quit();
    let mut expected = site.contents(format, "disk");
    expected[2 << 20..(2 << 20) + 4096].copy_from_slice(&image[2 << 20..(2 << 20) + 4096]);
    assert!(image == expected, "the captured image differs");
    tap.finish()
}

/// What every driver must survive: aligned and unaligned, long, overlapping, zeroes, discards.
const MIX: &[&str] = &[
    "write -P 2 0 64k",
    "write -P 3 513 5000",
    "write -P 4 1023k 3k",
    "write -P 5 1M 6M",
    "write -f -P 6 200k 4k",
    "write -z 3M 128k",
    "write -z -u 3333k 70k",
    "writev -P 7 4M 4k 8k 512 3584 64k",
    "discard 5M 256k",
    "discard 5500k 3k",
    "aio_write -P 8 6M 64k",
    "aio_write -P 9 6148k 64k",
    "aio_write -P 10 6150k 8k",
    "aio_write -z 6200k 32k",
    "aio_write -P 11 6202k 4k",
    "aio_flush",
    "flush",
    "write -P 12 8191k 1k",
];

fn has(records: &[Taken], wanted: impl Fn(&Op) -> bool) -> bool {
    guest_records(records).iter().any(|taken| wanted(&taken.record.op))
}

#[test]
fn requests_of_raw_over_file_are_captured() {
    let options =
        "driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename=FILE,file.discard=unmap";
    let records = captured_image_is_the_image("raw", options, MIX);
    assert!(has(&records, |op| matches!(op, Op::Write { .. })));
    assert!(has(&records, |op| matches!(op, Op::Zero { may_unmap: true, .. })));
    assert!(has(&records, |op| matches!(op, Op::Zero { may_unmap: false, .. })));
    assert!(has(&records, |op| matches!(op, Op::Discard { .. })));
    assert!(has(&records, |op| matches!(op, Op::Flush)));
}

#[test]
fn requests_of_a_lone_file_node_are_captured() {
    let options = "driver=file,node-name=disk,filename=FILE,discard=unmap";
    captured_image_is_the_image("raw", options, MIX);
}

/// `co_pwritev_part`, and a flush callback of the driver's own.
#[test]
fn requests_of_qcow2_are_captured() {
    let options =
        "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename=FILE,file.discard=unmap";
    let records = captured_image_is_the_image("qcow2", options, MIX);
    assert!(has(&records, |op| matches!(op, Op::Flush)));
}

/// `co_pwritev_compressed_part`.
#[test]
fn compressed_writes_are_captured() {
    let options = "driver=qcow2,node-name=disk,file.driver=file,file.filename=FILE";
    let commands =
        ["write -c -P 2 256k 64k", "write -c -P 3 1M 64k", "write -P 4 1050k 1k", "write -c -P 5 7M 64k"];
    let records = captured_image_is_the_image("qcow2", options, &commands);
    assert!(has(&records, |op| matches!(op, Op::Write { range, .. } if range.offset() == 7 << 20)));
}

/// `co_writev`, whose unit is the sector.
#[test]
fn requests_of_drivers_that_count_in_sectors_are_captured() {
    for format in ["qed", "vhdx", "parallels"] {
        let options = format!("driver={format},node-name=disk,file.driver=file,file.filename=FILE");
        let options = options.replace("vhdx,node", "vhdx,discard=unmap,node");
        captured_image_is_the_image(format, &options, MIX);
    }
}

#[test]
fn requests_of_drivers_without_zeroes_and_discard_are_captured() {
    for format in ["vmdk", "vdi"] {
        let options = format!("driver={format},node-name=disk,file.driver=file,file.filename=FILE");
        captured_image_is_the_image(format, &options, MIX);
    }
}

/// A filter between the device and the disk is passed over: the node below it is the disk.
#[test]
fn a_disk_below_filters_is_captured_once() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let options = format!(
        "driver=copy-on-read,node-name=above,file.driver=raw,file.node-name=disk,file.file.driver=file,\
         file.file.filename={}",
        site.inside("disk")
    );
    let (mut program, mut filter) = open(&site, &agent, &options);
    let tap = filter.attach("disk");
    program.must("write -P 3 64k 64k");
    tap.wait_synced();
    let image = tap.image();
    program.must("read -P 3 64k 64k");
    filter.detach("disk");
    program.quit();
    assert!(image == site.contents("raw", "disk"));
    let records = tap.finish();
    assert_eq!(
        guest_records(&records).iter().filter(|taken| matches!(taken.record.op, Op::Write { .. })).count(),
        1
    );
}

/// `null-aio` fills `aio_pwritev` only; nothing is stored, so the records themselves are looked at.
#[test]
fn writes_through_null_drivers_are_captured_with_their_data() {
    for driver in ["null-aio", "null-co"] {
        let site = Site::new();
        let agent = Agent::listen(site.path());
        let options = format!("driver={driver},node-name=disk,size=8M,read-zeroes=on,latency-ns=1000000");
        let (mut program, mut filter) = open(&site, &agent, &options);
        let tap = filter.attach("disk");
        tap.wait_synced();
        program.must("write -P 5 512k 6M");
        program.must("aio_write -P 6 1k 63k");
        program.must("aio_write -P 7 3k 2k");
        program.must("aio_flush");
        program.must("flush");
        let records = tap.records();
        filter.detach("disk");
        program.quit();
        let guest = guest_records(&records);
        let written: u64 = guest.iter().map(|taken| taken.data.len() as u64).sum();
        assert_eq!(written, (6 << 20) + (63 << 10) + (2 << 10), "{driver}");
        for taken in &guest {
            if let Op::Write { range, .. } = taken.record.op {
                let expected = match range.offset() {
                    1024 => 6,
                    3072 => 7,
                    _ => 5,
                };
                assert!(taken.data.iter().all(|&byte| byte == expected), "{driver}: {range:?}");
            }
        }
        assert!(matches!(guest.last().unwrap().record.op, Op::Flush), "{driver}");
    }
}

#[test]
fn a_resize_is_captured_with_the_new_size() {
    for (format, options) in [
        ("raw", "driver=raw,node-name=disk,file.driver=file,file.filename=FILE"),
        ("qcow2", "driver=qcow2,node-name=disk,file.driver=file,file.filename=FILE"),
    ] {
        let commands = ["truncate 10M", "write -P 7 9M 64k", "truncate 9999k", "write -P 8 9990k 9k"];
        let records = captured_image_is_the_image(format, options, &commands);
        let sizes: Vec<u64> = records
            .iter()
            .filter_map(|taken| match taken.record.op {
                Op::Resize { disk_bytes } => Some(disk_bytes),
                _ => None,
            })
            .collect();
        assert_eq!(sizes, [10 << 20, 9999 << 10], "{format}");
    }
}

/// A failing disk: what failed is no point of recovery, and is read back.
#[test]
fn a_failed_write_is_read_back() {
    let site = Site::new();
    site.create("raw", "disk", "8M");
    let agent = Agent::listen(site.path());
    let options = format!(
        "driver=raw,node-name=disk,file.driver=blkdebug,file.inject-error.0.event=pwritev,\
         file.inject-error.0.iotype=write,file.inject-error.0.sector=2048,file.inject-error.0.once=on,\
         file.image.driver=file,file.image.filename={}",
        site.inside("disk")
    )
    .replace("file.inject-error.0.event=pwritev,", "file.inject-error.0.event=none,");
    let (mut program, mut filter) = open(&site, &agent, &options);
    let tap = filter.attach("disk");
    tap.wait_synced();
    let answer = program.run("write -P 9 1M 64k");
    assert!(answer.contains("write failed"), "{answer}");
    tap.wait_synced();
    program.must("write -P 7 2M 64k");
    let image = tap.image();
    filter.detach("disk");
    program.quit_after_a_failure();
    assert!(image == site.contents("raw", "disk"));
    assert!(!has(&tap.finish(), |op| matches!(op, Op::Write { range, .. } if range.offset() == 1 << 20)));
}
