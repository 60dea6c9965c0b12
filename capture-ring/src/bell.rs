//! How a producer wakes a consumer that sleeps.

#[cfg(not(loom))]
mod event {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use crate::error::RingError;

    /// An eventfd. The agent makes it and gives a duplicate to each filter; one may serve several rings.
    #[derive(Debug)]
    pub struct Bell(OwnedFd);

    impl Bell {
        /// A new bell.
        ///
        /// # Errors
        /// `Os` when the kernel refuses another descriptor.
        pub fn create() -> Result<Self, RingError> {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let event = EventFd::from_value_and_flags(0, flags)
                .map_err(|e| RingError::os("cannot make an eventfd", e))?;
            Ok(Self(event.into()))
        }

        /// Another handle to the same bell.
        ///
        /// # Errors
        /// `Os` when the kernel refuses another descriptor.
        pub fn duplicate(&self) -> Result<Self, RingError> {
            self.0.try_clone().map(Self).map_err(|e| RingError::os("cannot duplicate the eventfd", e))
        }

        /// Wakes the consumer, or makes its next wait return at once. One system call that never blocks.
        pub fn ring(&self) {
            // A full counter (EAGAIN) means that the consumer is woken already.
            let _ = nix::unistd::write(&self.0, &1_u64.to_ne_bytes());
        }

        /// Blocks until somebody rings or the time is over, and forgets rings up to now.
        pub fn wait(&self, timeout: Duration) {
            let millis = timeout.as_millis().try_into().unwrap_or(i32::MAX);
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            // An interrupted or failed wait is an early return, which every caller must expect anyway.
            if poll(&mut fds, timeout).is_ok_and(|ready| ready > 0) {
                let mut count = [0_u8; 8];
                let _ = nix::unistd::read(&self.0, &mut count);
            }
        }
    }

    impl From<OwnedFd> for Bell {
        /// Takes over an eventfd received from the agent.
        fn from(fd: OwnedFd) -> Self {
            Self(fd)
        }
    }

    impl AsFd for Bell {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
}

#[cfg(not(loom))]
pub use event::Bell;

/// The bell under loom.
#[cfg(loom)]
#[derive(Clone, Debug)]
pub struct Bell(std::sync::Arc<loom::sync::Notify>);

#[cfg(loom)]
impl Default for Bell {
    fn default() -> Self {
        Self(std::sync::Arc::new(loom::sync::Notify::new()))
    }
}

#[cfg(loom)]
impl Bell {
    /// Wakes the consumer.
    pub fn ring(&self) {
        self.0.notify();
    }

    /// Blocks until somebody rings; loom reports a deadlock when nobody can.
    pub fn wait_for_ring(&self) {
        self.0.wait();
    }
}
