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

#[test]
fn writes_through_co_pwritev_are_captured() {
    let records = captured_image_is_the_image(
        "raw",
        "driver=raw,node-name=disk,file.driver=file,file.filename=FILE",
        &["write -P 2 0 64k", "write -P 3 513 5000", "write -f -P 4 200k 4k", "flush"],
    );
    let guest = guest_records(&records);
    assert!(guest.iter().any(|taken| matches!(taken.record.op, Op::Write { fua: true, .. })
        || matches!(taken.record.op, Op::Flush)));
}
