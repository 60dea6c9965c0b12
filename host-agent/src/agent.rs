//! The whole agent, to start and to stop.

use std::fs::File;
use std::thread::JoinHandle;

use crate::config::Config;
use crate::error::AgentError;
use crate::events::{Sender, queue};
use crate::filters::Filters;
use crate::hub::Hub;
use crate::identity::host_id;
use crate::session::{Event, Identity};

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    filters: Option<Filters>,
    sender: Sender,
    hub: Option<JoinHandle<()>>,
    /// Held while this agent lives, however it ends.
    _spool_lock: Option<File>,
}

/// What stops a running agent, from any thread.
#[derive(Clone, Debug)]
pub struct Stopper(Sender);

impl Stopper {
    /// Asks the agent to ship what its outboxes hold and to end.
    pub fn stop(&self) {
        let _ = self.0.event(Event::Stop);
    }
}

impl Agent {
    /// Opens the control socket and starts all threads. The server need not be there yet.
    ///
    /// # Errors
    /// What keeps it from starting, and what to do.
    pub fn start(config: Config) -> Result<Self, AgentError> {
        if let Some(drill) = &config.drill {
            tracing::error!(%drill, "THIS IS A DRILL: it fails on purpose; restart without --drill to end it");
        }
        let identity = Identity {
            host_id: host_id(config.machine_id.as_deref(), &config.host_name)?,
            host_name: config.host_name.clone(),
            token: config.token.clone(),
        };
        let spool_lock = config.spool.take()?;
        let (sender, inputs, wake) = queue()?;
        let filters = Filters::listen(&config, sender.clone())?;
        let hub = Hub::new(config, identity, sender.clone(), inputs, wake)?;
        let hub = std::thread::Builder::new()
            .name("cdp-hub".into())
            .spawn(move || hub.run())
            .map_err(AgentError::os("cannot start a thread"))?;
        Ok(Self { filters: Some(filters), sender, hub: Some(hub), _spool_lock: spool_lock })
    }

    /// What stops it.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.sender.clone())
    }

    /// Waits until it was stopped and has ended.
    ///
    /// # Errors
    /// When the hub panicked: a bug, after which nothing is shipped any more.
    pub fn wait(mut self) -> Result<(), AgentError> {
        let ended = self.hub.take().map(JoinHandle::join);
        drop(self.filters.take());
        match ended {
            Some(Err(_)) => {
                Err(AgentError::Protocol("the hub's thread panicked; please report this bug".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Stops it and waits.
    ///
    /// # Errors
    /// As [`Agent::wait`].
    pub fn stop(self) -> Result<(), AgentError> {
        self.stopper().stop();
        self.wait()
    }
}
