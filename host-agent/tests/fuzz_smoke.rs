//! The bodies of the fuzz targets over seeded inputs; `CDP_FUZZ_SEED` and `CDP_FUZZ_ROUNDS` choose others.

#[path = "../fuzz/bodies.rs"]
#[allow(unreachable_pub, dead_code, reason = "the file is a library of its own for cargo-fuzz")]
mod bodies;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Lists of 0 to 7 changes.
fn run(body: fn(&[u8])) {
    let seed = setting("CDP_FUZZ_SEED").unwrap_or(1);
    for round in 0..setting("CDP_FUZZ_ROUNDS").unwrap_or(600) {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        });
        let input: Vec<u8> = noise.take(1 + 11 * (round as usize % 8)).collect();
        body(&input);
    }
}

#[test]
fn an_outbox_that_somebody_changed_is_refused_or_keeps_every_rule() {
    run(bodies::outbox);
}

#[test]
fn a_spool_that_something_happened_to_gives_what_was_spooled_or_ends() {
    run(bodies::spool);
}
