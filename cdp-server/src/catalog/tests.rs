//! What the catalog promises.

use super::*;

const DISK: DiskId = DiskId([7; 16]);
const HOST: HostId = HostId([1; 16]);

fn open(dir: &tempfile::TempDir) -> Catalog {
    Catalog::open(&dir.path().join("catalog.sqlite3")).expect("opens")
}

fn report(host: u8, vm: &str) -> HostReport {
    let disk = DiskReport {
        id: DISK,
        device: "disk0".to_owned(),
        node: "node0".to_owned(),
        driver: "qcow2".to_owned(),
        disk_bytes: 1 << 30,
        read_only: false,
        refused: String::new(),
    };
    let vm = VmReport { name: vm.to_owned(), disks: vec![disk], ..VmReport::default() };
    HostReport { id: HostId([host; 16]), name: format!("host{host}"), vms: vec![vm], ..HostReport::default() }
}

#[test]
fn what_is_wanted_survives_a_restart_and_a_new_report() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    catalog.set_protect(DISK, Some(true)).expect("sets");
    drop(catalog);
    let catalog = open(&dir);
    catalog.record_report(&report(2, "vm"), 6).expect("records");
    let row = catalog.disk(DISK).expect("reads").expect("known");
    assert_eq!((row.protect, row.host_name.as_str(), row.seen_ns), (Some(true), "host2", 6));
    assert_eq!(catalog.disks_named("vm/disk0").expect("reads"), vec![row]);
}

#[test]
fn an_epoch_is_never_handed_out_twice() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    let grant = |stored, resume: Option<u64>| {
        catalog.grant_epoch(DISK, Epoch(stored), resume.map(Epoch), HOST).expect("grants")
    };
    assert_eq!(grant(0, None), Epoch(1));
    assert_eq!(grant(0, None), Epoch(2), "nothing of epoch 1 was stored, and it may still be under way");
    assert_eq!(grant(0, Some(2)), Epoch(2), "a resume keeps its epoch");
    assert_eq!(grant(0, Some(1)), Epoch(3), "an overtaken epoch is not resumed");
    assert_eq!(grant(3, Some(4)), Epoch(4), "epoch 4 was never handed out; a new one happens to be that");
    assert_eq!(grant(3, Some(u64::MAX)), Epoch(5), "whatever an agent says");
}

/// An agent once set the number: one that said `u64::MAX` left none for anybody.
#[test]
fn after_a_loss_of_the_catalog_an_agents_epoch_counts_within_bounds_and_new_ones_lie_beyond() {
    let after_loss = |stored, resume: Option<u64>| {
        let dir = tempfile::tempdir().expect("a directory");
        let catalog = open(&dir);
        catalog.adopt_from_store(DISK, 4096).expect("adopts");
        let grant = |resume: Option<u64>| {
            catalog.grant_epoch(DISK, Epoch(stored), resume.map(Epoch), HOST).expect("grants").0
        };
        [grant(resume), grant(None)]
    };
    assert_eq!(after_loss(9, Some(9)), [9, 10], "the store has it");
    assert_eq!(after_loss(9, Some(12)), [12, 13], "handed out, and nothing of it was stored");
    assert_eq!(after_loss(9, Some(9 + LOST_EPOCHS)), [9 + LOST_EPOCHS, 10 + LOST_EPOCHS]);
    assert_eq!(after_loss(9, Some(8)), [10 + LOST_EPOCHS, 11 + LOST_EPOCHS], "overtaken");
    assert_eq!(after_loss(9, Some(u64::MAX)), [10 + LOST_EPOCHS, 11 + LOST_EPOCHS]);
    assert_eq!(after_loss(9, None), [10 + LOST_EPOCHS, 11 + LOST_EPOCHS], "9 to 1033 may be under way");
    assert_eq!(after_loss(0, Some(3)), [3, 4], "the store was lost too");
    assert_eq!(after_loss(0, Some(u64::MAX)), [1, 2]);
}

#[test]
fn a_journal_with_a_number_that_nobody_handed_out_is_refused_and_not_wrapped() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.adopt_from_store(DISK, 4096).expect("adopts");
    for stored in [u64::MAX, i64::MAX as u64 - 1] {
        let error = catalog.grant_epoch(DISK, Epoch(stored), None, HOST).expect_err("no number left");
        assert!(error.to_string().contains("no room"), "{error}");
    }
}

#[test]
fn the_owner_is_who_was_granted_last_until_it_gives_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    assert_eq!(catalog.owner(DISK).expect("reads"), None);
    catalog.grant_epoch(DISK, Epoch(0), None, HOST).expect("grants");
    let host = Host { id: HOST, name: "host1".to_owned() };
    assert_eq!(catalog.owner(DISK).expect("reads"), Some((host, Epoch(1))));
    catalog.grant_epoch(DISK, Epoch(0), None, HostId([2; 16])).expect("grants");
    let nameless = Host { id: HostId([2; 16]), name: String::new() };
    assert_eq!(catalog.owner(DISK).expect("reads"), Some((nameless, Epoch(2))));
    catalog.give_up(DISK, None).expect("writes");
    assert_eq!(catalog.owner(DISK).expect("reads"), None);
}

