//! A network with weather: a TCP relay between an agent and its server that can hold bytes back, slow them down, or cut
//! every connection wherever it happens to be, also within a message.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::random::Random;

/// How long a pump waits before it looks at the weather again.
const LOOK: Duration = Duration::from_millis(5);

/// What the network does to bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weather {
    /// They pass.
    Clear = 0,
    /// They pass a few at a time, late.
    Slow = 1,
    /// They stay where they are; connections live on.
    Stalled = 2,
    /// Connections are cut, and new ones as soon as they are made.
    Down = 3,
}

/// Sees what passes.
pub trait Watch: Send + Sync + std::fmt::Debug {
    /// These bytes are about to be sent on, to the server or to the agent.
    fn passed(&self, to_server: bool, bytes: &[u8]);
}

#[derive(Debug)]
struct Shared {
    weather: AtomicU8,
    watch: Option<Arc<dyn Watch>>,
    stop: AtomicBool,
    seed: AtomicU64,
    server: SocketAddr,
}

impl Shared {
    fn weather(&self) -> Weather {
        // ORDERING: Relaxed; the weather stands alone.
        match self.weather.load(Ordering::Relaxed) {
            0 => Weather::Clear,
            1 => Weather::Slow,
            2 => Weather::Stalled,
            _ => Weather::Down,
        }
    }

    fn is_over(&self) -> bool {
        // ORDERING: Relaxed; the flag stands alone.
        self.stop.load(Ordering::Relaxed)
    }
}

/// The relay. Dropping it cuts everything.
#[derive(Debug)]
pub struct Network {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

impl Network {
    /// A relay on a free port, to `server`.
    ///
    /// # Panics
    /// When there is no free port.
    #[must_use]
    pub fn to(server: &str) -> Self {
        Self::start(server, None)
    }

    /// The same, with somebody who sees what passes.
    ///
    /// # Panics
    /// When there is no free port.
    #[must_use]
    pub fn watched(server: &str, watch: Arc<dyn Watch>) -> Self {
        Self::start(server, Some(watch))
    }

    fn start(server: &str, watch: Option<Arc<dyn Watch>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("non-blocking");
        let server = server.parse().expect("an address");
        let shared = Arc::new(Shared {
            weather: AtomicU8::new(0),
            watch,
            stop: AtomicBool::new(false),
            seed: AtomicU64::new(1),
            server,
        });
        let mine = Arc::clone(&shared);
        let accepting = thread::spawn(move || accept(&mine, &listener));
        Self { shared, address, accepting: Some(accepting) }
    }

    /// Where the agent connects to.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Changes the weather, from now on.
    pub fn set(&self, weather: Weather) {
        // ORDERING: Relaxed; the weather stands alone.
        self.shared.weather.store(weather as u8, Ordering::Relaxed);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // ORDERING: Relaxed; the flag stands alone.
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    let mut pumps = Vec::new();
    while !shared.is_over() {
        let Ok((agent, _)) = listener.accept() else {
            thread::sleep(LOOK);
            continue;
        };
        if shared.weather() == Weather::Down {
            continue;
        }
        let Ok(server) = TcpStream::connect(shared.server) else { continue };
        let pair = |a: &TcpStream, b: &TcpStream, to_server: bool| {
            let (from, to) = (a.try_clone().expect("a descriptor"), b.try_clone().expect("a descriptor"));
            let shared = Arc::clone(shared);
            thread::spawn(move || pump(&shared, from, to, to_server))
        };
        pumps.extend([pair(&agent, &server, true), pair(&server, &agent, false)]);
    }
    for pump in pumps {
        let _ = pump.join();
    }
}

/// Carries bytes one way until either end closes, or the weather does.
fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream, to_server: bool) {
    let mut random = Random::of(shared.seed.fetch_add(1, Ordering::Relaxed));
    from.set_nonblocking(false).expect("blocking");
    from.set_read_timeout(Some(LOOK)).expect("a time-out");
    to.set_nonblocking(false).expect("blocking");
    let mut buffer = vec![0; 64 << 10];
    'carry: while !shared.is_over() && shared.weather() != Weather::Down {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(_) => break,
        };
        if let Some(watch) = &shared.watch {
            watch.passed(to_server, &buffer[..length]);
        }
        let mut sent = 0;
        while sent < length {
            let step = match shared.weather() {
                Weather::Clear => length - sent,
                Weather::Slow => {
                    thread::sleep(Duration::from_micros(random.within(100..3000)));
                    (length - sent).min(random.within(1..4096) as usize)
                }
                Weather::Stalled if !shared.is_over() => {
                    thread::sleep(LOOK);
                    continue;
                }
                // The other end gets a part of what was under way.
                Weather::Down | Weather::Stalled => {
                    let part = sent + random.within(0..(length - sent) as u64 + 1) as usize;
                    let _ = to.write_all(&buffer[sent..part]);
                    break 'carry;
                }
            };
            if to.write_all(&buffer[sent..sent + step]).is_err() {
                break 'carry;
            }
            sent += step;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_wait_and_are_cut() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        let network = Network::to(&server.local_addr().expect("bound").to_string());
        let mut agent = TcpStream::connect(network.address()).expect("the relay");
        let (mut far, _) = server.accept().expect("the relay connects");
        agent.write_all(b"one").expect("sent");
        let mut word = [0; 3];
        far.read_exact(&mut word).expect("received");
        assert_eq!(&word, b"one");
        network.set(Weather::Stalled);
        thread::sleep(LOOK * 4);
        agent.write_all(b"two").expect("sent");
        far.set_read_timeout(Some(LOOK * 10)).expect("a time-out");
        assert!(far.read_exact(&mut word).is_err(), "nothing passes while it is stalled");
        far.set_read_timeout(None).expect("no time-out");
        network.set(Weather::Slow);
        far.read_exact(&mut word).expect("received");
        assert_eq!(&word, b"two");
        network.set(Weather::Down);
        assert_eq!(far.read(&mut word).expect("closed"), 0);
    }
}
