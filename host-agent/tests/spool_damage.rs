//! What a power cut can leave of a spool: blocks that were never written, files that are shorter, empty or gone, other
//! blocks of the same spool in the place of the right ones; and what a rotten disk can. Whatever it is, a spool gives frames
//! of before, unchanged and without a hole, or none. The argument why no more is needed is in `docs/formats/outbox.md`.

#[path = "../fuzz/bodies.rs"]
#[allow(unreachable_pub, dead_code, reason = "the file is a library of its own for cargo-fuzz")]
mod bodies;

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use bodies::{DISK, DISK_BYTES, ENTRY_HEAD, EPOCH, FIRST, encoded, frame};
use host_agent::outbox::PackedFrame;
use host_agent::spool::{Spool, SpoolPlace, left_behind};
use journal_format::Lsn;
use proptest::prelude::*;
use tempfile::TempDir;

const PAGE: usize = 4096;
/// Bytes of a file's header.
const HEADER: usize = 64;
const NOW: Duration = Duration::ZERO;

/// A file of the spool as it is meant to be.
#[derive(Clone, Debug)]
struct Whole {
    name: String,
    bytes: Vec<u8>,
    /// Where each frame's entry lies, without what fills it up to the next one.
    frames: Vec<Range<usize>>,
}

/// The same after the damage; `None` when it is gone.
type Image = Vec<Option<Vec<u8>>>;

struct Bench {
    dir: TempDir,
    place: SpoolPlace,
    frames: Vec<Vec<u8>>,
    files: Vec<Whole>,
}

impl Bench {
    /// A spool with that many frames, as a living agent writes it.
    fn new(frames: u64, data_bytes: usize, limit_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = SpoolPlace { folder: dir.path().to_owned(), limit_bytes, drill: None };
        let frames: Vec<PackedFrame> = (0..frames).map(|number| frame(number, data_bytes)).collect();
        let mut spool = Spool::begin(&place, DISK, EPOCH);
        for frame in &frames {
            assert!(spool.append(NOW, frame), "there is room");
        }
        drop(spool);
        let mut bench = Self { dir, place, frames: frames.iter().map(encoded).collect(), files: Vec::new() };
        let mut names: Vec<_> = fs::read_dir(bench.folder()).unwrap().map(|file| file.unwrap()).collect();
        names.sort_by_key(|file| file.file_name());
        let mut next = bench.frames.iter();
        for file in names {
            let (name, bytes) = (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap());
            let (mut at, mut frames) = (HEADER, Vec::new());
            while at < bytes.len() {
                let end = at + ENTRY_HEAD + next.next().expect("a frame for each entry").len();
                frames.push(at..end);
                at = end.next_multiple_of(64);
            }
            bench.files.push(Whole { name, bytes, frames });
        }
        assert!(next.next().is_none() && bench.files.len() >= 3, "{} files", bench.files.len());
        bench
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join(DISK.to_string())
    }

    fn image(&self) -> Image {
        self.files.iter().map(|file| Some(file.bytes.clone())).collect()
    }

    /// Numbers of the frames that the damaged spool gives; each is as it was, and they follow each other.
    fn open(&self, image: &Image) -> Range<usize> {
        fs::create_dir_all(self.folder()).unwrap();
        for (file, bytes) in self.files.iter().zip(image) {
            let path = self.folder().join(&file.name);
            match bytes {
                Some(bytes) => fs::write(path, bytes).unwrap(),
                None => drop(fs::remove_file(path)),
            }
        }
        // (Only to be read: it does not try whether it can be written.)
        let mut spool = Spool::open(&SpoolPlace { limit_bytes: 0, ..self.place.clone() }, DISK, EPOCH);
        let given = self.read(&mut spool);
        // Who decides whether it goes on at the server's last LSN goes by these two.
        assert_eq!(spool.last().map(|last| last.lsn), given.clone().last().map(|n| Lsn(self.last_lsn(n))));
        if !given.is_empty() {
            assert_eq!(spool.first_lsn(), Some(Lsn(self.last_lsn(given.start) - 1)));
        }
        given
    }

