//! Peers that are broken or mean no good: each is turned away, and the server goes on.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use cdp_server::limits::Patience;

use journal_format::wire::{self, MessageHeader, MessageType};
use journal_format::{Lsn, frame::FRAME_HEADER_BYTES};

use crate::agent::{Agent, Capture, hello};
use crate::{Fixture, now_ns};

/// The server still does its work.
fn assert_alive(fixture: &Fixture) {
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let frame = capture.begin().write(0, &[1; 512]).frame();
    let last = capture.last();
    agent.ship(&frame, last);
}

#[test]
fn bytes_that_are_no_message_end_the_connection() {
    let fixture = Fixture::start();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 64], &[0xff; 4096]] {
        let mut peer = Agent::raw(fixture.data());
        peer.send_bytes(bytes);
        peer.expect_closed();
    }
    assert_alive(&fixture);
}

#[test]
fn a_length_over_its_limit_ends_the_connection() {
    let fixture = Fixture::start();
    let mut peer = Agent::raw(fixture.data());
    let mut header = wire::encode(&hello()).expect("encodes");
    header.truncate(wire::MESSAGE_HEADER_BYTES);
    header[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32c::crc32c(&header[..12]);
    header[12..].copy_from_slice(&crc.to_le_bytes());
    peer.send_bytes(&header);
    peer.expect_closed();
    assert_alive(&fixture);
}

#[test]
fn a_stranger_who_starts_with_anything_but_hello_is_turned_away() {
    let fixture = Fixture::start();
    let mut peer = Agent::raw(fixture.data());
    peer.send(&wire::Inventory::default());
    peer.expect_closed();
    assert_alive(&fixture);
}

#[test]
fn another_protocol_is_refused_in_words() {
    let fixture = Fixture::start();
    let mut peer = Agent::raw(fixture.data());
    let welcome = peer.hello(&wire::Hello { protocol: 99, ..hello() });
    assert!(welcome.refused.contains("upgrade"), "{}", welcome.refused);
    peer.expect_closed();
    let mut peer = Agent::raw(fixture.data());
    let welcome = peer.hello(&wire::Hello { host_id: vec![1; 3], ..hello() });
    assert!(welcome.refused.contains("16 bytes"), "{}", welcome.refused);
    peer.expect_closed();
}

#[test]
fn without_the_token_nobody_gets_in() {
    let fixture = Fixture::start_with(|config| config.token = Some("secret".to_owned()));
    for token in ["", "Secret", "secret2"] {
        let mut peer = Agent::raw(fixture.data());
        let welcome = peer.hello(&wire::Hello { token: token.to_owned(), ..hello() });
        assert!(welcome.refused.contains("token"), "{token}");
        peer.expect_closed();
    }
    let mut peer = Agent::raw(fixture.data());
    assert_eq!(peer.hello(&wire::Hello { token: "secret".to_owned(), ..hello() }).refused, "");
}

#[test]
fn a_corrupt_frame_ends_the_connection_and_nothing_of_it_is_kept() {
    let fixture = Fixture::start();
    let mut agent = Agent::with_disk(fixture.data());
    let mut capture = Capture::new(&agent.open(None), now_ns() - 1_000_000_000);
    let mut frame = capture.begin().write(0, &[1; 512]).frame();
    let last = frame.len() - 1;
    frame[last] ^= 1;
    agent.send_frame(&frame);
    agent.expect_closed();
    frame[last] ^= 1;
    frame[FRAME_HEADER_BYTES] ^= 1;
    let mut agent = Agent::with_disk(fixture.data());
    assert_eq!(agent.open(Some(capture.epoch)).durable_lsn, 0);
    agent.send_frame(&frame);
    agent.expect_closed();
    frame[FRAME_HEADER_BYTES] ^= 1;
    let mut agent = Agent::with_disk(fixture.data());
    assert_eq!(agent.open(Some(capture.epoch)).durable_lsn, 0);
    agent.ship(&frame, Lsn(3));
}

#[test]
fn a_body_that_is_no_protobuf_ends_the_connection() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    let header = MessageHeader::new(MessageType::OpenDisk, 4).expect("fits");
    agent.send_bytes(zerocopy::IntoBytes::as_bytes(&header));
    agent.send_bytes(&[0xff; 4]);
    agent.expect_closed();
    let mut agent = Agent::connect(fixture.data());
    agent.send(&wire::OpenDisk { disk: vec![1; 5], ..wire::OpenDisk::default() });
    agent.expect_closed();
    assert_alive(&fixture);
}

#[test]
fn a_peer_that_trickles_holds_up_nobody() {
    let fixture = Fixture::start();
    let bytes = wire::encode(&hello()).expect("encodes");
    let mut slow = Agent::raw(fixture.data());
    let mut silent: Vec<_> = (0..20).map(|_| Agent::raw(fixture.data())).collect();
    for byte in bytes.iter().take(8) {
        slow.send_bytes(&[*byte]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_alive(&fixture);
    slow.send_bytes(&bytes[8..]);
    assert!(slow.receive().is_some(), "slow, but in time");
    let first = silent.remove(0);
    first.expect_closed();
}

#[test]
fn a_disk_larger_than_any_is_refused_in_words() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    agent.send(&wire::OpenDisk { disk: vec![9; 16], disk_bytes: u64::MAX, resume_epoch: 0 });
    let opened: wire::DiskOpened = agent.expect();
    assert!(opened.refused.contains("larger"), "{}", opened.refused);
    assert_alive(&fixture);
}

#[test]
fn a_ping_is_answered_with_its_number() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    agent.send(&wire::Ping { number: 42 });
    let (kind, body) = agent.receive().expect("answers");
    assert_eq!((kind, wire::decode::<wire::Ping>(&body).expect("decodes").number), (MessageType::Pong, 42));
}

