//! Points in time as people write them: what is understood is printed so that it is understood as the same point, whatever the
//! time zone of whoever reads it.
#![no_main]

use cdp_api::PointSpec;
use jiff::Zoned;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Ok(text) = core::str::from_utf8(input) else { return };
    let zones = ["2026-11-20T12:00:00[Europe/Berlin]", "2026-03-29T02:30:00+00:00[UTC]"];
    let nows: Vec<Zoned> = zones.iter().map(|now| now.parse().expect("a time with zone")).collect();
    for now in &nows {
        if let Ok(point) = PointSpec::parse(text, now) {
            for reader in &nows {
                assert_eq!(PointSpec::parse(&point.to_string(), reader), Ok(point.clone()), "{text:?}");
            }
        }
    }
});