    fn last_lsn(&self, number: usize) -> u64 {
        FIRST + number as u64 * 2 + 1
    }

    fn read(&self, spool: &mut Spool) -> Range<usize> {
        let mut given: Option<Range<usize>> = None;
        while let Some(frame) = spool.peek().expect("nothing changes after the files were looked at") {
            let number = usize::try_from((frame.first_lsn.0 - FIRST) / 2).unwrap();
            let given = given.get_or_insert(number..number);
            assert_eq!(given.end, number, "a hole");
            assert!(encoded(frame) == self.frames[number], "frame {number} has other bytes");
            given.end += 1;
            spool.advance();
        }
        given.unwrap_or(0..0)
    }

    /// How many frames must be left when the first damage is at a byte of a file: at least those before it; and, if it
    /// hit what means something, no more.
    fn check(&self, image: &Image, file: usize, at: usize) -> usize {
        let before: usize = self.files[..file].iter().map(|file| file.frames.len()).sum();
        let here = &self.files[file].frames;
        let whole = if at < HEADER { 0 } else { here.iter().filter(|frame| frame.end <= at).count() };
        let is_filling = at >= HEADER && !here.iter().any(|frame| frame.contains(&at));
        let given = self.open(image);
        assert_eq!(given.start, 0, "file {file}, byte {at}");
        if is_filling && image[file].as_ref().is_some_and(|bytes| bytes.len() == self.files[file].bytes.len())
        {
            assert!(given.end >= before + whole, "file {file}, byte {at}: {given:?}");
        } else {
            assert_eq!(given.end, before + whole, "file {file}, byte {at}");
        }
        given.end
    }
}

#[test]
fn a_sound_spool_gives_everything() {
    let bench = Bench::new(12, 600, 16 << 10);
    assert_eq!(bench.open(&bench.image()), 0..12);
    assert_eq!(left_behind(&bench.place), [(DISK, EPOCH, DISK_BYTES)]);
}

#[test]
fn cut_at_any_byte_of_any_file_it_gives_the_frames_before() {
    let bench = Bench::new(9, 200, 6 << 10);
    for (number, file) in bench.files.iter().enumerate() {
        for length in 0..file.bytes.len() {
            let mut image = bench.image();
            image[number].as_mut().unwrap().truncate(length);
            bench.check(&image, number, length);
        }
    }
}

#[test]
fn with_any_byte_flipped_it_gives_the_frames_before() {
    let bench = Bench::new(9, 200, 6 << 10);
    for (number, file) in bench.files.iter().enumerate() {
        for at in 0..file.bytes.len() {
            let mut image = bench.image();
            image[number].as_mut().unwrap()[at] ^= 1 << (at % 8);
            bench.check(&image, number, at);
        }
    }
}

/// Blocks reach a disk in any order: every set of them may be missing.
#[test]
fn whatever_pages_were_never_written_it_gives_a_run_without_a_hole() {
    let bench = Bench::new(12, 2400, 40 << 10);
    let pages: Vec<(usize, usize)> = (0..bench.files.len())
        .flat_map(|file| (0..bench.files[file].bytes.len()).step_by(PAGE).map(move |at| (file, at)))
        .collect();
    assert!((8..=10).contains(&pages.len()), "{} pages", pages.len());
    let mut kept = std::collections::BTreeSet::new();
    for missing in 1_u32..1 << pages.len() {
        let mut image = bench.image();
        let lost = pages.iter().enumerate().filter(|(bit, _)| missing & (1 << bit) != 0);
        let lost: Vec<(usize, usize)> = lost.map(|(_, page)| *page).collect();
        for (file, at) in &lost {
            let bytes = image[*file].as_mut().unwrap();
            let end = (at + PAGE).min(bytes.len());
            bytes[*at..end].fill(0);
        }
        let (file, at) = lost[0];
        kept.insert(bench.check(&image, file, at));
    }
    assert!(kept.len() > 5, "{kept:?}");
}

