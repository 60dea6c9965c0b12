//! A byte of the server's files that is another one for a while.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use cdp_tests::random::Random;

/// A byte that was changed.
pub(crate) struct Rot {
    path: PathBuf,
    inode: u64,
    at: u64,
    was: u8,
    is: u8,
}

impl Rot {
    /// Changes one byte of one of the files in a disk's directory. The server must not run.
    pub(crate) fn strike(directory: &Path, random: &mut Random) -> Self {
        let mut files: Vec<_> = fs::read_dir(directory)
            .expect("the disk's directory")
            .map(|entry| entry.expect("entry").path())
            .filter(|path| fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() > 0))
            .collect();
        files.sort();
        let path = files.swap_remove(random.within(0..files.len() as u64) as usize);
        let file = open(&path);
        let data = file.metadata().expect("metadata");
        let at = random.within(0..data.len());
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        let (was, is) = (byte[0], byte[0] ^ 1 << random.within(0..8));
        file.write_all_at(&[is], at).expect("another byte");
        println!("  byte {at} of {}", path.display());
        Self { path, inode: data.ino(), at, was, is }
    }

    /// Puts it back, if the file still has the wrong one: what can be made again from the rest, the server has. It must not
    /// run.
    pub(crate) fn heal(&self) {
        if !fs::metadata(&self.path).is_ok_and(|data| data.ino() == self.inode && data.len() > self.at) {
            return;
        }
        let file = open(&self.path);
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.at).expect("a byte");
        if byte == [self.is] {
            file.write_all_at(&[self.was], self.at).expect("the byte");
        }
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("a file of the store")
}
