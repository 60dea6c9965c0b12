//! A real Linux guest with an ext4 file system on each of two disks, on iothreads of their own: it appends lines and moves
//! money between two files, each step with its own fsync, while it writes other files all the time.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cdp_api::PointSpec;
use cdp_tests::guest::Guest;
use cdp_tests::random::Random;
use cdp_tests::site::{Site, Via};
use journal_format::{ByteRange, Lsn, Stamp};
use journal_store::{ExtentKind, View};

use super::{History, any_instant, last_instant, read, scaled};

const DISK_BYTES: u64 = 64 << 20;
const START: i64 = 10_000;

/// Each side of the money: `number amount balance`, in a file of one sector that is overwritten in place.
const FUNCTIONS: [&str; 3] = [
    r#"put() { printf '%-511s\n' "$2" | dd of=$1/money conv=notrunc,fsync 2>/dev/null; }"#,
    "pay() { a=$((a - $2)); b=$((b + $2)); put /mnt \"$1 $2 $a\" && put /other \"$1 $2 $b\" && echo \"PAID $1\"; }",
    "mkdir /other && mount -t ext4 /dev/vda /mnt && mount -t ext4 /dev/vdb /other && echo MOUNTED",
];

/// When the host asked for a line, and when the guest said that it is synced.
#[derive(Clone, Copy, Debug)]
struct Line {
    said_ns: u64,
    synced_ns: u64,
}

fn ext4(path: PathBuf) -> PathBuf {
    File::create(&path).expect("image").set_len(DISK_BYTES).expect("size");
    let status = Command::new("mkfs.ext4").arg("-q").arg(&path).status();
    assert!(status.expect("mkfs.ext4 runs").success());
    path
}

/// Lets the guest write `count` lines and payments.
fn work(guest: &mut Guest, count: usize, random: &mut Random) -> Vec<Line> {
    let step = |number: usize| {
        let said_ns = guest.say(&format!("append {number}"));
        let synced_ns = guest.heard(&format!("SYNCED {number}"));
        guest.say(&format!("pay {number} {}", random.within(1..100)));
        guest.hear(&format!("PAID {number}"));
        Line { said_ns, synced_ns }
    };
    (1..=count).map(step).collect()
}

/// Writes the disk at a point to a sparse file.
fn image_at(view: &View, path: &Path) {
    let file = File::create(path).expect("image");
    file.set_len(view.disk_bytes()).expect("size");
    let whole = ByteRange::new(0, view.disk_bytes()).expect("a range");
    let extents = view
        .extents(whole)
        .expect("extents")
        .map(|extent| extent.expect("extent"))
        .filter(|extent| extent.kind == ExtentKind::Data);
    for range in extents.map(|extent| extent.range) {
        let bytes = read(view, range.offset(), range.length() as usize);
        file.write_all_at(&bytes, range.offset()).expect("write");
    }
}

/// The same with `cdp-restore`.
fn restore(site: &Site, disk: &str, stamp: Stamp, path: &Path) {
    let image = site.restore(disk, &PointSpec::Time { stamp_ns: stamp.0 }, Via::Server);
    fs::write(path, image).expect("image");
}

fn e2fsck(arguments: &[&str], image: &Path) -> (i32, String) {
    let output = Command::new("e2fsck").args(arguments).arg(image).output().expect("e2fsck runs");
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Replays the journal of the file system, as its next mount would, and fails if anything is left to repair.
fn assert_whole(image: &Path, lsn: Lsn) {
    let (code, said) = e2fsck(&["-fp", "-E", "journal_only"], image);
    assert!(code <= 1, "LSN {lsn}: the journal does not replay: {said}");
    let (code, said) = e2fsck(&["-fn"], image);
    assert_eq!(code, 0, "LSN {lsn}: not clean after its journal was replayed: {said}");
}

/// A file of the restored file system.
fn cat(image: &Path, file: &str) -> String {
    let output = Command::new("debugfs").args(["-R", &format!("cat {file}")]).arg(image).output();
    String::from_utf8_lossy(&output.expect("debugfs runs").stdout).into_owned()
}

fn check_lines(lines: &[Line], text: &str, stamp_ns: u64) {
    let there: Vec<_> = text.lines().collect();
    for (number, line) in (1..).zip(lines) {
        let is_there = there.contains(&format!("line {number}").as_str());
        assert!(
            is_there || line.synced_ns > stamp_ns,
            "line {number} was synced before the point: {there:?}"
        );
        assert!(!is_there || line.said_ns <= stamp_ns, "line {number} was begun after the point: {there:?}");
    }
}

/// Number, amount and balance.
fn money(text: &str) -> [i64; 3] {
    let words: Vec<i64> = text.split_whitespace().map(|word| word.parse().expect("a number")).collect();
    words.try_into().unwrap_or_else(|words| panic!("not three numbers: {words:?}"))
}

/// Money goes from the first disk to the second.
fn check_money(payer: [i64; 3], payee: [i64; 3]) {
    let under_way = match payer[0] - payee[0] {
        0 => 0,
        1 => payer[1],
        _ => panic!("payment {} was received, {} was sent", payee[0], payer[0]),
    };
    assert_eq!(payer[2] + payee[2] + under_way, START, "money was made or lost: {payer:?} {payee:?}");
}

#[test]
fn a_guests_file_systems_are_whole_at_every_instant() {
    let mut random = Random::seeded(71);
    let site = Site::start();
    let images = ["a", "b"].map(|name| ext4(site.directory().join(format!("{name}.raw"))));
    let mut guest = Guest::boot(&site, "linux", &images);
    FUNCTIONS.iter().for_each(|line| _ = guest.say(line));
    guest.hear("MOUNTED");
    guest.say(&format!("a={START} b=0; pay 0 0; busy & sync"));
    guest.hear("PAID 0");
    let disks = ["vda", "vdb"].map(|device| site.disk("linux", device));
    disks.iter().for_each(|disk| site.protect(disk));
    let lines = work(&mut guest, scaled(40), &mut random);
    disks.iter().for_each(|disk| _ = site.bookmark(disk, "end"));
    guest.process.assert_alive();
    drop(guest);

    let newest = lines.iter().map(|line| line.synced_ns).max();
    let histories = disks.each_ref().map(|disk| History::open(&site.store(), disk));
    assert!(newest < Some(last_instant(&histories).0.0), "the history ends before the guest's last line");
    let instants = scaled(40);
    let restored = images.map(|image| image.with_extension("restored"));
    for number in 0..instants {
        // The end is one of them: every line has to be there.
        let (stamp, lsns) = match number {
            0 => last_instant(&histories),
            _ => any_instant(&histories, &mut random),
        };
        for at in 0..2 {
            match number % 20 {
                0 => restore(&site, &disks[at], stamp, &restored[at]),
                _ => image_at(&histories[at].view(lsns[at]), &restored[at]),
            }
            assert_whole(&restored[at], lsns[at]);
        }
        check_lines(&lines, &cat(&restored[0], "/lines"), stamp.0);
        check_money(money(&cat(&restored[0], "/money")), money(&cat(&restored[1], "/money")));
    }
    let records = histories.each_ref().map(|history| history.records.len());
    println!(
        "{instants} instants of two ext4 file systems are whole ({records:?} records, {} lines)",
        lines.len()
    );
}
