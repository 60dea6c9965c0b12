//! REST connections: bounded in number, in size and in time, whatever the clients do.
//!
//! Without bounds, clients that connect and say nothing, or little at a time, would use up the process's file
//! descriptors and memory, and with them the data plane's and the store's. So heads and bodies have to arrive in time,
//! bodies are small and read before anybody works on the request, and when there is no place for a new connection, the
//! one that has been quiet longest makes room.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request, header};
use axum::response::{IntoResponse, Response};
use cdp_api::{Kind, Problem};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::limits::{MAX_DISCARD_BYTES, MAX_HTTP_CONNECTIONS, MAX_REST_BODY_BYTES, Patience};
use crate::rest::problem::{ApiError, bad_request};

/// Serves requests until told to stop (also by dropping the sender), then until those under way are answered.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    patience: Patience,
    mut stop: oneshot::Receiver<()>,
) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Places::new());
    loop {
        let accepted = tokio::select! {
            _ = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                places.make_room().await;
                start(stream, &router, patience, &places, &graceful);
            }
            Err(error) => {
                tracing::warn!(%error, hint = daemon::advice(&error), "cannot accept a REST connection; trying again");
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

fn start(
    stream: TcpStream,
    router: &Router,
    patience: Patience,
    places: &Arc<Places>,
    graceful: &GracefulShutdown,
) {
    let place = places.take();
    let inner = TowerToHyperService::new(router.clone());
    let working = Arc::clone(&place.working);
    let service = service_fn(move |request: Request<Incoming>| {
        let (inner, working) = (inner.clone(), Arc::clone(&working));
        async move { Ok::<_, Infallible>(answer(&inner, &working, request, patience.http_body).await) }
    });
    let silence = patience.http_silence;
    let stream =
        Connection { stream, heard: Arc::clone(&place.heard), silence, quiet: Box::pin(sleep(silence)) };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.http_head)
        .serve_connection(TokioIo::new(stream), service);
    let (connection, number) = (graceful.watch(connection), place.number);
    let task = tokio::spawn(async move {
        let _place = place;
        // How it ended is the client's business; a broken connection is nothing to log.
        let _ = connection.await;
    });
    places.started(number, task.abort_handle());
}

/// Answers one request: its body first, then the router. While the router works the connection is not cut off.
async fn answer(
    router: &TowerToHyperService<Router>,
    working: &AtomicBool,
    request: Request<Incoming>,
    body_time: Duration,
) -> Response {
    let (head, body) = request.into_parts();
    let body = match timeout(body_time, whole(&head.headers, body)).await {
        Ok(Ok(body)) => body,
        Ok(Err(refused)) => return refused.into_response(),
        Err(_) => return ApiError::from(bad_request("the body did not arrive in time")).into_response(),
    };
    // ORDERING: a hint for `Places::make_room`; nothing is published through it.
    working.store(true, Ordering::Relaxed);
    let answer = router.call(Request::from_parts(head, Body::from(body))).await;
    // ORDERING: as above.
    working.store(false, Ordering::Relaxed);
    match answer {
        Ok(answer) => answer,
        Err(never) => match never {},
    }
}

/// The whole body; of one that is too large, no more than needed for the refusal to arrive.
async fn whole(headers: &HeaderMap, mut body: Incoming) -> Result<Bytes, ApiError> {
    let waits = headers.get(header::EXPECT).is_some();
    if waits && body.size_hint().lower() > MAX_REST_BODY_BYTES as u64 {
        return Err(too_large());
    }
    let (mut kept, mut seen) = (Vec::new(), 0_usize);
    while let Some(part) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let part = part.map_err(|error| bad_request(format!("the body broke off: {error}")))?;
        let Ok(data) = part.into_data() else { continue };
        seen = seen.saturating_add(data.len());
        if seen <= MAX_REST_BODY_BYTES {
            kept.extend_from_slice(&data);
        } else if seen > MAX_DISCARD_BYTES {
            break;
        }
    }
    if seen > MAX_REST_BODY_BYTES { Err(too_large()) } else { Ok(kept.into()) }
}

fn too_large() -> ApiError {
    let detail = format!("the body is over {MAX_REST_BODY_BYTES} bytes");
    Problem::new(
        Kind::TooLarge,
        detail,
        "see /v1/openapi.json for what the request takes; no request needs so much",
    )
    .into()
}

/// The places for connections.
#[derive(Debug)]
struct Places {
    state: Mutex<Taken>,
    freed: Notify,
    since: Instant,
}

#[derive(Debug, Default)]
struct Taken {
    last_number: u64,
    connections: HashMap<u64, Guest>,
}

/// One connection, as seen by the one who has to find room.
#[derive(Debug)]
struct Guest {
    /// Milliseconds after [`Places::since`] when a byte last went either way.
    heard: Arc<AtomicU64>,
    working: Arc<AtomicBool>,
    task: Option<AbortHandle>,
}

/// A connection's place, given back when it is dropped.
#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    number: u64,
    heard: Arc<Heard>,
    working: Arc<AtomicBool>,
}

/// When a connection was last heard of.
#[derive(Debug)]
struct Heard {
    at: Arc<AtomicU64>,
    since: Instant,
}

impl Heard {
    fn now(&self) {
        let ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        // ORDERING: a hint for `Places::make_room`; nothing is published through it.
        self.at.store(ms, Ordering::Relaxed);
    }
}

impl Places {
    fn new() -> Self {
        Self { state: Mutex::default(), freed: Notify::new(), since: Instant::now() }
    }

    /// Waits until there is a place, after cutting off the connection that has been quiet longest, if there is none.
    async fn make_room(&self) {
        loop {
            let freed = self.freed.notified();
            if self.has_room() {
                return;
            }
            freed.await;
        }
    }

    fn has_room(&self) -> bool {
        let mut state = self.lock();
        if state.connections.len() < MAX_HTTP_CONNECTIONS {
            return true;
        }
        // ORDERING: hints, see `answer` and `Heard::now`.
        let idle = state.connections.iter().filter(|(_, guest)| !guest.working.load(Ordering::Relaxed));
        // ORDERING: as above.
        let quietest =
            idle.min_by_key(|(_, guest)| guest.heard.load(Ordering::Relaxed)).map(|(number, _)| *number);
        let Some(guest) = quietest.and_then(|number| state.connections.remove(&number)) else { return false };
        if let Some(task) = guest.task {
            task.abort();
        }
        true
    }

    fn take(self: &Arc<Self>) -> Place {
        let mut state = self.lock();
        state.last_number += 1;
        let number = state.last_number;
        let (at, working) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let heard = Heard { at: Arc::clone(&at), since: self.since };
        heard.now();
        state.connections.insert(number, Guest { heard: at, working: Arc::clone(&working), task: None });
        Place { places: Arc::clone(self), number, heard: Arc::new(heard), working }
    }

    fn started(&self, number: u64, task: AbortHandle) {
        // It may have ended already.
        if let Some(guest) = self.lock().connections.get_mut(&number) {
            guest.task = Some(task);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().connections.remove(&self.number);
        self.places.freed.notify_one();
    }
}

/// One connection: fails when no byte has gone either way for a while.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    heard: Arc<Heard>,
    silence: Duration,
    quiet: Pin<Box<Sleep>>,
}

impl Connection {
    /// Passes on what the stream says; bytes that went either way end the silence, and too long a silence is an error.
    fn heard<T>(&mut self, cx: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.heard.now();
            self.quiet.as_mut().reset(Instant::now() + self.silence);
            return progress;
        }
        self.quiet.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.heard(cx, read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.heard(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.heard(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
