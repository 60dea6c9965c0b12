//! Money is moved between two disks of one process. Each account is one block on either disk:
//!
//! ```text
//! magic, account, balance, number and amount of the last payment sent, number of the last payment received
//! ```
//!
//! A payment is two requests, the second begun when the first was seen complete: the payer's block (less money, and what was
//! sent), then the payee's (more money, and that it was received). So at any instant of both disks together the
//! balances and the payments under way make up the whole; the disks taken a moment apart would show money made or lost.

use std::fs::File;
use std::path::Path;

use cdp_api::PointSpec as ApiPoint;
use cdp_tests::nbd::{Command, Nbd};
use cdp_tests::qemu::{Qemu, main_version};
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use journal_format::Lsn;
use serde_json::json;

use super::{History, any_instant, last_instant, read, scaled, sealed, unsealed};

const DISK_BYTES: u64 = 8 << 20;
const ACCOUNTS: u64 = 6;
const BLOCK: usize = 4096;
const MAGIC: u64 = 0x6163_636f_756e_7421;
/// What both sides of an account hold at first.
const START: u64 = 1_000_000;
const NODES: [&str; 2] = ["disk-a", "disk-b"];

/// One side of an account.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Side {
    balance: u64,
    sent: u64,
    amount: u64,
    received: u64,
}

impl Side {
    const NEW: Self = Self { balance: START, sent: 0, amount: 0, received: 0 };

    fn block(self, account: u64) -> Vec<u8> {
        sealed(&[MAGIC, account, self.balance, self.sent, self.amount, self.received], &[], BLOCK)
    }

    fn parse(account: u64, block: &[u8]) -> Self {
        let words = unsealed::<6>(block).expect("the block is torn");
        let [magic, whose, balance, sent, amount, received] = words;
        assert_eq!((magic, whose), (MAGIC, account), "another block");
        Self { balance, sent, amount, received }
    }
}

/// What `payer` has sent and `payee` has not received.
fn under_way(payer: Side, payee: Side) -> u64 {
    match payer.sent.checked_sub(payee.received) {
        Some(0) => 0,
        Some(1) => payer.amount,
        _ => panic!("{} payments were sent and {} received", payer.sent, payee.received),
    }
}

fn check(sides: [Side; 2]) {
    let [a, b] = sides;
    let whole = a.balance + b.balance + under_way(a, b) + under_way(b, a);
    assert_eq!(whole, 2 * START, "money was made or lost: {a:?} {b:?}");
}

/// Moves money to and fro; returns what is then on either side.
fn pay(socket: &Path, account: u64, count: usize, seed: u64) -> [Side; 2] {
    let mut random = Random::of(seed ^ (account + 1));
    let mut disks = NODES.map(|node| Nbd::connect(socket, node));
    let mut sides = [Side::NEW; 2];
    let mut put = |disk: usize, side: Side, random: &mut Random| {
        let (data, fua) = (side.block(account), random.chance(25));
        disks[disk].run(&Command::Write { offset: account * BLOCK as u64, data, fua });
        // The order is kept with and without it: what counts is that the guest saw the write complete.
        if random.chance(25) {
            disks[disk].run(&Command::Flush);
        }
    };
    for (disk, side) in sides.iter().enumerate() {
        put(disk, *side, &mut random);
    }
    for _ in 0..count {
        let payer = random.within(0..2) as usize;
        let amount = random.within(1..1000).min(sides[payer].balance);
        let [one, other] = [payer, 1 - payer];
        sides[one].balance -= amount;
        sides[one].sent += 1;
        sides[one].amount = amount;
        put(one, sides[one], &mut random);
        sides[other].balance += amount;
        sides[other].received += 1;
        put(other, sides[other], &mut random);
    }
    sides
}

