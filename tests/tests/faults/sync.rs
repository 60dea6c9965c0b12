//! Sync mode against the end of everything, again and again.

use std::fs::File;
use std::time::Duration;

use cdp_api::{PointSpec, Protection, ProtectionPhase, SyncState};
use cdp_tests::ledger::Writer;
use cdp_tests::qemu::{Qemu, raw_file};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use cdp_tests::wait_for;

const REGION_BYTES: u64 = 256 << 10;
const GUESTS: u64 = 3;

/// `CDP_ENDS` says how often.
#[test]
fn what_a_guest_has_flushed_survives_the_end_of_everything() {
    let ends = std::env::var("CDP_ENDS").map_or(6, |text| text.parse().expect("CDP_ENDS is a number"));
    let mut random = Random::seeded(70);
    let mut site = Site::start();
    let image = site.directory().join("disk.raw");
    File::create(&image).expect("image").set_len(REGION_BYTES * GUESTS).expect("size");
    let mut guests: Vec<_> = (0..GUESTS)
        .map(|i| {
            let region = i * REGION_BYTES..(i + 1) * REGION_BYTES;
            Writer::new(random.next_u64(), region, site.directory())
        })
        .collect();
    let mut flushed = 0;
    for end in 0..ends {
        let mut qemu = Qemu::storage_daemon(&site, "sync", &[raw_file(&image)], "disk");
        let disk = site.disk(qemu.vm(), "");
        let how = Protection {
            enabled: true,
            sync: Some(true),
            sync_timeout_ms: Some(3_600_000),
            ..Protection::default()
        };
        site.client().put_protection(&disk, &how).expect("sync mode");
        site.wait_for_phase(&disk, ProtectionPhase::Protected);
        wait_for("sync to be in force", || {
            let state = site.client().disk(&disk).expect("disk").summary.protection.sync_state;
            (state == SyncState::InForce).then_some(())
        });
        guests.iter_mut().for_each(|guest| guest.start(&qemu.nbd_url()));
        let before: Vec<_> = guests.iter().map(Writer::flushed).collect();
        wait_for("flushes", || {
            guests.iter().zip(&before).all(|(guest, before)| guest.flushed() > *before).then_some(())
        });
        std::thread::sleep(Duration::from_millis(random.within(0..200)));
        let mut order = [0, 1, 2];
        order.swap(0, random.within(0..3) as usize);
        order.swap(1, random.within(1..3) as usize);
        for which in order {
            match which {
                0 => qemu.process.kill(),
                1 => site.agent.kill(),
                _ => site.server.kill(),
            }
        }
        guests.iter_mut().for_each(|guest| drop(guest.stop()));
        flushed += guests.iter().map(Writer::flushed).sum::<usize>();
        let restored = site.restore(&disk, &PointSpec::Latest, Via::Store);
        for guest in &guests {
            guest
                .check_flushed(&restored)
                .unwrap_or_else(|why| panic!("end {end}, killed in order {order:?}: {why}"));
        }
        let held = std::fs::read(&image).expect("image");
        guests.iter_mut().for_each(|guest| guest.settle(&held));
        site.restart_server();
        site.restart_agent();
    }
    println!("{ends} ends of everything survived; {flushed} requests flushed");
}