#[test]
fn a_disk_of_a_lost_catalog_comes_back_and_an_agent_that_captures_it_says_it_is_wanted() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.adopt_from_store(DISK, 4096).expect("adopts");
    let row = catalog.disk(DISK).expect("reads").expect("known");
    assert_eq!((row.protect, row.disk_bytes, row.name()), (None, 4096, DISK.to_string()));
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    assert_eq!(catalog.disk(DISK).expect("reads").expect("known").protect, None, "a report is no wish");
    catalog.grant_epoch(DISK, Epoch(3), Some(Epoch(3)), HOST).expect("grants");
    assert_eq!(catalog.disk(DISK).expect("reads").expect("known").protect, Some(true));
}

#[test]
fn a_catalog_of_a_newer_release_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    drop(open(&dir));
    let path = dir.path().join("catalog.sqlite3");
    let db = Connection::open(&path).expect("opens");
    db.pragma_update(None, "user_version", schema::VERSION + 1).expect("sets");
    drop(db);
    let error = Catalog::open(&path).expect_err("refused");
    assert!(error.to_string().contains("newer cdp-server"), "{error}");
}

#[test]
fn a_new_epoch_is_told_how_the_one_that_the_journal_ends_with_ended() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    let begins = |stored| catalog.begins(DISK, Epoch(stored)).expect("reads");
    let grant =
        |resume: Option<u64>| catalog.grant_epoch(DISK, Epoch(0), resume.map(Epoch), HOST).expect("grants").0;
    catalog.set_protect(DISK, Some(true)).expect("sets");
    assert_eq!(grant(None), 1);
    assert_eq!(begins(1), GapReason::UncleanEnd, "nobody said anything of its end");
    catalog.give_up(DISK, None).expect("writes");
    assert_eq!(begins(1), GapReason::UncleanEnd, "its host saw QEMU go");
    catalog.give_up(DISK, Some(GapReason::AgentLost)).expect("writes");
    assert_eq!(begins(1), GapReason::AgentLost);
    assert_eq!(grant(None), 2);
    assert_eq!(begins(1), GapReason::AgentLost, "nothing of epoch 2 was stored");
    assert_eq!(begins(2), GapReason::UncleanEnd);
    catalog.set_protect(DISK, Some(true)).expect("sets");
    assert_eq!(begins(2), GapReason::UncleanEnd, "it was on");
    catalog.set_protect(DISK, Some(false)).expect("sets");
    assert_eq!(begins(2), GapReason::UncleanEnd, "it is off");
    catalog.set_protect(DISK, Some(true)).expect("sets");
    assert_eq!(begins(2), GapReason::Attach, "switched on anew");
    assert_eq!(open(&dir).begins(DISK, Epoch(2)).expect("reads"), GapReason::Attach, "and kept");
    assert_eq!(grant(Some(2)), 2);
    assert_eq!(begins(2), GapReason::UncleanEnd, "it goes on after all");
}

#[test]
fn a_catalog_from_before_ends_were_known_is_upgraded_and_keeps_everything() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    catalog.set_protect(DISK, Some(true)).expect("sets");
    catalog.grant_epoch(DISK, Epoch(4), None, HOST).expect("grants");
    let before = catalog.disk(DISK).expect("reads");
    drop(catalog);
    let db = Connection::open(dir.path().join("catalog.sqlite3")).expect("opens");
    db.execute_batch("ALTER TABLE disks DROP COLUMN ended; ALTER TABLE disks DROP COLUMN ended_epoch;")
        .expect("as version 3 was");
    db.pragma_update(None, "user_version", 3).expect("sets");
    drop(db);
    let catalog = open(&dir);
    assert_eq!(catalog.disk(DISK).expect("reads"), before);
    assert_eq!(catalog.begins(DISK, Epoch(4)).expect("reads"), GapReason::UncleanEnd);
}

#[test]
fn a_catalog_that_could_not_be_written_is_unusable_until_it_can_be() {
    let dir = tempfile::tempdir().expect("a directory");
    let catalog = open(&dir);
    catalog.record_report(&report(1, "vm"), 5).expect("records");
    catalog.check().expect("good");
    catalog.lock().pragma_update(None, "query_only", true).expect("sets");
    catalog.set_protect(DISK, Some(true)).expect_err("read only");
    catalog.check().expect_err("it was tried again");
    catalog.lock().pragma_update(None, "query_only", false).expect("sets");
    catalog.check().expect("good again");
    assert_eq!(catalog.disk(DISK).expect("reads").expect("known").protect, Some(false));
}