/// A file's name reaches the disk apart from what is in it, and from other names.
#[test]
fn whatever_files_are_empty_or_gone_it_gives_a_run_without_a_hole() {
    let bench = Bench::new(12, 600, 16 << 10);
    let count = bench.files.len() as u32;
    for fate in 0..3_u32.pow(count) {
        let mut image = bench.image();
        let mut usable = Vec::new();
        for (number, bytes) in image.iter_mut().enumerate() {
            let drawn = fate / 3_u32.pow(number as u32) % 3;
            match drawn {
                0 => {}
                1 => *bytes = Some(Vec::new()),
                _ => *bytes = None,
            }
            if drawn != 2 {
                usable.push((number, drawn == 0));
            }
        }
        let given = bench.open(&image);
        // The run begins with the first file there is, if that is sound.
        let first = usable.first().filter(|(_, sound)| *sound).map(|(number, _)| *number);
        let start = |file: usize| bench.files[..file].iter().map(|file| file.frames.len()).sum();
        assert_eq!((!given.is_empty()).then_some(given.start), first.map(start), "{image:?}");
    }
}

/// The newest file is the one that a power cut most likely leaves empty: the others are of use all the same.
#[test]
fn a_spool_is_found_by_any_file_that_can_be_read() {
    let bench = Bench::new(12, 600, 16 << 10);
    let mut image = bench.image();
    for last in (1..image.len()).rev() {
        image[last] = Some(Vec::new());
        let given = bench.open(&image);
        assert_eq!(given, 0..bench.files[..last].iter().map(|file| file.frames.len()).sum());
        // (Opening has removed what is of no use: it is put back.)
        fs::write(bench.folder().join(&bench.files[last].name), b"").unwrap();
        assert_eq!(left_behind(&bench.place), [(DISK, EPOCH, DISK_BYTES)], "file {last} is empty");
    }
    image[0] = Some(Vec::new());
    bench.open(&image);
    assert_eq!(left_behind(&bench.place), []);
}

/// A server that begins anew may hand out an epoch's number again: nothing that lies there is of the new one.
#[test]
fn an_epoch_that_begins_has_an_empty_spool() {
    let bench = Bench::new(9, 200, 6 << 10);
    let mut spool = Spool::begin(&bench.place, DISK, EPOCH);
    assert!(spool.is_read() && spool.last().is_none() && spool.used_bytes() == 0);
    assert!(spool.peek().unwrap().is_none());
    assert!(spool.append(NOW, &frame(0, 200)));
    drop(spool);
    let mut spool = Spool::open(&bench.place, DISK, EPOCH);
    assert_eq!(bench.read(&mut spool), 0..1);
}

/// The agent died in the middle of an entry and goes on behind the one before it.
#[test]
fn what_is_spooled_behind_a_torn_end_is_there_next_time() {
    let bench = Bench::new(9, 200, 6 << 10);
    let last = bench.files.len() - 1;
    for length in HEADER..bench.files[last].bytes.len() {
        let mut image = bench.image();
        image[last].as_mut().unwrap().truncate(length);
        let given = bench.open(&image);
        let mut spool = Spool::open(&bench.place, DISK, EPOCH);
        for number in given.end..9 {
            assert!(spool.append(NOW, &frame(number as u64, 200)));
        }
        drop(spool);
        let mut spool = Spool::open(&bench.place, DISK, EPOCH);
        assert_eq!(bench.read(&mut spool), 0..9, "torn at {length}");
    }
}

