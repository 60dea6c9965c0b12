//! Loaded into a process that is no QEMU, the library does nothing at all.

mod support;

use std::process::{Command, Output};

use support::programs::library;

fn run(preload: bool, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).env_remove("LD_PRELOAD");
    if preload {
        command.env("LD_PRELOAD", library());
    }
    command.output().expect("the program starts")
}

#[test]
fn a_program_that_is_no_qemu_behaves_as_without_the_library() {
    let programs: [(&str, &[&str]); 5] = [
        ("/bin/true", &[]),
        ("/bin/false", &[]),
        ("/bin/ls", &["-l", "/etc"]),
        ("/bin/ls", &["/does/not/exist"]),
        ("/bin/sh", &["-c", "echo out; echo err >&2; ls / | wc -l; exit 7"]),
    ];
    for (program, arguments) in programs {
        let (plain, loaded) = (run(false, program, arguments), run(true, program, arguments));
        assert_eq!(plain, loaded, "{program} {arguments:?}");
    }
}

/// What a process can see of itself: its threads, descriptors, signal handling and children. (Each tool that the shell starts
/// inherits the library and looks at itself.)
#[test]
fn nothing_is_started_or_opened() {
    let look = "grep -E '^(Threads|SigBlk|SigIgn|SigCgt)' /proc/self/status
                ls /proc/self/fd | wc -l
                ls /proc/self/task | wc -l
                (exit 3)
                echo $?";
    let (plain, loaded) = (run(false, "/bin/sh", &["-c", look]), run(true, "/bin/sh", &["-c", look]));
    assert!(plain.status.success(), "{}", String::from_utf8_lossy(&plain.stderr));
    assert_eq!(plain.stdout.iter().filter(|byte| **byte == b'\n').count(), 7);
    assert_eq!(plain, loaded);
    let maps = run(true, "/bin/cat", &["/proc/self/maps"]);
    assert!(String::from_utf8_lossy(&maps.stdout).contains("libcdp_filter.so"), "it was loaded");
}
