//! The whole agent, between a fake filter with real rings and a fake server on a real socket.

mod common;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::time::Duration;

use capture_ring::Mode;
use capture_ring::control::{Connection, Message};
use common::filter::{DISK_BYTES, FakeDisk, FakeFilter, hello};
use common::server::Journal;
use common::{Bench, config, noise, wait_for};
use journal_format::{GapReason, Op};

/// Some writes of many sizes at many places.
fn scribble(disk: &FakeDisk, seed: u64, count: u64) {
    for i in 0..count {
        let n = seed.wrapping_mul(1000).wrapping_add(i);
        let len = [512, 4096, 5000, 65536, 300_000][usize::try_from(n % 5).unwrap()];
        let offset = n.wrapping_mul(0x9e37_79b9) % (DISK_BYTES - len);
        let data = if n % 3 == 0 {
            vec![u8::try_from(n % 256).unwrap(); usize::try_from(len).unwrap()]
        } else {
            noise(n, usize::try_from(len).unwrap())
        };
        disk.write(offset, &data);
    }
}

fn is_synced(journal: &Journal) -> bool {
    journal.ops().any(|op| matches!(op, Op::GapEnd { .. }))
}

fn lsns_are_whole(journal: &Journal) {
    for (i, (record, _)) in journal.records.iter().enumerate() {
        assert_eq!(record.lsn.0, i as u64 + 1);
    }
}

/// Waits until the server has everything that the disk's ring has taken.
fn caught_up(bench: &Bench, id: &[u8], disk: &FakeDisk) -> Journal {
    let captured = disk.producer().ring().captured_lsn().0;
    bench.server.wait_for_journal(id, "everything captured", |journal| journal.durable >= captured)
}

fn writes_arrive(bench: Bench) {
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 40);
    let syncing = Arc::clone(&disk);
    let sync = std::thread::spawn(move || syncing.resync());
    scribble(&disk, 2, 100);
    sync.join().unwrap();
    scribble(&disk, 3, 40);
    // On a busy machine the ring may have been full, and history has another gap for a while.
    let ring = disk.producer();
    wait_for("history to be whole", || (!ring.ring().gap_is_open()).then_some(()));
    let journal = caught_up(&bench, &id, &disk);
    lsns_are_whole(&journal);
    assert!(matches!(journal.ops().next(), Some(Op::GapBegin { reason: GapReason::Attach, generation: 1 })));
    assert!(is_synced(&journal));
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    assert_eq!(journal.repeated, 0);
    let hello = bench.server.hello();
    assert_eq!(
        (hello.host_name.as_str(), hello.token.as_str(), hello.host_id.len()),
        ("testhost", "token", 16)
    );
    bench.agent.stop().unwrap();
}

#[test]
fn protected_writes_arrive_over_io_uring() {
    writes_arrive(Bench::start(false));
}

#[test]
fn protected_writes_arrive_over_plain_calls() {
    writes_arrive(Bench::start(true));
}

#[test]
fn protected_writes_arrive_over_a_unix_socket_and_io_uring() {
    writes_arrive(Bench::start_over_unix(false));
}

#[test]
fn protected_writes_arrive_over_a_unix_socket_and_plain_calls() {
    writes_arrive(Bench::start_over_unix(true));
}

fn survives_drops(bench: Bench) {
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    for round in 0..5 {
        let before = bench.server.connections();
        // What it received and did not make durable is gone with the connection.
        bench.server.withhold_acks(true);
        bench.server.drop_after(3 + round);
        while bench.server.connections() == before {
            scribble(&disk, 10 + round, 5);
            std::thread::sleep(Duration::from_millis(2));
        }
        bench.server.withhold_acks(false);
    }
    // The ring may have overflowed while nothing was acknowledged; then there is room only when that has arrived.
    wait_for("the gap's end", || {
        disk.resync();
        (!disk.producer().ring().gap_is_open()).then_some(())
    });
    let journal = caught_up(&bench, &id, &disk);
    lsns_are_whole(&journal);
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    assert_eq!(journal.repeated, 0, "resending starts right after the durable LSN");
    assert_eq!(journal.opens[0], 0);
    assert!(journal.opens[1..].iter().all(|epoch| *epoch == 1), "the epoch goes on: {:?}", journal.opens);
    bench.agent.stop().unwrap();
}

#[test]
fn a_dropped_connection_resends_from_the_durable_lsn_over_io_uring() {
    survives_drops(Bench::start(false));
}

