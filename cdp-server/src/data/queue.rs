//! The queue between the readers and the committer: bounded in bytes, so that a slow disk slows the readers, whose
//! unread sockets slow the agents.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Work that a slow disk must not let pile up.
pub(crate) trait Weighty {
    /// Bytes it holds.
    fn weight(&self) -> usize;
}

/// First in, first out; many producers, one consumer.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    limit: usize,
    not_full: Condvar,
    not_empty: Condvar,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    weight: usize,
    closed: bool,
}

impl<T: Weighty> Queue<T> {
    pub(crate) fn new(limit: usize) -> Self {
        let state = State { items: VecDeque::new(), weight: 0, closed: false };
        Self { state: Mutex::new(state), limit, not_full: Condvar::new(), not_empty: Condvar::new() }
    }

    /// Waits for room and puts `item` in; gives it back once the queue is closed. An item heavier than the whole queue
    /// goes in when the queue is empty.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let weight = item.weight();
        let full = |state: &mut State<T>| {
            !state.closed && !state.items.is_empty() && state.weight.saturating_add(weight) > self.limit
        };
        let mut state = self.not_full.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return Err(item);
        }
        state.weight = state.weight.saturating_add(weight);
        state.items.push_back(item);
        // The consumer sleeps only while nothing is in.
        if state.items.len() == 1 {
            self.not_empty.notify_one();
        }
        Ok(())
    }

    /// Waits for work and takes what is there, until `most` bytes are reached. `None` once the queue is closed and
    /// empty.
    pub(crate) fn take(&self, most: usize) -> Option<Vec<T>> {
        let idle = |state: &mut State<T>| !state.closed && state.items.is_empty();
        let state = self.not_empty.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        self.take_from(state, most)
    }

    /// As [`Queue::take`], but waits no longer than `patience`: `None` when nothing came.
    pub(crate) fn take_more(&self, most: usize, patience: Duration) -> Option<Vec<T>> {
        let mut state = self.lock();
        if !patience.is_zero() {
            let idle = |state: &mut State<T>| !state.closed && state.items.is_empty();
            let waited = self.not_empty.wait_timeout_while(state, patience, idle);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.take_from(state, most)
    }

    fn take_from(&self, mut state: MutexGuard<'_, State<T>>, most: usize) -> Option<Vec<T>> {
        let (mut batch, mut weight) = (Vec::new(), 0_usize);
        while weight < most
            && let Some(item) = state.items.pop_front()
        {
            weight = weight.saturating_add(item.weight());
            batch.push(item);
        }
        state.weight = state.weight.saturating_sub(weight);
        self.not_full.notify_all();
        (!batch.is_empty()).then_some(batch)
    }

    /// Refuses new work; what is in can still be taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.not_full.notify_all();
        self.not_empty.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    impl Weighty for usize {
        fn weight(&self) -> usize {
            *self
        }
    }

    #[test]
    fn a_full_queue_holds_the_producer_until_something_is_taken() {
        let queue = Arc::new(Queue::new(10));
        queue.push(8).expect("open");
        let (done, pushed) = mpsc::channel();
        let producer = Arc::clone(&queue);
        let thread = std::thread::spawn(move || {
            producer.push(5).expect("open");
            done.send(()).expect("the test waits");
        });
        assert!(pushed.recv_timeout(Duration::from_millis(100)).is_err(), "8 + 5 is more than 10");
        assert_eq!(queue.take(1), Some(vec![8]));
        pushed.recv_timeout(Duration::from_secs(10)).expect("room now");
        thread.join().expect("ends");
        assert_eq!(queue.take(1), Some(vec![5]));
    }

    #[test]
    fn a_closed_queue_refuses_new_work_and_gives_out_the_old() {
        let queue = Queue::new(10);
        queue.push(3).expect("open");
        queue.push(4).expect("open");
        queue.close();
        assert_eq!(queue.push(1), Err(1));
        assert_eq!(queue.take(100), Some(vec![3, 4]));
        assert_eq!(queue.take(100), None);
    }

    #[test]
    fn more_is_taken_if_it_is_there_or_comes_in_time() {
        let (queue, none, long) = (Arc::new(Queue::new(10)), Duration::ZERO, Duration::from_secs(60));
        assert_eq!(queue.take_more(100, none), None);
        assert_eq!(queue.take_more(100, Duration::from_millis(1)), None);
        queue.push(3).expect("open");
        queue.push(4).expect("open");
        assert_eq!(queue.take_more(1, long), Some(vec![3]));
        assert_eq!(queue.take_more(100, none), Some(vec![4]));
        let consumer = Arc::clone(&queue);
        let (done, taken) = mpsc::channel();
        let thread = std::thread::spawn(move || done.send(consumer.take_more(100, long)));
        queue.push(5).expect("open");
        assert_eq!(taken.recv_timeout(long / 2).expect("at once"), Some(vec![5]));
        thread.join().expect("ends").expect("the test waits");
        // Whoever waits when it is closed is told.
        let ((done, ended), consumer) = (mpsc::channel(), Arc::clone(&queue));
        let thread = std::thread::spawn(move || done.send(consumer.take_more(100, long)));
        queue.close();
        assert_eq!(ended.recv_timeout(long / 2).expect("at once"), None, "nothing comes any more");
        thread.join().expect("ends").expect("the test waits");
    }

    #[test]
    fn a_consumer_that_waits_is_woken_by_the_first_item_and_misses_none() {
        let queue = Arc::new(Queue::new(1000));
        let consumer = Arc::clone(&queue);
        let thread = std::thread::spawn(move || {
            let mut sum = 0;
            while let Some(batch) = consumer.take(1) {
                sum += batch.iter().sum::<usize>();
            }
            sum
        });
        for _ in 0..100 {
            (1..5).for_each(|item| queue.push(item).expect("open"));
            std::thread::yield_now();
        }
        queue.close();
        assert_eq!(thread.join().expect("ends"), 100 * 10);
    }

    #[test]
    fn what_is_heavier_than_the_queue_still_passes() {
        let queue = Queue::new(10);
        queue.push(50).expect("open");
        assert_eq!(queue.take(1), Some(vec![50]));
    }
}
