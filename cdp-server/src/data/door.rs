//! Who may come in: strangers, few and briefly; agents, up to a limit.
//!
//! A connection is a stranger's until it has said who it is. When one too many waits at the door the oldest of them is
//! cut off: an agent says hello at once, so it is never the oldest for long, however many silent ones there are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::data::socket::Socket;

/// Counts connections.
#[derive(Debug)]
pub(crate) struct Door {
    most_strangers: usize,
    most_agents: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_number: u64,
    /// By the order in which they came.
    strangers: BTreeMap<u64, Arc<Socket>>,
    agents: usize,
    visits: usize,
}

/// A connection's place; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Visit {
    door: Arc<Door>,
    number: u64,
    is_agent: bool,
}

impl Door {
    pub(crate) fn new(most_strangers: usize, most_agents: usize) -> Arc<Self> {
        Arc::new(Self { most_strangers, most_agents, state: Mutex::default() })
    }

    /// Lets a stranger in, and if that is one too many, cuts off the oldest.
    pub(crate) fn enter(self: &Arc<Self>, stream: &Arc<Socket>) -> Visit {
        let mut state = self.lock();
        state.last_number += 1;
        state.visits += 1;
        let number = state.last_number;
        state.strangers.insert(number, Arc::clone(stream));
        let oldest =
            if state.strangers.len() > self.most_strangers { state.strangers.pop_first() } else { None };
        drop(state);
        if let Some((_, oldest)) = oldest {
            oldest.cut();
        }
        Visit { door: Arc::clone(self), number, is_agent: false }
    }

    /// Cuts off everybody who has not said who he is.
    pub(crate) fn close(&self) {
        let strangers = std::mem::take(&mut self.lock().strangers);
        strangers.values().for_each(|stream| stream.cut());
    }

    /// Connections whose threads have not ended.
    pub(crate) fn visits(&self) -> usize {
        self.lock().visits
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visit {
    /// It is an agent. `false` when there are as many as there may be.
    pub(crate) fn is_agent(&mut self) -> bool {
        let mut state = self.door.lock();
        state.strangers.remove(&self.number);
        self.is_agent = state.agents < self.door.most_agents;
        state.agents += usize::from(self.is_agent);
        self.is_agent
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut state = self.door.lock();
        state.strangers.remove(&self.number);
        state.agents -= usize::from(self.is_agent);
        state.visits -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    fn pair(listener: &TcpListener) -> (TcpStream, Arc<Socket>) {
        let theirs = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (theirs, Arc::new(Socket::Tcp(listener.accept().expect("accepts").0)))
    }

    #[test]
    fn one_stranger_too_many_costs_the_oldest_his_place_and_agents_keep_theirs() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let door = Door::new(2, 1);
        let peers: Vec<_> = (0..4).map(|_| pair(&listener)).collect();
        let mut visits: Vec<_> = peers.iter().take(2).map(|(_, ours)| door.enter(ours)).collect();
        assert!(visits[0].is_agent());
        visits.extend(peers.iter().skip(2).map(|(_, ours)| door.enter(ours)));
        assert_eq!((&peers[1].0).read(&mut [0]).expect("its end"), 0, "the oldest stranger is cut off");
        assert!(!visits[3].is_agent(), "there is room for one agent only");
        visits.clear();
        assert_eq!(door.visits(), 0);
        let (_theirs, ours) = pair(&listener);
        assert!(door.enter(&ours).is_agent(), "places are given back");
    }
}