#[test]
fn a_dropped_connection_resends_from_the_durable_lsn_over_plain_calls() {
    survives_drops(Bench::start(true));
}

#[test]
fn a_dropped_connection_resends_from_the_durable_lsn_over_a_unix_socket_and_io_uring() {
    survives_drops(Bench::start_over_unix(false));
}

#[test]
fn a_dropped_connection_resends_from_the_durable_lsn_over_a_unix_socket_and_plain_calls() {
    survives_drops(Bench::start_over_unix(true));
}

#[test]
fn a_full_outbox_fills_the_ring_and_a_resync_follows_when_there_is_room() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    disk.resync();
    bench.server.withhold_acks(true);
    let mut round = 100;
    // (A ring that is full because its drain got no processor is empty again soon; one behind a full outbox stays full.)
    let status = wait_for("a status that says tracking", || {
        scribble(&disk, round, 20);
        round += 1;
        bench.server.status(&id).filter(|status| status.mode == "tracking")
    });
    assert!(status.dirty_bytes > 0);
    bench.server.withhold_acks(false);
    wait_for("capture to resume", || (disk.mode() == Mode::Capturing).then_some(()));
    assert!(bench.filter.resyncs.load(std::sync::atomic::Ordering::Relaxed) > 0);
    let closed = |journal: &Journal| {
        journal.ops().any(|op| matches!(op, Op::GapEnd { generation } if generation >= 2))
    };
    wait_for("the gap's end", || (!disk.producer().ring().gap_is_open()).then_some(()));
    let journal = caught_up(&bench, &id, &disk);
    assert!(closed(&journal), "the gap has ended");
    assert!(journal.ops().any(|op| matches!(op, Op::GapBegin { reason: GapReason::Overflow, .. })));
    lsns_are_whole(&journal);
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    bench.agent.stop().unwrap();
}

#[test]
fn a_bookmark_is_answered_with_its_durable_place() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    let result = bench.server.bookmark(&id, "before the upgrade");
    assert_eq!(result.error, "");
    let journal = bench.server.journal(&id);
    assert!(journal.durable >= result.lsn);
    let (record, name) = &journal.records[usize::try_from(result.lsn).unwrap() - 1];
    assert!(matches!(record.op, Op::Bookmark { .. }));
    assert_eq!((name.as_slice(), record.stamp.0), (b"before the upgrade".as_slice(), result.stamp));
    assert!(bench.server.bookmark(&id, "").error.contains("255"));
    bench.server.set_protection(&id, false);
    assert!(bench.server.bookmark(&id, "late").error.contains("not being captured"));
    bench.agent.stop().unwrap();
}

#[test]
fn unprotecting_returns_when_every_write_is_durable_and_leaks_nothing() {
    let bench = Bench::start(false);
    let disk = bench.filter.disk("virtio0");
    let id = bench.disk();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut open = Vec::new();
    for round in 0..12 {
        assert_eq!(bench.server.set_protection(&id, true).error, "");
        scribble(&disk, round, 15);
        let captured = disk.producer().ring().captured_lsn().0;
        assert_eq!(bench.server.set_protection(&id, false).error, "");
        assert!(!disk.is_attached());
        let journal = bench.server.journal(&id);
        assert_eq!((journal.durable, journal.epoch), (captured, round + 1));
        open.push(descriptors());
    }
    // Other tests of this process open and close theirs meanwhile: growth would be in every round.
    assert!(open.windows(2).any(|pair| pair[1] <= pair[0]), "descriptors grow every round: {open:?}");
    lsns_are_whole(&bench.server.journal(&id));
    bench.agent.stop().unwrap();
}

#[test]
fn commands_about_unknown_disks_are_answered() {
    let bench = Bench::start(false);
    bench.disk();
    assert!(bench.server.set_protection(&[7; 16], true).error.contains("no VM"));
    assert_eq!(bench.server.set_protection(&[7; 16], false).error, "");
    bench.agent.stop().unwrap();
}

