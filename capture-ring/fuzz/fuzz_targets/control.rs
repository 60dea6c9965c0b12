//! Messages of the control socket: what is accepted is encoded again to the same bytes. The input is tried as it is, and
//! once more with the header's magic, version and length made right.
#![no_main]

use capture_ring::control::{MESSAGE_HEADER_BYTES, MESSAGE_MAGIC, PROTOCOL_VERSION, decode, encode};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut repaired = input.to_vec();
    if let Some((header, body)) = repaired.split_first_chunk_mut::<MESSAGE_HEADER_BYTES>() {
        header[..4].copy_from_slice(&MESSAGE_MAGIC);
        header[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        header[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
        header[12..].fill(0);
    }
    for bytes in [input, &repaired] {
        if let Ok(message) = decode(bytes) {
            let again = encode(&message).expect("what was decoded can be encoded");
            assert!(decode(&again).is_ok_and(|decoded| decoded == message), "{message:?} changed on its way");
        }
    }
});
