//! One run of one seed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use super::check::Checks;
use super::world::World;

/// Steps with faults in one run, at most.
const STEPS: u64 = 1500;
/// Events that a failure shows.
const SHOWN: usize = 60;
/// Steps after the last fault within which everything has to be whole again. Each is 2 ms of virtual time.
const PATIENCE: u64 = 60_000;

/// The last events of a run.
#[derive(Clone, Default)]
pub(crate) struct Trace {
    events: Rc<RefCell<VecDeque<String>>>,
    step: Rc<RefCell<u64>>,
    /// Print each event as it happens.
    loud: bool,
}

impl Trace {
    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        let line = format!("{:>6} {}", self.step.borrow(), text());
        if self.loud {
            println!("{line}");
        }
        let mut events = self.events.borrow_mut();
        if events.len() == SHOWN {
            events.pop_front();
        }
        events.push_back(line);
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    /// Steps of the parts.
    pub(crate) steps: u64,
    /// Faults injected.
    pub(crate) faults: u64,
    /// Points compared byte for byte with the model.
    pub(crate) points: u64,
    /// Points inside gaps that were refused.
    pub(crate) refused: u64,
    /// Instants at which both disks were compared.
    pub(crate) instants: u64,
    /// Epochs that began without a sync.
    pub(crate) unchanged: u64,
    /// Rings that went on with another agent.
    pub(crate) adopted: u64,
    /// Flushes that were durable when they completed.
    pub(crate) flushes: u64,
    /// Times that a request began or ended while one waited for the agent.
    pub(crate) waits: u64,
    /// Bookmarks found where they were promised.
    pub(crate) bookmarks: u64,
    /// Bytes that comparisons have left out, at least.
    pub(crate) equal_bytes: u64,
    /// Virtual time.
    pub(crate) virtual_time: Duration,
}

impl Summary {
    /// Adds another run's numbers.
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.faults += other.faults;
        self.points += other.points;
        self.refused += other.refused;
        self.instants += other.instants;
        self.unchanged += other.unchanged;
        self.adopted += other.adopted;
        self.flushes += other.flushes;
        self.waits += other.waits;
        self.bookmarks += other.bookmarks;
        self.equal_bytes += other.equal_bytes;
        self.virtual_time += other.virtual_time;
    }
}

/// Runs one seed.
///
/// # Errors
/// What went wrong, with the seed, the step and the last events.
pub(crate) fn run(seed: u64, loud: bool) -> Result<Summary, String> {
    let trace = Trace { loud, ..Trace::default() };
    let outcome = catch_unwind(AssertUnwindSafe(|| play(seed, &trace)));
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text =
            text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message");
        let events: Vec<String> = trace.events.borrow().iter().cloned().collect();
        format!("seed {seed}, step {}: {text}\nlast events:\n{}", trace.step.borrow(), events.join("\n"))
    })
}

fn play(seed: u64, trace: &Trace) -> Summary {
    let mut world = World::new(seed, trace.clone());
    let steps = STEPS / 3 + world.random.within(0..STEPS * 2 / 3);
    for step in 1..=steps {
        *trace.step.borrow_mut() = step;
        world.step();
    }
    world.stop_faults();
    let mut quiet = 0;
    while quiet < 40 || !world.is_whole() {
        quiet += 1;
        *trace.step.borrow_mut() = steps + quiet;
        assert!(quiet < PATIENCE, "not whole again although no fault is left: {}", world.state());
        world.quiet_step(quiet < 40);
    }
    Checks::finished(&mut world);
    let checks = &world.checks;
    Summary {
        steps: steps + quiet,
        faults: world.faults,
        points: checks.points,
        refused: checks.refused,
        instants: checks.instants,
        unchanged: checks.unchanged,
        adopted: checks.adopted,
        flushes: checks.flushes,
        waits: checks.waits,
        bookmarks: checks.bookmarks,
        equal_bytes: checks.equal_bytes,
        virtual_time: world.now,
    }
}
