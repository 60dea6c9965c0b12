//! Peers that have no business here.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cdp_tests::random::Random;
use cdp_tests::site::Site;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// Most bytes that one of them says.
const MAX_BYTES: u64 = 64 << 10;

/// Their connections; they hang up when dropped.
pub(crate) struct Strangers(Vec<Box<dyn Talk>>);

trait Talk: Read + Write {}
impl<T: Read + Write> Talk for T {}

impl Strangers {
    /// Some come to each door. What they say is cut off where nobody listens any more.
    pub(crate) fn come(site: &Site, random: &mut Random) -> Self {
        let wait = Some(Duration::from_millis(200));
        let mut all: Vec<Box<dyn Talk>> = Vec::new();
        for _ in 0..random.within(1..8) {
            for address in [site.data(), site.http()] {
                let peer = TcpStream::connect(address).expect("a connection");
                peer.set_write_timeout(wait).and_then(|()| peer.set_read_timeout(wait)).expect("time-outs");
                all.push(Box::new(peer));
            }
            let peer = seqpacket(site);
            peer.set_write_timeout(wait).and_then(|()| peer.set_read_timeout(wait)).expect("time-outs");
            all.push(Box::new(peer));
        }
        for peer in &mut all {
            let mut words = {
                let length = random.within(0..MAX_BYTES);
                random.bytes(length as usize)
            };
            match random.within(0..5) {
                // Not a word.
                0 => words.clear(),
                // A message that promises to be long.
                1 => words.splice(0..words.len().min(4), [0xff, 0xff, 0xff, 0x7f]).for_each(drop),
                // A message that promises to be short.
                2 => words.splice(0..words.len().min(4), [8, 0, 0, 0]).for_each(drop),
                3 => words
                    .splice(0..0, *b"GET /v1/disks HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n")
                    .for_each(drop),
                _ => {}
            }
            // It may be cut off; what counts is what becomes of the others.
            let _said = peer.write_all(&words);
        }
        Self(all)
    }

    /// Some listen before they go.
    pub(crate) fn listen(&mut self) {
        for peer in self.0.iter_mut().step_by(3) {
            let _heard = peer.read(&mut [0; 4096]);
        }
    }
}

/// A connection to the agent's socket, as a filter makes it.
fn seqpacket(site: &Site) -> UnixStream {
    let peer =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    let address = UnixAddr::new(&site.agent_socket()).expect("an address");
    connect(peer.as_raw_fd(), &address).expect("a connection");
    UnixStream::from(peer)
}