fn start(site: &Site) -> Qemu {
    let node = |node: &str| {
        let image = site.directory().join(format!("{node}.raw"));
        File::create(&image).expect("image").set_len(DISK_BYTES).expect("size");
        json!({"driver": "file", "node-name": node, "filename": image})
    };
    // In QEMU 7.2 an export cannot be protected on an iothread; virtio devices there are, by the guest's test.
    let iothreads: &[&str] = if main_version() >= 8 { &["io0", "io1"] } else { &[] };
    let export = |(number, node): (usize, &str)| {
        let mut export =
            json!({"type": "nbd", "id": node, "name": node, "node-name": node, "writable": true});
        if let Some(iothread) = iothreads.get(number) {
            export["iothread"] = json!(iothread);
            export["fixed-iothread"] = json!(true);
        }
        export
    };
    let exports: Vec<_> = NODES.into_iter().enumerate().map(export).collect();
    Qemu::storage_daemon_with(site, "bank", &NODES.map(node), iothreads, &exports)
}

/// All accounts at one point of each disk.
fn accounts(histories: &[History; 2], lsns: [Lsn; 2]) -> Vec<[Side; 2]> {
    let blocks =
        [0, 1].map(|disk: usize| read(&histories[disk].view(lsns[disk]), 0, ACCOUNTS as usize * BLOCK));
    let parse = |account: u64| {
        let at = account as usize * BLOCK;
        blocks.each_ref().map(|bytes| Side::parse(account, &bytes[at..at + BLOCK]))
    };
    (0..ACCOUNTS).map(parse).collect()
}

#[test]
fn money_moved_between_two_disks_is_whole_at_every_instant() {
    let seed = 61;
    let mut random = Random::seeded(seed);
    let site = Site::start();
    let qemu = start(&site);
    let disks = NODES.map(|node| site.disk(qemu.vm(), node));
    // The accounts are opened before there are points.
    let blank: Vec<_> = (0..ACCOUNTS).flat_map(|account| Side::NEW.block(account)).collect();
    for node in NODES {
        let data = blank.clone();
        Nbd::connect(qemu.nbd_socket(), node).run(&Command::Write { offset: 0, data, fua: true });
    }
    disks.iter().for_each(|disk| site.protect(disk));
    let at_the_end: Vec<_> = std::thread::scope(|scope| {
        let socket = qemu.nbd_socket();
        let payer = |account| scope.spawn(move || pay(socket, account, scaled(400), seed));
        let payers: Vec<_> = (0..ACCOUNTS).map(payer).collect();
        payers.into_iter().map(|payer| payer.join().expect("a payer")).collect()
    });
    disks.iter().for_each(|disk| _ = site.bookmark(disk, "end"));

    let histories = disks.each_ref().map(|disk| History::open(&site.store(), disk));
    let instants = scaled(4000);
    let mut while_under_way = 0;
    assert_eq!(accounts(&histories, last_instant(&histories).1), at_the_end, "the accounts at the end");
    for _ in 0..instants {
        let (_, lsns) = any_instant(&histories, &mut random);
        for sides in accounts(&histories, lsns) {
            check(sides);
            while_under_way +=
                usize::from(sides[0].sent != sides[1].received || sides[1].sent != sides[0].received);
        }
    }
    assert!(while_under_way > 0, "no payment was under way at any instant: nothing was tried");
    let restores = scaled(3);
    for number in 0..restores {
        let (stamp, _) = any_instant(&histories, &mut random);
        let via = if number % 2 == 0 { Via::Server } else { Via::Store };
        let images =
            disks.each_ref().map(|disk| site.restore(disk, &ApiPoint::Time { stamp_ns: stamp.0 }, via));
        for account in 0..ACCOUNTS {
            let at = account as usize * BLOCK;
            check(images.each_ref().map(|image| Side::parse(account, &image[at..at + BLOCK])));
        }
    }
    println!(
        "{instants} instants and {restores} restores of {ACCOUNTS} accounts are whole; in {while_under_way} states of an account a payment was under way"
    );
}

/// The check above can fail.
#[test]
fn money_at_two_different_instants_is_not_whole() {
    let sent = Side { balance: START - 5, sent: 1, amount: 5, received: 0 };
    let received = Side { balance: START + 5, received: 1, ..Side::NEW };
    check([sent, Side::NEW]);
    check([sent, received]);
    assert!(std::panic::catch_unwind(|| check([Side::NEW, received])).is_err(), "made");
    let later = Side { balance: START - 8, sent: 2, amount: 3, received: 0 };
    assert!(std::panic::catch_unwind(|| check([later, Side::NEW])).is_err(), "lost");
}
