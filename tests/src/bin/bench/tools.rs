//! The programs that write in `space`, and what they write with: an image that a guest mounts and enters.
//!
//! The programs are this machine's own (SQLite, the C compiler, `tar`), and Debian's PostgreSQL (`scripts/postgres`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use cdp_tests::programs::workspace;
use cdp_tests::random::Random;

/// Bytes of what stands for a film: compressed already.
const FILM_BYTES: usize = 16 << 20;
/// Transactions of one run of SQLite.
const TRANSACTIONS: usize = 200;
/// Sources that one run of the compiler takes.
const SOURCES: usize = 6;
/// PostgreSQL does not run as root; then it is this user's.
const NOBODY: u32 = 65534;

/// Mounts the two disks, brings PostgreSQL up on the protected one and fills its tables, as lines for the guest's shell. What they
/// print goes to `/tmp/out`.
pub(crate) const PREPARE: [&str; 8] = [
    "mkdir /tools && mount -t ext4 -o ro /dev/vdb /tools && mount -t ext4 /dev/vda /mnt",
    "mount -o bind /mnt /tools/mnt && mount -o bind /dev /tools/dev",
    "cp -a /tools/cluster /mnt/cluster",
    "pg() { chroot /tools /usr/bin/setpriv --reuid=pg --regid=pg --clear-groups /bin/busybox env LD_LIBRARY_PATH=/lib TZ=UTC HOME=/ \"$@\"; }",
    "{ pg /pg/bin/postgres -D /mnt/cluster & }",
    "{ for n in $(seq 60); do pg /pg/bin/psql -h /mnt/cluster -qc 'select 1' postgres && break; sleep 1; done; [ $n -lt 60 ]; }",
    "pg /pg/bin/pgbench -h /mnt/cluster -qis 1 postgres",
    "pg /pg/bin/psql -h /mnt/cluster -qf /random.sql postgres",
];

/// Programs, as lines for the guest's shell; `$I` is the number of the run.
pub(crate) const PROGRAMS: [(&str, &str); 8] = [
    ("SQLite, write-ahead log", "chroot /tools /usr/bin/sqlite3 /mnt/wal.db </tools/wal.sql"),
    ("SQLite, rollback journal", "chroot /tools /usr/bin/sqlite3 /mnt/delete.db </tools/delete.sql"),
    ("PostgreSQL, pgbench", "pg /pg/bin/pgbench -h /mnt/cluster -n -c 4 -t 50 postgres"),
    ("PostgreSQL, random values", "pg /pg/bin/pgbench -h /mnt/cluster -n -c 4 -t 50 -f /update.sql postgres"),
    ("untar C headers", "mkdir /mnt/$I; tar -xf /tools/tree.tar -C /mnt/$I"),
    (
        "compile C sources",
        "for s in /tools/src/*.c; do s=${s##*/}; PATH=/usr/bin TMPDIR=/mnt chroot /tools /usr/bin/gcc -O1 -g -isystem /mnt/$I/include -isystem /mnt/$I/include/x86_64-linux-gnu -c /src/$s -o /mnt/$I/${s%.c}.o || break; done; [ -e /mnt/$I/${s%.c}.o ]",
    ),
    (
        "log, an fsync a line",
        "for n in $(seq 50); do append \"$n INFO $(cat /proc/uptime) request $I-$n served\"; done",
    ),
    ("copy a film", "cp /tools/film /mnt/film$I"),
];

/// An image with the programs and their libraries, and what they are to do.
pub(crate) fn image(directory: &Path) -> PathBuf {
    let (root, image) = (directory.join("tools"), directory.join("tools.raw"));
    for folder in ["mnt", "dev", "tmp", "bin", "etc", "src"] {
        fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    let tools = Tools { root: &root };
    for program in ["sqlite3", "setpriv"] {
        tools.add(&Path::new("/usr/bin").join(program), "");
    }
    tools.put(Path::new("/bin/busybox"), Path::new("/bin/busybox"));
    tools.compiler();
    tools.postgres();
    for mode in ["wal", "delete"] {
        fs::write(root.join(format!("{mode}.sql")), transactions(mode)).expect("a script");
    }
    fs::write(root.join("film"), Random::of(9).bytes(FILM_BYTES)).expect("a film");
    // Of the headers those that come with the C library: the other ones differ from machine to machine.
    run(Command::new("tar").args(["-chf"]).arg(root.join("tree.tar")).args(["-C", "/usr"]).args(headers()));
    run(Command::new("mkfs.ext4").arg("-q").arg("-d").arg(&root).arg(&image).arg("768M"));
    image
}

struct Tools<'a> {
    root: &'a Path,
}

