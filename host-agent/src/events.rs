//! What reaches the hub: a bounded queue and the descriptor that wakes it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use capture_ring::control::CaptureFds;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::AgentError;
use crate::filters::FilterLink;
use crate::limits::EVENT_QUEUE;
use crate::live::Loaded;
use crate::session::{Adopt, Attach, Event, FilterId, Holding, VmInfo};
use crate::socket::Connected;

/// Something for the hub.
#[derive(Debug)]
pub enum Input {
    /// An event for the session.
    Event(Event),
    /// A filter connected and said hello.
    Filter(FilterId, Arc<FilterLink>, VmInfo),
    /// A filter holds the descriptors of a former agent's capture.
    Held(FilterId, Holding, CaptureFds),
    /// What a filter holds was read, or why it cannot be used.
    Loaded(Adopt, Result<Box<Loaded>, AgentError>),
    /// A new ring's memory is there; what the filter is asked, and the descriptors that it gets.
    Provided(Attach, CaptureFds),
    /// The attempt to connect to the server with this number ended.
    Connected(u64, std::io::Result<Connected>),
}

/// The hub is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// Puts things into the hub's queue; blocks while it is full, so that no peer can fill memory.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: SyncSender<Input>,
    wake: Arc<EventFd>,
}

impl Sender {
    /// Sends and wakes the hub.
    ///
    /// # Errors
    /// [`Gone`] when the hub has ended.
    pub fn send(&self, input: Input) -> Result<(), Gone> {
        self.queue.send(input).map_err(|_| Gone)?;
        // A full counter (EAGAIN) means that the hub is woken already.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// Sends an event.
    ///
    /// # Errors
    /// [`Gone`] when the hub has ended.
    pub fn event(&self, event: Event) -> Result<(), Gone> {
        self.send(Input::Event(event))
    }
}

/// Makes the queue: its sending side, its receiving side, the wake descriptor.
///
/// # Errors
/// When the kernel refuses the descriptor.
pub fn queue() -> Result<(Sender, Receiver<Input>, Arc<EventFd>), AgentError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let wake =
        EventFd::from_value_and_flags(0, flags).map_err(AgentError::errno("cannot make an eventfd"))?;
    let wake = Arc::new(wake);
    let (queue, receiver) = sync_channel(EVENT_QUEUE);
    Ok((Sender { queue, wake: Arc::clone(&wake) }, receiver, wake))
}
