//! The bodies of the fuzz targets over seeded inputs: random bytes, and samples with changes of the kinds that a fuzzer makes.
//! Every run takes the same inputs; `CDP_FUZZ_SEED` and `CDP_FUZZ_ROUNDS` choose others.

#[path = "../fuzz/bodies.rs"]
#[allow(unreachable_pub, reason = "the file is a library of its own for cargo-fuzz")]
mod bodies;
mod common;

use common::*;
use journal_format::durable_mark::DurableMark;
use journal_format::wire::{self, MESSAGE_HEADER_BYTES};
use journal_format::{Codec, Frame, Lsn, bookmarks, codec};

const MARK: DurableMark = DurableMark { disk: DISK, durable_lsn: Lsn(77) };

/// xorshift64*: enough to spread inputs, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// Valid input for each body, to start from.
fn sample(target: &str) -> Vec<u8> {
    let frame = sample_frame(11);
    let frame = Frame::parse(&frame).unwrap();
    match target {
        "frame" => sample_frame(11),
        "segment" => sample_page(),
        "data_entry" => data_entry(&frame, &bodies::PLACE),
        "meta_entry" => meta_entry(&frame, &bodies::PLACE, 10, 8192),
        "index" => sample_index(),
        "manifest" => sample_manifest().encode().unwrap(),
        "bookmarks" => bookmarks::encode(DISK, &[bookmark(9, "before upgrade"), bookmark(3, "ä")]).unwrap(),
        "durable_mark" => MARK.encode().to_vec(),
        "wire" => sample_inventory(),
        "codec" => {
            let mut packed = Vec::new();
            assert_eq!(codec::compress(&mut vec![7; 3000], 1, &mut packed), Codec::Zstd);
            [3000_u32.to_le_bytes().to_vec(), packed].concat()
        }
        "text" => DISK.to_string().into_bytes(),
        other => panic!("no sample for {other}"),
    }
}

fn sample_inventory() -> Vec<u8> {
    let disk = wire::Disk {
        disk: DISK.0.to_vec(),
        device: "virtio0".into(),
        disk_bytes: 1 << 30,
        ..Default::default()
    };
    let vm = wire::Vm { name: "web".into(), pid: 77, disks: vec![disk.clone(), disk], ..Default::default() };
    wire::encode(&wire::Inventory { vms: vec![vm] }).unwrap()
}

/// One to four changes: a bit, a byte, an extreme number, a cut, a repeated, moved or inserted part.
fn mutate(random: &mut Random, input: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        let (at, length) = (random.below(input.len()), input.len());
        match random.below(7) {
            0 if length > 0 => input[at] ^= 1 << random.below(8),
            1 if length > 0 => input[at] = random.next() as u8,
            2 => {
                let extreme =
                    [0, 1, u64::MAX, u64::MAX - 1, 1 << 32, 1 << 48, (1 << 18) + 1][random.below(7)];
                let width = [1, 2, 4, 8][random.below(4)];
                let end = length.min(at + width);
                input[at..end].copy_from_slice(&extreme.to_le_bytes()[..end - at]);
            }
            3 => input.truncate(at),
            4 => {
                let part = input[at..length.min(at + random.below(200))].to_vec();
                input.extend(part);
            }
            5 => {
                let (count, at) = (random.below(40), random.below(length + 1));
                let part = random.bytes(count);
                input.splice(at..at, part);
            }
            _ => {
                let end = length.min(at + random.below(40));
                input.drain(at..end);
            }
        }
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn every_sample_is_accepted() {
    let frame = sample("frame");
    assert!(Frame::parse(&frame).is_ok());
    assert!(journal_format::segment::SegmentMeta::parse(&sample("segment")).is_ok());
    assert!(journal_format::segment::DataEntry::parse(&sample("data_entry"), &bodies::PLACE).is_ok());
    assert!(journal_format::segment::MetaEntry::parse(&sample("meta_entry"), &bodies::PLACE).is_ok());
    assert!(journal_format::index::IndexShape::check(&sample("index")).is_ok());
    assert!(journal_format::manifest::Manifest::parse(&sample("manifest")).is_ok());
    assert!(bookmarks::parse(&sample("bookmarks")).is_ok());
    assert!(DurableMark::parse(&sample("durable_mark")).is_ok());
    assert!(wire::decode::<wire::Inventory>(&sample("wire")[MESSAGE_HEADER_BYTES..]).is_ok());
}

#[test]
fn no_body_fails_on_random_or_changed_input() {
    let (seed, rounds) = (from_environment("CDP_FUZZ_SEED", 1), from_environment("CDP_FUZZ_ROUNDS", 4000));
    for (name, body) in bodies::BODIES {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let sample = sample(name);
        body(&sample);
        for round in 0..rounds {
            let mut input = sample.clone();
            if round % 8 == 0 {
                let length = random.below(700);
                input = random.bytes(length);
            } else {
                mutate(&mut random, &mut input);
            }
            let result = std::panic::catch_unwind(|| body(&input));
            assert!(
                result.is_ok(),
                "{name}, round {round}: replay with CDP_FUZZ_SEED={seed} CDP_FUZZ_ROUNDS={rounds}"
            );
        }
    }
}