#[test]
fn a_second_filter_with_the_same_identity_is_listed_and_refused() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let second = FakeFilter::connect(&bench.socket(), "vm", &["virtio0", "virtio1"]);
    let listed = wait_for("both in the inventory", || {
        let vms = bench.server.inventory().vms;
        (vms.len() == 2 && vms[1].disks.len() == 2).then(|| vms[1].disks.clone())
    });
    assert!(listed[0].refused.contains("already has this disk"));
    assert_eq!((&listed[0].disk, listed[1].refused.as_str()), (&id, ""));
    assert_eq!(bench.server.set_protection(&listed[1].disk, true).error, "");
    assert!(second.disk("virtio1").is_attached());
    assert!(!second.disk("virtio0").is_attached());
    bench.agent.stop().unwrap();
}

#[test]
fn garbage_on_the_control_socket_costs_only_its_connection() {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
    };
    use std::os::fd::AsRawFd;
    let bench = Bench::start(false);
    let id = bench.protect();
    let raw = || {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(&bench.socket()).unwrap()).unwrap();
        fd
    };
    for seed in 1..20 {
        let fd = raw();
        send(fd.as_raw_fd(), &noise(seed, usize::try_from(seed * 100).unwrap()), MsgFlags::MSG_NOSIGNAL)
            .unwrap();
        assert!(
            matches!(recv(fd.as_raw_fd(), &mut [0; 8], MsgFlags::empty()), Ok(0) | Err(_)),
            "closed by the agent"
        );
    }
    // A well-formed filter that lies about its process, and one that sends what only an agent may send.
    let liar = Connection::connect(&bench.socket()).unwrap();
    let mut lie = hello("other");
    lie.pid += 1;
    liar.send(&Message::Hello(lie)).unwrap();
    assert!(liar.recv(None).is_err());
    let rude = Connection::connect(&bench.socket()).unwrap();
    rude.send(&Message::Hello(hello("rude"))).unwrap();
    rude.send(&Message::List).unwrap();
    assert!(rude.recv(None).is_err());

    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    caught_up(&bench, &id, &disk);
    bench.agent.stop().unwrap();
}

#[test]
fn a_vandalised_ring_ends_its_own_capture_and_no_other() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let good = FakeFilter::connect(&bench.socket(), "good", &["virtio0"]);
    let good_id = bench.server.wait_for_disk("good", "virtio0").disk;
    assert_eq!(bench.server.set_protection(&good_id, true).error, "");
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    let (ring, size) = (disk.ring_file(), disk.ring_file().metadata().unwrap().len());
    let mut seed = 0;
    while disk.is_attached() {
        seed += 1;
        // The last 16 MiB are the arena; scribble over header words and slots instead.
        let at = noise(seed, 8).iter().fold(0_u64, |n, byte| n << 8 | u64::from(*byte)) % (8 << 20).min(size);
        ring.write_all_at(&noise(seed + 1, 4096), at).unwrap();
        disk.flush();
        std::thread::sleep(Duration::from_millis(1));
    }
    scribble(&good.disk("virtio0"), 2, 10);
    caught_up(&bench, &good_id, &good.disk("virtio0"));
    let refused = bench.server.set_protection(&id, true).error;
    assert!(refused.contains("broke a moment ago"), "{refused}");
    bench.agent.stop().unwrap();
}

#[test]
fn garbage_from_the_server_costs_only_the_connection() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    let ack_of_the_future =
        journal_format::wire::encode(&journal_format::wire::Ack { disk: id.clone(), durable_lsn: 1 << 40 })
            .unwrap();
    for garbage in [b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), noise(5, 1000), ack_of_the_future] {
        let before = bench.server.connections();
        scribble(&disk, before, 5);
        // Again and again: before the disk is open on a connection, an acknowledgement for it means nothing.
        wait_for("a new connection", || {
            bench.server.send_bytes(&garbage);
            (bench.server.connections() > before).then_some(())
        });
    }
    disk.resync();
    let journal = caught_up(&bench, &id, &disk);
    lsns_are_whole(&journal);
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    bench.agent.stop().unwrap();
}

#[test]
fn a_filter_that_lost_its_ring_is_captured_in_a_new_epoch() {
    let bench = Bench::start(false);
    let id = bench.protect();
    scribble(&bench.filter.disk("virtio0"), 1, 10);
    bench.filter.hang_up();
    let again = FakeFilter::connect(&bench.socket(), "vm", &["virtio0"]);
    let disk = again.disk("virtio0");
    wait_for("capture to begin anew", || disk.is_attached().then_some(()));
    scribble(&disk, 2, 10);
    let journal = caught_up(&bench, &id, &disk);
    assert_eq!(journal.epoch, 2);
    lsns_are_whole(&journal);
    bench.agent.stop().unwrap();
}

