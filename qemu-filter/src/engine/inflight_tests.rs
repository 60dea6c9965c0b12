use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::super::testing::{Random, tokens, wait, wake};
use super::*;

const fn span(start: u64, end: u64) -> Span {
    Span { start, end }
}

fn running(entered: Entered) -> Slot {
    match entered {
        Entered::Running(slot) => slot,
        other => panic!("{other:?}"),
    }
}

fn parked(entered: Entered) -> Slot {
    match entered {
        Entered::Parked(slot) => slot,
        other => panic!("{other:?}"),
    }
}

fn three() -> [WaitToken; 3] {
    let mut tokens = tokens(3);
    std::array::from_fn(|_| tokens.next().expect("three tokens"))
}

#[test]
fn requests_that_do_not_overlap_run_together() {
    let table = Table::new(wake);
    let slots: Vec<Slot> =
        (0..100).map(|i| running(table.enter(span(i * 10, i * 10 + 10), WaitToken(0)))).collect();
    for slot in slots {
        table.leave(slot);
    }
    assert!(table.occupied.iter().all(|word| word.load(Ordering::SeqCst) == 0));
}

#[test]
fn overlapping_requests_run_one_after_another_in_the_order_they_came() {
    let table = Table::new(wake);
    let [a, b, c] = three();
    let first = running(table.enter(span(0, 10), a));
    let second = parked(table.enter(span(5, 15), b));
    // Overlaps only the parked one, and has to wait for it all the same.
    let third = parked(table.enter(span(12, 20), c));
    table.leave(first);
    wait(b);
    let second = running(table.retry(second, b));
    table.leave(second);
    wait(c);
    table.leave(running(table.retry(third, c)));
    assert_eq!(table.parked.load(Ordering::SeqCst), 0);
}

#[test]
fn a_full_table_says_so_and_recovers() {
    let table = Table::new(wake);
    let slots: Vec<Slot> =
        (0..ENTRIES as u64).map(|i| running(table.enter(span(i, i + 1), WaitToken(0)))).collect();
    assert_eq!(table.enter(span(5000, 5001), WaitToken(0)), Entered::Full);
    table.leave(slots[700]);
    assert_eq!(table.enter(span(5000, 5001), WaitToken(0)), Entered::Running(slots[700]));
}

#[test]
fn a_parked_request_can_be_taken_back_unless_it_is_being_woken() {
    let table = Table::new(wake);
    let [a, b, c] = three();
    let first = running(table.enter(span(0, 10), a));
    let second = parked(table.enter(span(0, 10), b));
    assert!(table.unpark(second));
    table.leave(second);
    let third = parked(table.enter(span(0, 10), c));
    table.wake_all();
    assert!(!table.unpark(third));
    wait(c);
    // Woken for no reason: still blocked, parks again.
    let third = parked(table.retry(third, c));
    table.leave(first);
    wait(c);
    table.leave(running(table.retry(third, c)));
}

/// Many threads, few bytes: every pair of overlapping requests is caught if it ever runs together, and a request
/// that nobody wakes fails the test.
#[test]
fn no_two_overlapping_requests_run_together_and_nobody_is_forgotten() {
    const THREADS: usize = 8;
    const ROUNDS: u64 = 20_000;
    const BYTES: u64 = 24;
    let table = Arc::new(Table::new(wake));
    let busy: Arc<Vec<AtomicBool>> = Arc::new((0..BYTES).map(|_| AtomicBool::new(false)).collect());
    let threads: Vec<_> = tokens(THREADS)
        .map(|me| {
            let (table, busy) = (Arc::clone(&table), Arc::clone(&busy));
            std::thread::spawn(move || {
                let mut random = Random(me.0 as u64 + 1);
                let mut parks = 0_u64;
                for _ in 0..ROUNDS {
                    let start = random.below(BYTES);
                    let span = span(start, (start + 1 + random.below(4)).min(BYTES));
                    let mut entered = table.enter(span, me);
                    while let Entered::Parked(slot) = entered {
                        parks += 1;
                        wait(me);
                        entered = table.retry(slot, me);
                    }
                    let slot = running(entered);
                    for byte in &busy[span.start as usize..span.end as usize] {
                        assert!(!byte.swap(true, Ordering::SeqCst), "two overlapping requests run");
                    }
                    for _ in 0..random.below(64) {
                        std::hint::spin_loop();
                    }
                    if random.one_in(64) {
                        std::thread::yield_now();
                    }
                    for byte in &busy[span.start as usize..span.end as usize] {
                        byte.store(false, Ordering::SeqCst);
                    }
                    table.leave(slot);
                }
                parks
            })
        })
        .collect();
    let parks: u64 = threads.into_iter().map(|thread| thread.join().expect("no assertion failed")).sum();
    assert!(parks > 0, "the threads never met");
    assert_eq!(table.parked.load(Ordering::SeqCst), 0);
    assert!(table.occupied.iter().all(|word| word.load(Ordering::SeqCst) == 0));
}
