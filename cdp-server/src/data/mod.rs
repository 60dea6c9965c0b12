//! The data plane: agents connect, frames come in, become durable and are acknowledged.
//!
//! | thread | number | does | may block on |
//! | --- | --- | --- | --- |
//! | `cdp-accept` | 1 per listening socket | accepts connections, up to a limit | the network |
//! | `cdp-agent` | 1 per connection | reads and checks messages, queues frames | the network; the queue when full |
//! | `cdp-send` | 1 per agent | writes what others queued for that agent | the network |
//! | `cdp-commit` | 1 | appends, commits, acknowledges, for all disks | the store |
//! | `cdp-write` | 1, from the first large step on | writes large pieces of all disks' data | the disk |
//! | `cdp-sync` | up to 15 while a commit runs | make files durable | the disk |
//! | `cdp-hash` | 2 | hashes what journals hold, for agents that compare | the store |
//!
//! No async runtime here: a thread that waits for a disk holds up nobody who answers REST requests.

pub(crate) mod committer;
pub(crate) mod door;
pub mod hashes;
pub(crate) mod listener;
pub(crate) mod message;
pub(crate) mod peer;
pub mod plane;
pub(crate) mod queue;
pub(crate) mod session;
pub(crate) mod socket;
pub(crate) mod spares;
pub(crate) mod tls;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::core::Core;
use crate::data::committer::Work;
use crate::data::door::Door;
use crate::data::hashes::Hashers;
use crate::data::listener::Listener;
use crate::data::queue::Queue;
use crate::data::socket::Socket;
use crate::data::spares::Spares;
use crate::error::ServerError;
use crate::limits::{INGEST_QUEUE_BYTES, MAX_AGENTS, MAX_STRANGERS, STOP_TIMEOUT};

/// The running data plane.
#[derive(Debug)]
pub(crate) struct DataPlane {
    address: SocketAddr,
    shared: Arc<Shared>,
    accept: Vec<(Arc<Listener>, JoinHandle<()>)>,
    commit: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    core: Arc<Core>,
    queue: Arc<Queue<Work>>,
    spares: Arc<Spares>,
    hashers: Hashers,
    stopping: AtomicBool,
    door: Arc<Door>,
}

impl DataPlane {
    /// Starts listening, on a Unix socket too if there is a path for one, and committing.
    pub(crate) fn start(core: Arc<Core>, config: &Config) -> Result<Self, ServerError> {
        let (tcp, address) = Listener::tcp(config.listen, config.tls.clone())?;
        let unix = config.listen_unix.as_deref().map(Listener::unix).transpose()?;
        let queue = Arc::new(Queue::new(INGEST_QUEUE_BYTES));
        let spares = Arc::new(Spares::default());
        let commit = spawn("cdp-commit", {
            let (core, queue, spares) = (Arc::clone(&core), Arc::clone(&queue), Arc::clone(&spares));
            move || committer::run(&core, &queue, &spares)
        })?;
        let hashers = Hashers::start(&core)?;
        let shared = Arc::new(Shared {
            core,
            queue,
            spares,
            hashers,
            stopping: AtomicBool::new(false),
            door: Door::new(MAX_STRANGERS, MAX_AGENTS),
        });
        let accepting = |listener| {
            let (listener, shared) = (Arc::new(listener), Arc::clone(&shared));
            let own = Arc::clone(&listener);
            spawn("cdp-accept", move || accept_loop(&shared, &own)).map(|thread| (listener, thread))
        };
        let accept = [Some(tcp), unix].into_iter().flatten().map(accepting).collect::<Result<_, _>>()?;
        Ok(Self { address, shared, accept, commit })
    }

    /// The TCP address it listens on, with the real port.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections, closes those there are, and commits what they had sent.
    pub(crate) fn stop(self) {
        // ORDERING: pairs with the load in `accept_loop`, which the closing below wakes.
        self.shared.stopping.store(true, Ordering::Release);
        for (listener, thread) in self.accept {
            listener.close();
            join(thread);
        }
        self.shared.door.close();
        self.shared.core.fleet.close_all("the server stops");
        self.shared.queue.close();
        join(self.commit);
        let end = Instant::now() + STOP_TIMEOUT;
        while self.shared.door.visits() > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn accept_loop(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        let accepted = listener.accept();
        // ORDERING: pairs with the store in `DataPlane::stop`.
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok(stream) => serve(shared, stream),
            Err(error) => {
                // Out of file descriptors, most likely: the ones in use have to go first.
                tracing::warn!(%error, hint = daemon::advice(&error), "cannot accept a connection; trying again");
                thread::sleep(Duration::from_millis(200));
            }
        }
    }
}

fn serve(shared: &Arc<Shared>, stream: Socket) {
    let (shared, stream) = (Arc::clone(shared), Arc::new(stream));
    let visit = shared.door.enter(&stream);
    let thread = spawn("cdp-agent", move || {
        session::run(&shared.core, &shared.queue, &shared.spares, &shared.hashers, visit, stream);
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "turned a connection away");
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ServerError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(|e| ServerError::io("start thread", name, e))
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread of the data plane panicked; report this as a bug");
    }
}
