use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};

use super::*;

/// One parking place per token: a count of wake-ups not consumed yet.
struct Park {
    wakes: Mutex<u32>,
    changed: Condvar,
}

static PARKS: [Park; 64] = [const { Park { wakes: Mutex::new(0), changed: Condvar::new() } }; 64];

fn wake(token: WaitToken) {
    let park = &PARKS[token.0];
    *park.wakes.lock().expect("no test panics with it") += 1;
    park.changed.notify_one();
}

fn wait(token: WaitToken) {
    let park = &PARKS[token.0];
    let mut wakes = park.wakes.lock().expect("no test panics with it");
    while *wakes == 0 {
        let (next, timeout) =
            park.changed.wait_timeout(wakes, std::time::Duration::from_secs(60)).expect("not poisoned");
        assert!(!timeout.timed_out(), "a parked request was forgotten");
        wakes = next;
    }
    *wakes -= 1;
}

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
    let first = running(table.enter(span(0, 10), WaitToken(60)));
    let second = parked(table.enter(span(5, 15), WaitToken(61)));
    // Overlaps only the parked one, and has to wait for it all the same.
    let third = parked(table.enter(span(12, 20), WaitToken(62)));
    table.leave(first);
    wait(WaitToken(61));
    let second = running(table.retry(second, WaitToken(61)));
    table.leave(second);
    wait(WaitToken(62));
    table.leave(running(table.retry(third, WaitToken(62))));
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
    let first = running(table.enter(span(0, 10), WaitToken(50)));
    let second = parked(table.enter(span(0, 10), WaitToken(51)));
    assert!(table.unpark(second));
    table.leave(second);
    let third = parked(table.enter(span(0, 10), WaitToken(52)));
    table.wake_all();
    assert!(!table.unpark(third));
    wait(WaitToken(52));
    // Woken for no reason: still blocked, parks again.
    let third = parked(table.retry(third, WaitToken(52)));
    table.leave(first);
    wait(WaitToken(52));
    table.leave(running(table.retry(third, WaitToken(52))));
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
    let threads: Vec<_> = (0..THREADS)
        .map(|me| {
            let (table, busy) = (Arc::clone(&table), Arc::clone(&busy));
            std::thread::spawn(move || {
                let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(me as u64 + 1);
                let mut parks = 0_u64;
                for _ in 0..ROUNDS {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let start = random % BYTES;
                    let span = span(start, (start + 1 + (random >> 8) % 4).min(BYTES));
                    let mut entered = table.enter(span, WaitToken(me));
                    while let Entered::Parked(slot) = entered {
                        parks += 1;
                        wait(WaitToken(me));
                        entered = table.retry(slot, WaitToken(me));
                    }
                    let slot = running(entered);
                    for byte in &busy[span.start as usize..span.end as usize] {
                        assert!(!byte.swap(true, Ordering::SeqCst), "two overlapping requests run");
                    }
                    for _ in 0..(random >> 20) % 64 {
                        std::hint::spin_loop();
                    }
                    if random >> 58 == 0 {
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