impl Tools<'_> {
    /// Copies a file of this machine to a place in the image.
    fn put(&self, from: &Path, to: &Path) {
        let copy = self.root.join(to.strip_prefix("/").expect("an absolute path"));
        fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
        fs::copy(from, copy).unwrap_or_else(|e| panic!("cannot copy {}: {e}", from.display()));
    }

    /// Puts a program with the libraries that it needs where they are on this machine, looked for in `libraries` too.
    fn add(&self, program: &Path, libraries: &str) {
        for library in needed(program, libraries) {
            self.put(&library, &library);
        }
        self.put(program, program);
    }

    /// The C compiler, without a linker.
    fn compiler(&self) {
        self.add(Path::new("/usr/bin/gcc"), "");
        for part in ["cc1", "as"] {
            let path = PathBuf::from(printed(Command::new("gcc").arg(format!("-print-prog-name={part}"))));
            let path = if path.is_absolute() { path } else { Path::new("/usr/bin").join(path) };
            self.add(&path, "");
        }
        let headers = PathBuf::from(printed(Command::new("gcc").arg("-print-file-name=include")));
        for header in fs::read_dir(&headers).expect("the compiler's headers").flatten() {
            if header.path().is_file() {
                self.put(&header.path(), &header.path());
            }
        }
        for number in 0..SOURCES {
            fs::write(self.root.join(format!("src/part{number}.c")), source(number)).expect("a source");
        }
    }

    /// PostgreSQL as `/pg`, with a cluster that it has just made.
    fn postgres(&self) {
        let unpacked = workspace().join("target/postgres");
        let mut script = Command::new(workspace().join("scripts/postgres"));
        run(script.arg(&unpacked));
        let versions = fs::read_dir(unpacked.join("usr/lib/postgresql")).expect("PostgreSQL").flatten();
        let server = versions.map(|version| version.path()).max().expect("a server");
        let version = server.file_name().expect("a version").to_owned();
        let libraries = unpacked.join("usr/lib/x86_64-linux-gnu");
        let libraries = libraries.to_str().expect("a path in Unicode");
        for program in ["postgres", "pgbench", "psql"] {
            let path = server.join("bin").join(program);
            for library in needed(&path, libraries) {
                let name = library.file_name().expect("a file");
                self.put(&library, &Path::new("/lib").join(name));
            }
        }
        // Where a server looks for its files follows from where it is itself.
        for (from, to) in [
            (server.clone(), PathBuf::from("usr/lib/postgresql").join(&version)),
            (
                unpacked.join("usr/share/postgresql").join(&version),
                PathBuf::from("usr/share/postgresql").join(&version),
            ),
        ] {
            let to = self.root.join(to);
            fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
            run(Command::new("cp").arg("-rL").arg(from).arg(to));
        }
        symlink(Path::new("/usr/lib/postgresql").join(&version), self.root.join("pg")).expect("a link");
        fs::create_dir_all(self.root.join("usr/share/zoneinfo")).expect("a folder");
        for zone in ["UTC", "GMT"] {
            let path = format!("/usr/share/zoneinfo/{zone}");
            let found = fs::canonicalize(&path).expect("this machine's time zones");
            self.put(&found, Path::new(&path));
        }
        self.cluster(&unpacked, &version);
        fs::write(self.root.join("random.sql"), RANDOM_TABLE).expect("a script");
        fs::write(self.root.join("update.sql"), RANDOM_UPDATE).expect("a script");
    }

    /// Makes the cluster. The server does nothing for root, and who does it instead may not be able to come where this
    /// repository is (root's own folder, say): so it is made aside.
    fn cluster(&self, unpacked: &Path, version: &OsStr) {
        let aside = tempfile::tempdir().expect("a folder");
        let user = match fs::metadata(aside.path()).expect("the folder").uid() {
            0 => NOBODY,
            user => user,
        };
        run(Command::new("cp").arg("-r").arg(unpacked.join("usr")).arg(aside.path()));
        let initdb = aside.path().join("usr/lib/postgresql").join(version).join("bin/initdb");
        let mut command = match user {
            NOBODY => {
                std::os::unix::fs::chown(aside.path(), Some(NOBODY), Some(NOBODY)).expect("chown");
                let mut command = Command::new("setpriv");
                command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(initdb);
                command
            }
            _ => Command::new(initdb),
        };
        let (made, cluster) = (aside.path().join("cluster"), self.root.join("cluster"));
        command.arg("-D").arg(&made).args(["-U", "pg", "-A", "trust", "--no-locale", "-E", "UTF8", "-N"]);
        let libraries = aside.path().join("usr/lib/x86_64-linux-gnu");
        run(command.env("LD_LIBRARY_PATH", libraries).env("TZ", "UTC").current_dir("/"));
        run(Command::new("cp").arg("-a").arg(made).arg(&cluster));
        let configuration = cluster.join("postgresql.conf");
        let mut text = fs::read_to_string(&configuration).expect("its configuration");
        text += "listen_addresses = ''\nunix_socket_directories = '/mnt/cluster'\nshared_buffers = 32MB\n\
                 dynamic_shared_memory_type = mmap\nmax_wal_size = 64MB\njit = off\n";
        fs::write(&configuration, text).expect("its configuration");
        fs::write(self.root.join("etc/passwd"), format!("pg:x:{user}:{user}::/:/bin/sh\n")).expect("a file");
        fs::write(self.root.join("etc/group"), format!("pg:x:{user}:\n")).expect("a file");
    }
}