#[test]
fn a_peer_that_does_not_read_is_cut_off() {
    let fixture = Fixture::start_with(|config| config.patience.write = Duration::from_millis(200));
    let mut agent = Agent::connect(fixture.data());
    let pings = wire::encode(&wire::Ping { number: 1 }).expect("encodes").repeat(10_000);
    // It sends until nothing more fits into the sockets, or it is cut off; only then it reads.
    agent.give_up_sending_after(Duration::from_millis(500));
    let sent = (1..1000).take_while(|_| agent.try_send(&pings).is_ok()).count() + 1;
    let answers = std::iter::from_fn(|| agent.receive()).count();
    assert!(
        answers < sent * 10_000,
        "the server keeps answers without end for a peer that does not read them"
    );
    assert_alive(&fixture);
}

#[test]
fn an_inventory_of_countless_empty_items_is_refused_before_anything_is_kept_of_it() {
    let fixture = Fixture::start();
    let mut agent = Agent::connect(fixture.data());
    // Field 1, no bytes: a VM of which nothing is said. Two bytes each; in memory a hundred times that.
    let body = [0x0a, 0].repeat(wire::MAX_INVENTORY_BYTES / 2);
    let header = MessageHeader::new(MessageType::Inventory, body.len()).expect("fits");
    agent.send_bytes(zerocopy::IntoBytes::as_bytes(&header));
    let _ = agent.try_send(&body);
    let _ = agent.try_send(&wire::encode(&wire::Ping { number: 1 }).expect("encodes"));
    assert!(agent.receive().is_none(), "the connection ends instead of going on");
    assert_alive(&fixture);
}

#[test]
fn a_thousand_silent_connections_keep_no_agent_and_no_operator_out() {
    let fixture = Fixture::start();
    let http = fixture.server.as_ref().expect("runs").http_address();
    let open =
        |address| (0..1000).map(|_| std::net::TcpStream::connect(address).expect("connects")).collect();
    let silent: [Vec<_>; 2] = [open(fixture.data()), open(http)];
    let asked = Instant::now();
    assert_alive(&fixture);
    assert_eq!(fixture.client.disks().expect("answers").len(), 1);
    // Well before any of them is cut off for its silence.
    assert!(asked.elapsed() < Patience::DEFAULT.hello, "the silent ones were waited for");
    drop(silent);
}

#[test]
fn an_agent_that_has_its_message_trickle_in_is_cut_off() {
    let fixture = Fixture::start_with(|config| config.patience.message = Duration::from_millis(500));
    let mut agent = Agent::connect(fixture.data());
    let header = MessageHeader::new(MessageType::Inventory, 1 << 20).expect("fits");
    agent.send_bytes(zerocopy::IntoBytes::as_bytes(&header));
    let cut_off = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        agent.try_send(&[0]).is_err()
    });
    assert!(cut_off, "a byte now and then keeps the connection for ever");
    assert_alive(&fixture);
}

#[test]
fn rest_requests_that_trickle_in_are_cut_off() {
    let fixture = Fixture::start_with(|config| {
        config.patience.http_head = Duration::from_millis(500);
        config.patience.http_body = Duration::from_millis(500);
    });
    let http = fixture.server.as_ref().expect("runs").http_address();
    let head = "PUT /v1/disks/x/protection HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    let with_body = format!("{head}Content-Length: 60000\r\n\r\n");
    for start in [head, &with_body] {
        let mut stream = std::net::TcpStream::connect(http).expect("connects");
        stream.write_all(start.as_bytes()).expect("the server reads");
        let cut_off = (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            stream.write_all(b"x").is_err()
        });
        assert!(cut_off, "a byte now and then keeps the connection for ever: {start}");
    }
    assert!(fixture.client.disks().is_ok());
}

#[test]
fn a_client_that_does_not_read_its_answer_is_cut_off() {
    let fixture = Fixture::start_with(|config| config.patience.http_silence = Duration::from_millis(500));
    let http = fixture.server.as_ref().expect("runs").http_address();
    let mut stream = std::net::TcpStream::connect(http).expect("connects");
    let questions = "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
    // It sends until nothing more fits into the sockets, or it is cut off; only then it reads.
    stream.set_write_timeout(Some(Duration::from_secs(2))).expect("a socket option");
    let sent = (1..1000).take_while(|_| stream.write_all(questions.as_bytes()).is_ok()).count() + 1;
    let mut answers = Vec::new();
    // A reset is as good as an end.
    let _ = stream.take(1 << 30).read_to_end(&mut answers);
    let answer =
        reqwest::blocking::get(fixture.url("/v1/openapi.json")).expect("answers").bytes().expect("bytes");
    assert!(
        answers.len() < sent * 1000 * answer.len(),
        "the server waits without end for a client that does not read"
    );
    assert!(fixture.client.disks().is_ok());
}

#[test]
fn rest_connections_that_say_nothing_do_not_stop_the_data_plane() {
    let fixture = Fixture::start();
    let http = fixture.server.as_ref().expect("runs").http_address();
    let silent: Vec<_> = (0..300).map(|_| std::net::TcpStream::connect(http).expect("connects")).collect();
    assert_alive(&fixture);
    drop(silent);
    assert_eq!(fixture.client.disks().expect("answers").len(), 1);
}