#[derive(Clone, Debug)]
enum Damage {
    Zeroes {
        file: usize,
        page: usize,
    },
    Flip {
        file: usize,
        at: usize,
        bit: u8,
    },
    Cut {
        file: usize,
        at: usize,
    },
    Longer {
        file: usize,
        by: usize,
    },
    Gone {
        file: usize,
    },
    /// A page of one file where that of another belongs.
    Astray {
        from: usize,
        to: usize,
        page: usize,
    },
    /// Part of a file at another place of it.
    Moved {
        file: usize,
        from: usize,
        to: usize,
        length: usize,
    },
    Swapped {
        one: usize,
        other: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    let file = || 0_usize..8;
    let at = || 0_usize..16384;
    prop_oneof![
        (file(), 0_usize..8).prop_map(|(file, page)| Damage::Zeroes { file, page }),
        (file(), at(), 0_u8..8).prop_map(|(file, at, bit)| Damage::Flip { file, at, bit }),
        (file(), at()).prop_map(|(file, at)| Damage::Cut { file, at }),
        (file(), 1_usize..9000).prop_map(|(file, by)| Damage::Longer { file, by }),
        file().prop_map(|file| Damage::Gone { file }),
        (file(), file(), 0_usize..8).prop_map(|(from, to, page)| Damage::Astray { from, to, page }),
        (file(), at(), at(), 1_usize..9000).prop_map(|(file, from, to, length)| Damage::Moved {
            file,
            from,
            to,
            length
        }),
        (file(), file()).prop_map(|(one, other)| Damage::Swapped { one, other }),
    ]
}

impl Damage {
    fn apply(&self, image: &mut Image) {
        let count = image.len();
        let copy = |image: &Image, file: usize, range: Range<usize>| {
            let bytes = image[file % count].clone().unwrap_or_default();
            bytes.get(range.start.min(bytes.len())..range.end.min(bytes.len())).unwrap_or_default().to_vec()
        };
        let put = |image: &mut Image, file: usize, at: usize, new: &[u8]| {
            if let Some(place) = image[file % count].as_mut().and_then(|bytes| bytes.get_mut(at..)) {
                let length = place.len().min(new.len());
                place[..length].copy_from_slice(&new[..length]);
            }
        };
        match *self {
            Self::Zeroes { file, page } => put(image, file, page * PAGE, &[0; PAGE]),
            Self::Flip { file, at, bit } => {
                let flipped: Vec<u8> = copy(image, file, at..at + 1).iter().map(|b| b ^ (1 << bit)).collect();
                put(image, file, at, &flipped);
            }
            Self::Cut { file, at } => image[file % count].iter_mut().for_each(|bytes| bytes.truncate(at)),
            Self::Longer { file, by } => {
                image[file % count].iter_mut().for_each(|bytes| bytes.resize(bytes.len() + by, 0));
            }
            Self::Gone { file } => image[file % count] = None,
            Self::Astray { from, to, page } => {
                let bytes = copy(image, from, page * PAGE..(page + 1) * PAGE);
                put(image, to, page * PAGE, &bytes);
            }
            Self::Moved { file, from, to, length } => {
                let bytes = copy(image, file, from..from + length);
                put(image, file, to, &bytes);
            }
            Self::Swapped { one, other } => image.swap(one % count, other % count),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_damage_on_damage_leaves_a_run_without_a_hole(damages in prop::collection::vec(damage(), 1..6)) {
        // (`open` compares what it gives, byte for byte.)
        thread_local!(static BENCH: Bench = Bench::new(14, 2600, 48 << 10));
        BENCH.with(|bench| {
            let mut image = bench.image();
            damages.iter().for_each(|damage| damage.apply(&mut image));
            let given = bench.open(&image);
            assert!(given.end <= bench.frames.len());
        });
    }
}

#[test]
fn every_case_that_the_page_lists_names_a_test_that_exists() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(folder.join(path)).unwrap();
    let tests = read("src/drain/tests.rs") + &read("tests/spool_damage.rs");
    let page = read("../docs/formats/outbox.md");
    let cases = page.split_once("| what happens | what follows | test |").unwrap().1.lines().skip(2);
    let mut named = 0;
    for case in cases.take_while(|line| line.starts_with('|')) {
        let names = case.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap();
        for name in names.split(',').map(|name| name.trim().trim_matches('`')) {
            assert!(tests.contains(&format!("fn {name}(")), "there is no test {name}");
            named += 1;
        }
    }
    assert!(named > 10, "only {named} tests");
}