#[test]
fn a_filter_that_reconnects_goes_on_in_its_epoch() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    bench.filter.hang_up();
    scribble(&disk, 2, 10);
    let _again = bench.filter.again(&bench.socket(), &["virtio0"]);
    scribble(&disk, 3, 10);
    let journal = caught_up(&bench, &id, &disk);
    assert_eq!(journal.epoch, 1);
    assert_eq!(bench.server.set_protection(&id, false).error, "");
    assert!(!disk.is_attached(), "the new connection is the one that is asked");
    lsns_are_whole(&journal);
    bench.agent.stop().unwrap();
}

#[test]
fn a_new_epoch_ships_only_what_differs_from_the_server_s_image() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    for chunk in 0..DISK_BYTES >> 16 {
        disk.write(chunk << 16, &noise(chunk, 1 << 16));
    }
    disk.resync();
    caught_up(&bench, &id, &disk);
    assert_eq!(bench.server.set_protection(&id, false).error, "");
    // Nobody sees these.
    disk.write(5 << 16, &noise(1000, 100));
    disk.write((9 << 16) - 1, &noise(1001, 2));
    assert_eq!(bench.server.set_protection(&id, true).error, "");
    disk.resync();
    let journal = caught_up(&bench, &id, &disk);
    lsns_are_whole(&journal);
    assert!(journal.image(DISK_BYTES) == *disk.image.lock().unwrap(), "the journal is not the disk");
    let status = wait_for("a status after the sync", || {
        bench.server.status(&id).filter(|status| status.sync_read_bytes == DISK_BYTES)
    });
    assert_eq!(status.sync_compared_bytes, DISK_BYTES);
    assert_eq!((status.sync_shipped_bytes, status.sync_equal_bytes), (3 << 16, DISK_BYTES - (3 << 16)));
    bench.agent.stop().unwrap();
}

#[test]
fn a_device_that_is_unplugged_is_closed_and_leaves_the_inventory() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    let captured = disk.producer().ring().captured_lsn().0;
    bench.filter.list(&[]);
    wait_for("the detach", || (!disk.is_attached()).then_some(()));
    bench.server.wait_for_journal(&id, "all its writes", |journal| journal.durable == captured);
    wait_for("the inventory without it", || bench.server.inventory().vms[0].disks.is_empty().then_some(()));
    bench.agent.stop().unwrap();
}

#[test]
fn a_fault_of_the_filter_ends_the_capture_in_order() {
    let bench = Bench::start(false);
    let id = bench.protect();
    let disk = bench.filter.disk("virtio0");
    scribble(&disk, 1, 10);
    let captured = disk.producer().ring().captured_lsn().0;
    bench.filter.fault("virtio0");
    wait_for("the detach", || (!disk.is_attached()).then_some(()));
    bench.server.wait_for_journal(&id, "all its writes", |journal| journal.durable == captured);
    bench.agent.stop().unwrap();
}

/// This test plays both roles: started again with the variable set, it is the filter that gets killed.
#[test]
fn a_killed_filter_leaves_what_it_published_and_voids() {
    const SOCKET: &str = "CDP_TEST_KILLED_FILTER";
    if let Some(socket) = std::env::var_os(SOCKET) {
        be_killed(std::path::Path::new(&socket));
    }
    let bench = Bench::start(false);
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["a_killed_filter_leaves_what_it_published_and_voids", "--exact", "--nocapture"])
        .env(SOCKET, bench.socket())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let id = bench.server.wait_for_disk("victim", "virtio0").disk;
    assert_eq!(bench.server.set_protection(&id, true).error, "");
    // GapBegin, 50 writes; then a fill that never ends holds up one more write.
    bench.server.wait_for_journal(&id, "the writes before", |journal| journal.durable >= 51);
    wait_for("the write behind the stuck fill", || {
        bench.server.status(&id).filter(|status| status.captured_lsn >= 53)
    });
    assert_eq!(bench.server.journal(&id).durable, 51);
    child.kill().unwrap();
    child.wait().unwrap();
    let journal = bench.server.wait_for_journal(&id, "the rest", |journal| journal.durable >= 53);
    lsns_are_whole(&journal);
    assert!(matches!(journal.records[51].0.op, Op::Void));
    assert!(matches!(journal.records[52].0.op, Op::Write { .. }));
    wait_for("its VM to leave", || {
        (!bench.server.inventory().vms.iter().any(|vm| vm.name == "victim")).then_some(())
    });
    // The same VM in another process: a new epoch after the old one's end.
    let next = FakeFilter::connect(&bench.socket(), "victim", &["virtio0"]);
    assert_eq!(bench.server.wait_for_disk("victim", "virtio0").disk, id);
    assert_eq!(bench.server.set_protection(&id, true).error, "");
    scribble(&next.disk("virtio0"), 5, 5);
    let journal = caught_up(&bench, &id, &next.disk("virtio0"));
    assert_eq!(journal.epoch, 2);
    lsns_are_whole(&journal);
    bench.agent.stop().unwrap();
}

