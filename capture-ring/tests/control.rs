//! The control protocol: every message survives the wire, and no bytes make either end panic, leak or believe.
#![cfg(not(loom))]

use journal_format::ImageTag;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use capture_ring::control::{
    CaptureFds, Connection, DiskInfo, Fds, Hello, Listener, MESSAGE_HEADER_BYTES, Message, PROTOCOL_VERSION,
    Received, decode, encode,
};
use capture_ring::limits::MAX_MESSAGE_BYTES;
use capture_ring::{Bell, HostClock, Ring, RingConfig, RingErrorKind};
use journal_format::{DiskId, Epoch, Lsn};
use proptest::prelude::*;

fn text(most: usize) -> impl Strategy<Value = String> {
    proptest::collection::vec(any::<char>(), 0..=most / 4).prop_map(|chars| chars.into_iter().collect())
}

fn disk() -> impl Strategy<Value = DiskInfo> {
    (text(128), text(64), text(32), any::<u64>(), any::<bool>(), text(256)).prop_map(
        |(device, node, driver, disk_bytes, read_only, refused)| DiskInfo {
            device,
            node,
            driver,
            disk_bytes,
            read_only,
            refused,
        },
    )
}

fn hello() -> impl Strategy<Value = Hello> {
    (any::<u32>(), text(64), text(128), text(128), any::<[u8; 16]>(), text(256)).prop_map(
        |(pid, program, qemu_version, vm_name, vm_uuid, refused)| Hello {
            protocol: PROTOCOL_VERSION,
            pid,
            program,
            qemu_version,
            vm_name,
            vm_uuid,
            refused,
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let command = || (any::<u64>(), text(128));
    prop_oneof![
        hello().prop_map(Message::Hello),
        (proptest::collection::vec(disk(), 0..8), any::<bool>())
            .prop_map(|(disks, more)| Message::Disks { disks, more }),
        Just(Message::List),
        (command(), any::<Option<[u8; 16]>>()).prop_map(|((request, device), image)| Message::Attach {
            request,
            device,
            image: image.map(ImageTag)
        }),
        command().prop_map(|(request, device)| Message::Detach { request, device }),
        command().prop_map(|(request, device)| Message::Resync { request, device }),
        (any::<u64>(), any::<bool>(), text(512)).prop_map(|(request, ok, message)| Message::Result {
            request,
            ok,
            message
        }),
        (text(128), text(512)).prop_map(|(device, message)| Message::Fault { device, message }),
    ]
}

proptest! {
    #[test]
    fn any_message_decodes_to_itself(message in message()) {
        prop_assert_eq!(decode(&encode(&message).expect("within limits")).expect("decodes"), message);
    }

    #[test]
    fn no_cut_message_is_accepted(message in message(), cut in any::<prop::sample::Index>()) {
        let bytes = encode(&message).expect("within limits");
        prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn a_changed_byte_never_panics(message in message(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encode(&message).expect("within limits");
        let at = at.index(bytes.len());
        let changed = bytes[at] != byte;
        bytes[at] = byte;
        // What still decodes is another message: nothing in the bytes is ignored.
        if let Ok(decoded) = decode(&bytes) {
            prop_assert!(!changed || decoded != message);
        }
    }

    #[test]
    fn random_bodies_never_panic(kind in 0_u16..12, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = encode(&Message::List).expect("within limits");
        bytes[6..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend(body);
        let _ = decode(&bytes);
    }
}

#[test]
fn a_name_over_its_limit_is_refused_and_prose_is_cut() {
    let long = "é".repeat(400);
    let name = Message::Detach { request: 1, device: long.clone() };
    assert_eq!(encode(&name).expect_err("too long").kind(), RingErrorKind::Message);
    let prose = Message::Result { request: 1, ok: false, message: long };
    let Message::Result { message, .. } = decode(&encode(&prose).expect("cut")).expect("decodes") else {
        panic!("another message")
    };
    assert_eq!(message, "é".repeat(256));
}

fn received(connection: &Connection) -> Received {
    connection.recv(Some(Duration::from_secs(10))).expect("a message").expect("in time")
}

#[test]
fn an_attach_brings_a_ring_a_clock_and_a_bell() {
    let config =
        RingConfig { arena_bytes: 1 << 20, ..RingConfig::new(DiskId([1; 16]), Epoch(1), Lsn(1), 1 << 30) };
    let (_ring, ring_fd) = Ring::create(&config).expect("ring");
    let (clock, clock_fd) = HostClock::create().expect("clock");
    let bell = Bell::create().expect("bell");
    let (agent, filter) = Connection::pair().expect("sockets");
    let dup = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("a duplicate");
    let outbox = dup(ring_fd.as_fd());
    let fds = CaptureFds {
        ring: dup(ring_fd.as_fd()),
        clock: dup(clock_fd.as_fd()),
        bell: dup(bell.as_fd()),
        outbox,
    };
    agent.send_attach(7, "virtio0", Some(ImageTag([3; 16])), &fds).expect("sent");
    let Received { message, fds: Fds::Capture(fds) } = received(&filter) else { panic!("no descriptors") };
    assert_eq!(
        message,
        Message::Attach { request: 7, device: "virtio0".to_owned(), image: Some(ImageTag([3; 16])) }
    );
    // What was attached is held, and what is held comes back to the next agent.
    filter.send_held("virtio0", true, &fds).expect("sent");
    let Received { message, fds: Fds::Capture(fds) } = received(&agent) else { panic!("no descriptors") };
    assert_eq!(message, Message::Held { device: "virtio0".to_owned(), ended: true });
    agent.send_hold(8, "virtio0", fds.outbox.as_fd()).expect("sent");
    let Received { message, fds: Fds::Outbox(outbox) } = received(&filter) else { panic!("no descriptor") };
    assert_eq!(message, Message::Hold { request: 8, device: "virtio0".to_owned() });
    assert_eq!(Ring::open(outbox.as_fd()).expect("the same file").config(), &config);
    assert_eq!(Ring::open(fds.ring.as_fd()).expect("the ring").config(), &config);
    let before = clock.now();
    assert!(HostClock::open(fds.clock.as_fd()).expect("the clock").now() > before);
    Bell::from(fds.bell).ring();
    bell.wait(Duration::MAX);
    assert!(Ring::open(clock_fd.as_fd()).is_err(), "a clock is no ring");
    assert!(HostClock::open(ring_fd.as_fd()).is_err(), "a ring is no clock");
}

#[test]
fn a_long_list_of_disks_is_split() {
    let disks: Vec<DiskInfo> = (0..250)
        .map(|i| DiskInfo { device: format!("{i:0>128}"), refused: "x".repeat(256), ..DiskInfo::default() })
        .collect();
    let (filter, agent) = Connection::pair().expect("sockets");
    let sender = std::thread::spawn(move || (filter.send_disks(&disks), disks, filter));
    let mut found = Vec::new();
    loop {
        let Message::Disks { disks, more } = received(&agent).message else { panic!("another message") };
        found.extend(disks);
        if !more {
            break;
        }
    }
    let (sent, disks, _filter) = sender.join().expect("the sender");
    sent.expect("sent");
    assert_eq!(found, disks);
}

#[test]
fn a_closed_peer_and_an_oversize_message_are_errors() {
    let (one, other) = Connection::pair().expect("sockets");
    assert!(other.recv(Some(Duration::ZERO)).expect("open").is_none());
    let huge = vec![b'x'; MAX_MESSAGE_BYTES + MESSAGE_HEADER_BYTES];
    nix::unistd::write(&one, &huge).expect("sent");
    assert_eq!(other.recv(None).expect_err("too long").kind(), RingErrorKind::Message);
    drop(one);
    assert_eq!(other.recv(None).expect_err("closed").kind(), RingErrorKind::Closed);
    assert_eq!(other.send(&Message::List).expect_err("closed").kind(), RingErrorKind::Closed);
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsRawFd;
    let (one, other) = Connection::pair().expect("sockets");
    let bytes = encode(&Message::Attach { request: 1, device: String::new(), image: None }).expect("encodes");
    let fds = vec![one.as_fd().as_raw_fd(); 200];
    let before = open_fds();
    for _ in 0..10 {
        let rights = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(&bytes)];
        sendmsg::<()>(one.as_fd().as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).expect("sent");
        assert_eq!(other.recv(None).expect_err("too many").kind(), RingErrorKind::Message);
    }
    // Other tests of this process open a few meanwhile; 2000 leaked ones would show.
    assert!(open_fds() < before + 200, "leaked descriptors");
}

#[test]
fn a_socket_left_by_a_dead_agent_is_replaced_and_a_live_one_is_not() {
    let folder = std::env::temp_dir().join(format!("cdp-control-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("agent.sock");
    std::fs::write(&path, "precious").expect("written");
    assert!(Listener::bind(&path).is_err(), "that is no socket");
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
    std::fs::remove_file(&path).expect("removed");
    drop(Listener::bind(&path).expect("bound"));
    let listener = Listener::bind(&path).expect("bound again");
    assert!(Listener::bind(&path).is_err(), "an agent is alive there");
    let filter = Connection::connect(&path).expect("connected");
    // The first connection is the probe of the refused bind.
    drop(listener.accept().expect("accepted"));
    let agent = listener.accept().expect("accepted");
    assert_eq!(agent.peer().expect("credentials").0, std::process::id() as i32);
    filter.send(&Message::Hello(Hello { vm_name: "vm".to_owned(), ..Hello::default() })).expect("sent");
    assert!(matches!(received(&agent).message, Message::Hello(hello) if hello.vm_name == "vm"));
    std::fs::remove_dir_all(&folder).expect("removed");
}
