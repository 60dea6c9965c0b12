//! The whole server: start, addresses, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::config::Config;
use crate::core::Core;
use crate::data::DataPlane;
use crate::error::{LISTEN, ServerError};
use crate::http;
use crate::limits::{RECONCILE_EVERY, STOP_TIMEOUT};
use crate::{protection, rest};

/// A running server. [`Server::stop`] ends it cleanly; dropping it without leaves its threads running.
#[derive(Debug)]
pub struct Server {
    runtime: Runtime,
    http_address: SocketAddr,
    http_stop: oneshot::Sender<()>,
    http_task: tokio::task::JoinHandle<()>,
    data: DataPlane,
    reconcile_stop: mpsc::Sender<()>,
    reconcile: JoinHandle<()>,
}

/// The signals that end the server, caught.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Server {
    /// Opens catalog and store, and starts everything. When it returns, all addresses take connections.
    ///
    /// # Errors
    /// What could not be opened or listened on.
    pub fn start(config: Config) -> Result<Self, ServerError> {
        let core = Arc::new(Core::open(&config)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("cdp-rest")
            .enable_all()
            .build()
            .map_err(|e| ServerError::io("start", "the async runtime", e))?;
        let listener = runtime
            .block_on(TcpListener::bind(config.http))
            .map_err(|e| ServerError::io(LISTEN, config.http.to_string(), e))?;
        let http_address =
            listener.local_addr().map_err(|e| ServerError::io(LISTEN, config.http.to_string(), e))?;
        let (http_stop, stopped) = oneshot::channel::<()>();
        let router = rest::router(Arc::clone(&core));
        let http_task = runtime.spawn(http::serve(listener, router, config.patience, stopped));
        let data = DataPlane::start(Arc::clone(&core), &config)?;
        let (reconcile_stop, stop) = mpsc::channel();
        let reconcile = std::thread::Builder::new()
            .name("cdp-protect".to_owned())
            .spawn(move || protection::reconcile_loop(&core, &stop, RECONCILE_EVERY))
            .map_err(|e| ServerError::io("start thread", "cdp-protect", e))?;
        Ok(Self { runtime, http_address, http_stop, http_task, data, reconcile_stop, reconcile })
    }

    /// The address of REST, with the real port.
    #[must_use]
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// The TCP address for agents, with the real port.
    #[must_use]
    pub fn data_address(&self) -> SocketAddr {
        self.data.address()
    }

    /// Takes over SIGTERM and SIGINT, so that from now on they wait for [`Server::wait`].
    ///
    /// # Errors
    /// `Io` when the handlers cannot be installed.
    pub fn catch_signals(&self) -> Result<Signals, ServerError> {
        let _runtime = self.runtime.enter();
        let catch = |kind| signal(kind).map_err(|e| ServerError::io("catch", "SIGTERM and SIGINT", e));
        Ok(Signals { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    /// Waits for SIGTERM or SIGINT; says which.
    #[must_use]
    pub fn wait(&self, mut signals: Signals) -> &'static str {
        self.runtime.block_on(async {
            tokio::select! {
                _ = signals.terminate.recv() => "SIGTERM",
                _ = signals.interrupt.recv() => "SIGINT",
            }
        })
    }

    /// Stops cleanly: no new requests, what was received is made durable and acknowledged as far as the agents still
    /// listen, open requests get a few seconds to end.
    pub fn stop(self) {
        drop(self.reconcile_stop);
        let _ = self.http_stop.send(());
        self.data.stop();
        if self.reconcile.join().is_err() {
            tracing::error!("the protection controller panicked; report this as a bug");
        }
        let ended = self.runtime.block_on(async { tokio::time::timeout(STOP_TIMEOUT, self.http_task).await });
        if ended.is_err() {
            tracing::warn!("open REST requests did not end in time; cutting them off");
        }
        self.runtime.shutdown_timeout(STOP_TIMEOUT);
    }
}