fn be_killed(socket: &std::path::Path) -> ! {
    let filter = FakeFilter::connect(socket, "victim", &["virtio0"]);
    let disk = filter.disk("virtio0");
    wait_for("the attach", || disk.is_attached().then_some(()));
    for i in 0..50 {
        disk.write(i * 4096, &noise(i, 4096));
    }
    let producer = disk.producer();
    let _fill = producer.reserve_fill(65536).unwrap();
    let _issued = producer.begin_write(journal_format::ByteRange::new(0, 4096).unwrap(), false).unwrap();
    disk.write(0, &[1; 4096]);
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[test]
fn the_socket_has_its_mode_and_replaces_a_stale_one_but_not_a_live_one() {
    let bench = Bench::start(false);
    let path = bench.socket();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let second = host_agent::agent::Agent::start(config(bench.dir.path(), &bench.server, false));
    assert!(second.unwrap_err().to_string().contains("another agent"));
    bench.agent.stop().unwrap();
    assert!(!path.exists());
    // A socket file that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    // For a moment, a process that another test starts is a copy of this one and holds the listener that was closed here.
    let third = wait_for("the socket to be nobody's", || {
        host_agent::agent::Agent::start(config(bench.dir.path(), &bench.server, false)).ok()
    });
    third.stop().unwrap();
}

#[test]
fn sigterm_ships_what_there_is_and_ends_well() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let server = common::server::FakeServer::start();
    let socket = dir.path().join("agent.sock");
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_cdp-agent"))
        .args(["--server", &server.address(), "--ring-mib", "16", "--outbox-mib", "16"])
        .arg("--socket")
        .arg(&socket)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("ready "), "{line}");
    let filter = FakeFilter::connect(&socket, "vm", &["virtio0"]);
    let id = server.wait_for_disk("vm", "virtio0").disk;
    assert_eq!(server.set_protection(&id, true).error, "");
    let disk = filter.disk("virtio0");
    scribble(&disk, 1, 20);
    let taken = disk.producer().ring().captured_lsn().0;
    server.wait_for_journal(&id, "the writes", |journal| journal.durable >= taken);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(agent.wait().unwrap().success());
    assert!(disk.is_attached(), "a stopping agent detaches nothing");
    scribble(&disk, 2, 200);
    server.check();
}

/// While a large ring's memory is provided, which takes a while, and another disk's frames keep the agent from ending.
#[test]
fn an_agent_that_stops_meanwhile_begins_no_capture() {
    let bench = Bench::start_with(|config| config.ring_bytes = 1 << 30);
    let other = FakeFilter::connect(&bench.socket(), "vm2", &["virtio9"]);
    let (id, disk) = (bench.server.wait_for_disk("vm2", "virtio9").disk, other.disk("virtio9"));
    bench.protect();
    bench.filter.disk("virtio0").resync();
    bench.server.withhold_acks(true);
    bench.filter.disk("virtio0").write(0, &noise(3, 65536));
    std::thread::sleep(Duration::from_millis(100));
    let stopper = bench.agent.stopper();
    let Bench { server, agent, filter: _filter, dir: _dir } = bench;
    let (was_late, answer) = std::thread::scope(|scope| {
        let asked = scope.spawn(|| server.set_protection(&id, true));
        std::thread::sleep(Duration::from_millis(10));
        stopper.stop();
        // Where the ring was there sooner, the capture that was just beginning has begun then.
        std::thread::sleep(Duration::from_millis(5));
        (disk.is_attached(), asked.join().unwrap())
    });
    server.withhold_acks(false);
    agent.wait().unwrap();
    assert!(was_late || !disk.is_attached(), "nobody drains it");
    assert!(was_late || answer.error.contains("try again"), "{}", answer.error);
}
