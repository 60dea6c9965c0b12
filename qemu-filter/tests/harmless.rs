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

/// What a process can see of itself: its threads, descriptors, signal handling and children.
#[test]
fn nothing_is_started_or_opened() {
    let look = "import os, signal\n\
                assert ('libcdp_filter.so' in open('/proc/self/maps').read()) == ('LD_PRELOAD' in os.environ)\n\
                status = open('/proc/self/status').read().splitlines()\n\
                print([line for line in status if line.startswith(('Threads', 'SigBlk', 'SigIgn', 'SigCgt'))])\n\
                print(len(os.listdir('/proc/self/fd')), os.listdir('/proc/self/task') == [str(os.getpid())])\n\
                pid = os.fork()\n\
                os._exit(3) if pid == 0 else print(os.waitpid(pid, 0)[1])";
    let (plain, loaded) = (run(false, "python3", &["-c", look]), run(true, "python3", &["-c", look]));
    assert!(plain.status.success(), "{}", String::from_utf8_lossy(&plain.stderr));
    assert_eq!(plain, loaded);
}
