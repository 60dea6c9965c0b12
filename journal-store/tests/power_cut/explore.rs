//! Looking at every image that a power cut could leave, before each call that changes something.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::AddAssign;
use std::path::Path;
use std::sync::{Arc, Mutex};

use journal_store::io::{Answer, Call, CallKind, Hook, HookStorage, MemStorage, Tearing};

use crate::oracle::{Known, Oracle, Verdict};
use crate::support::Random;

/// A defect that is planted in the order of calls. The calls that change something are counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Defect {
    None,
    /// This call is not made.
    Skip(usize),
    /// This call is made after the next one.
    Later(usize),
}

impl Defect {
    fn at(self) -> usize {
        match self {
            Self::None => 0,
            Self::Skip(at) | Self::Later(at) => at,
        }
    }
}

/// A call that was made: in which operation of the story, what it did, to what kind of file.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Step {
    pub operation: &'static str,
    pub kind: CallKind,
    pub file: String,
}

impl Step {
    /// What it does to which kind of file.
    pub fn name(&self) -> String {
        format!("{:?} {}", self.kind, self.file)
    }
}

/// What was looked at.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Places in the story at which the power failed.
    pub cuts: usize,
    /// Of them, those for which every subset of the unsynced changes was tried.
    pub exhausted: usize,
    /// Different images that were recovered and checked.
    pub images: usize,
    /// Of them, those of a crash during the recovery from another image.
    pub in_recovery: usize,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.cuts += other.cuts;
        self.exhausted += other.exhausted;
        self.images += other.images;
        self.in_recovery += other.in_recovery;
    }
}

/// How many images to look at, at each place.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// All subsets are tried if there are at most so many, and so many are sampled otherwise.
    pub whole: usize,
    /// So many are sampled in which writes are torn.
    pub torn: usize,
    /// One image in so many is also used to go on, and cut again during its recovery.
    pub deep: u64,
}

impl Effort {
    /// `CDP_POWER_CUT_EFFORT=n` tries n times as many images.
    pub fn from_environment(whole: usize, torn: usize) -> Self {
        let times = std::env::var("CDP_POWER_CUT_EFFORT").map_or(1, |text| text.parse().expect("a number"));
        Self { whole: whole * times, torn: torn * times, deep: 10 }
    }
}

struct State {
    memory: MemStorage,
    known: Known,
    operation: &'static str,
    random: Random,
    seen: HashSet<u64>,
    counts: Counts,
    steps: Vec<Step>,
    failure: Option<String>,
    /// The process will die before this kind of call that follows a call of this name; what it leaves is kept.
    death: Option<(&'static str, &'static str)>,
    left: Option<(MemStorage, Known)>,
}

/// Looks, as a hook of the storage that the story runs on.
pub struct Explorer {
    oracle: Arc<Oracle>,
    effort: Effort,
    defect: Defect,
    state: Mutex<State>,
}

impl std::fmt::Debug for Explorer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Explorer").field("defect", &self.defect).finish_non_exhaustive()
    }
}

/// The kind of a file: its name without numbers.
fn file_kind(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    if name.len() == 36 { "folder".into() } else { name.replace(|letter: char| letter.is_ascii_digit(), "") }
}

impl Explorer {
    pub fn new(oracle: &Arc<Oracle>, seed: u64, effort: Effort, defect: Defect) -> Arc<Self> {
        let state = State {
            memory: MemStorage::new(),
            known: Known::default(),
            operation: "",
            random: Random::new(seed),
            seen: HashSet::new(),
            counts: Counts::default(),
            steps: Vec::new(),
            failure: None,
            death: None,
            left: None,
        };
        Arc::new(Self { oracle: Arc::clone(oracle), effort, defect, state: Mutex::new(state) })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it looks")
    }

    /// The storage that the story runs on.
    pub fn storage(self: &Arc<Self>) -> HookStorage {
        HookStorage::new(Arc::new(self.memory()), Arc::clone(self) as Arc<dyn Hook>)
    }

    pub fn memory(&self) -> MemStorage {
        self.state().memory.clone()
    }

    /// The story goes on with other files.
    pub fn replace(&self, memory: MemStorage) {
        self.state().memory = memory;
    }

    pub fn begin(&self, operation: &'static str) {
        self.state().operation = operation;
    }

    pub fn known(&self) -> Known {
        self.state().known.clone()
    }

    pub fn learn(&self, learn: impl FnOnce(&mut Known)) {
        learn(&mut self.state().known);
    }

    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    pub fn steps(&self) -> Vec<Step> {
        self.state().steps.clone()
    }

    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    pub fn fail(&self, failure: String) {
        self.state().failure.get_or_insert(failure);
    }

    /// The process will die when a step of this name follows one of that name: [`Explorer::left`] is what it leaves.
    pub fn die_between(&self, one: &'static str, other: &'static str) {
        self.state().death = Some((one, other));
    }

    /// What the process left when it died, and what was known then.
    pub fn left(&self) -> Option<(MemStorage, Known)> {
        self.state().left.take()
    }

    /// The power fails here, in every way.
    pub fn look(&self) {
        let mut state = self.state();
        // Before the defect nothing is new; after a failure nothing matters.
        let done = state.failure.is_some() || state.steps.len() < self.defect.at();
        let enough = self.defect != Defect::None && state.steps.len() > self.defect.at() + 60;
        if done || enough {
            return;
        }
        if let Err(failure) = self.look_at(&mut state) {
            let what = format!("{}, call {}: {failure}", state.operation, state.steps.len());
            state.failure = Some(what);
        }
    }