const RANDOM_TABLE: &str = "CREATE TABLE r(id int PRIMARY KEY, v text);\n\
     INSERT INTO r SELECT i, md5(random()::text) || md5(random()::text) FROM generate_series(1, 20000) i;\n\
     CHECKPOINT;\n";
const RANDOM_UPDATE: &str = "\\set id random_zipfian(1, 20000, 1.1)\n\
     UPDATE r SET v = md5(random()::text) || md5(random()::text) || md5(random()::text) WHERE id = :id;\n";

/// The libraries of a program, with the loader.
fn needed(program: &Path, libraries: &str) -> BTreeSet<PathBuf> {
    let text = printed(Command::new("ldd").arg(program).env("LD_LIBRARY_PATH", libraries));
    assert!(!text.contains("not found"), "{} lacks a library: {text}", program.display());
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// The C library's headers, as this machine has them, below `/usr`.
fn headers() -> Vec<String> {
    let all = fs::read_dir("/usr/include").expect("the C library's headers").flatten();
    let plain = all.filter(|entry| entry.path().is_file()).map(|entry| entry.file_name());
    let mut headers: Vec<String> = plain.map(|name| format!("include/{}", name.to_string_lossy())).collect();
    let folders = ["arpa", "asm-generic", "linux", "net", "netinet", "rpc", "x86_64-linux-gnu/asm"];
    let folders =
        folders.into_iter().chain(["x86_64-linux-gnu/bits", "x86_64-linux-gnu/gnu", "x86_64-linux-gnu/sys"]);
    headers.extend(folders.map(|folder| format!("include/{folder}")));
    headers.retain(|header| Path::new("/usr").join(header).exists());
    headers
}

/// A source that makes the compiler read headers and write code of its own.
fn source(number: usize) -> String {
    let mut text =
        String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n");
    for function in 0..40 {
        let _ = writeln!(
            text,
            "int part{number}_{function}(const char *name, int count) {{\n  int sum = {function};\n  \
             for (int i = 0; i < count; i++) sum += (int)strlen(name) * i % {};\n  \
             if (sum > {}) printf(\"%s: %d\\n\", name, sum);\n  return abs(sum);\n}}",
            number + function + 2,
            number * 1000 + function
        );
    }
    text
}

/// Orders that come, are paid, and go, each change a transaction of its own.
fn transactions(mode: &str) -> String {
    let mut sql = format!(
        "PRAGMA journal_mode={mode}; PRAGMA synchronous=FULL;\n\
         CREATE TABLE IF NOT EXISTS orders(id INTEGER PRIMARY KEY, customer TEXT, state TEXT, note TEXT);\n\
         CREATE INDEX IF NOT EXISTS by_customer ON orders(customer);\n"
    );
    for _ in 0..TRANSACTIONS / 4 {
        sql += "INSERT INTO orders(customer, state, note) VALUES('customer ' || abs(random()) % 1000, 'new', hex(randomblob(100)));\n\
                INSERT INTO orders(customer, state, note) VALUES('customer ' || abs(random()) % 1000, 'new', 'deliver to the back door');\n\
                UPDATE orders SET state = 'paid' WHERE id = (SELECT abs(random()) % max(id) + 1 FROM orders);\n\
                DELETE FROM orders WHERE id = (SELECT abs(random()) % max(id) + 1 FROM orders);\n";
    }
    let _ = writeln!(sql, "SELECT count(*) FROM orders;");
    sql
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) {
    let _ = printed(command);
}

/// The same; what it printed.
fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