    fn look_at(&self, state: &mut State) -> Verdict {
        state.counts.cuts += 1;
        let (memory, known) = (state.memory.clone(), state.known.clone());
        let mut images = Vec::new();
        state.counts.exhausted +=
            usize::from(whole_images(&memory, self.effort.whole, &mut state.random, &mut images));
        for _ in 0..self.effort.torn {
            images.push(memory.crash(Tearing::Torn, |n| state.random.below(n as u64) as usize));
        }
        for image in images {
            self.image(state, &image, &known)?;
        }
        // The process dies, the system goes on: nothing is lost, and nothing more is durable than before.
        let fork = memory.fork();
        self.oracle
            .check_going_on(&fork, &known, &mut state.random)
            .map_err(|failure| format!("the process dies: {failure}"))
    }

    fn image(&self, state: &mut State, image: &MemStorage, known: &Known) -> Verdict {
        let mut hasher = DefaultHasher::new();
        (known, image.files()).hash(&mut hasher);
        if !state.seen.insert(hasher.finish()) {
            return Ok(());
        }
        state.counts.images += 1;
        if !state.random.chance(self.effort.deep) {
            return self.oracle.check(&image.fork(), known, &mut state.random).map(drop);
        }
        let recovery = Arc::new(Recovery {
            oracle: Arc::clone(&self.oracle),
            memory: image.fork(),
            known: known.clone(),
            state: Mutex::new((state.random.clone(), 0, Ok(()))),
        });
        let hooked =
            HookStorage::new(Arc::new(recovery.memory.clone()), Arc::clone(&recovery) as Arc<dyn Hook>);
        drop(crate::oracle::open(Arc::new(hooked))?);
        let (_, images, verdict) = &*recovery.state.lock().expect("lock");
        state.counts.images += images;
        state.counts.in_recovery += images;
        verdict.clone().map_err(|failure| format!("a second power cut during recovery: {failure}"))?;
        self.oracle.check_going_on(&image.fork(), known, &mut state.random)
    }
}

/// All subsets of what is unsynced, or, where that is too many, the extremes and a sample. Returns whether it is all.
fn whole_images(memory: &MemStorage, most: usize, random: &mut Random, images: &mut Vec<MemStorage>) -> bool {
    let mut choices = Vec::new();
    images.push(memory.crash(Tearing::Whole, |n| {
        choices.push(n);
        0
    }));
    if choices.iter().try_fold(1_usize, |all, n| all.checked_mul(*n).filter(|all| *all <= most)).is_some() {
        let mut path = vec![0; choices.len()];
        while next_path(memory, &mut path, images) {}
        return true;
    }
    images.push(memory.crash(Tearing::Whole, |_| 1));
    for odd in 0..choices.len() {
        for usual in [0, 1] {
            let mut at = 0;
            images.push(memory.crash(Tearing::Whole, |n| {
                at += 1;
                (if at - 1 == odd { 1 - usual } else { usual }).min(n - 1)
            }));
        }
    }
    for _ in 0..most / 4 {
        images.push(memory.crash(Tearing::Whole, |n| random.below(n as u64) as usize));
    }
    false
}

/// Counts `path` up by one, as a number whose digits are the choices, and takes its image; false after the last.
fn next_path(memory: &MemStorage, path: &mut Vec<usize>, images: &mut Vec<MemStorage>) -> bool {
    let mut limits = Vec::new();
    let mut walk = |path: &[usize]| {
        limits.clear();
        memory.crash(Tearing::Whole, |n| {
            limits.push(n);
            path.get(limits.len() - 1).copied().unwrap_or(0)
        })
    };
    walk(path);
    let limits_now = limits.clone();
    path.resize(limits_now.len(), 0);
    while let Some(last) = path.pop() {
        if last + 1 < limits_now[path.len()] {
            path.push(last + 1);
            let mut at = 0;
            images.push(memory.crash(Tearing::Whole, |_| {
                at += 1;
                path.get(at - 1).copied().unwrap_or(0)
            }));
            return true;
        }
    }
    false
}

impl Hook for Explorer {
    fn before(&self, call: &Call<'_>) -> Answer {
        if !call.kind.changes() {
            return Answer::Go;
        }
        self.look();
        let mut state = self.state();
        let (at, operation) = (state.steps.len(), state.operation);
        let step = Step { operation, kind: call.kind, file: file_kind(call.path) };
        let before = state.steps.last().map(Step::name);
        if let Some((one, other)) = state.death
            && before.as_deref() == Some(one)
            && step.name() == other
        {
            state.left = Some((state.memory.fork(), state.known.clone()));
            state.death = None;
        }
        state.steps.push(step);
        match self.defect {
            Defect::Skip(n) if n == at => Answer::Skip,
            Defect::Later(n) if n == at => Answer::Later,
            _ => Answer::Go,
        }
    }

    fn before_late(&self) {
        self.look();
    }
}

/// The power fails a second time, during the recovery from the first cut.
struct Recovery {
    oracle: Arc<Oracle>,
    memory: MemStorage,
    known: Known,
    state: Mutex<(Random, usize, Verdict)>,
}

impl std::fmt::Debug for Recovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovery").finish_non_exhaustive()
    }
}

impl Hook for Recovery {
    fn before(&self, call: &Call<'_>) -> Answer {
        let (random, images, verdict) = &mut *self.state.lock().expect("lock");
        if call.kind.changes() && verdict.is_ok() {
            for choice in [Some(0), Some(1), None] {
                let tearing = if choice.is_some() { Tearing::Whole } else { Tearing::Torn };
                let image = self.memory.crash(tearing, |n| {
                    choice.map_or_else(|| random.below(n as u64) as usize, |one| one.min(n - 1))
                });
                *images += 1;
                *verdict = self.oracle.check(&image, &self.known, random).map(drop);
                if verdict.is_err() {
                    break;
                }
            }
        }
        Answer::Go
    }
}
