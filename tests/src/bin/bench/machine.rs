//! The machine: its idleness, its processors, what ran on it.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cdp_tests::process::service;
use cdp_tests::programs::program;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// The core of everything that is the guest's: the load and QEMU.
pub(crate) const GUEST_CORE: &str = "0";
/// The core of agent, server, and of the peers' sinks.
pub(crate) const SINK_CORE: &str = "1";

/// More of others than this, in cores, and a round does not count as quiet.
const IDLE_BELOW: f64 = 0.3;
const LOOK: Duration = Duration::from_millis(500);
/// How long one table waits for quiet moments, all its rounds together: a full run fits an hour on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the machine does nothing else, and takes that time from `patience`, but for the first look; whether it came to that.
pub(crate) fn wait_until_idle(patience: &mut Duration) -> bool {
    let began = Instant::now();
    loop {
        let before = busy_ticks();
        thread::sleep(LOOK);
        let busy = (busy_ticks() - before) as f64 / ticks_per_second() / LOOK.as_secs_f64();
        let quiet = busy < IDLE_BELOW;
        if quiet || began.elapsed() > *patience {
            *patience = patience.saturating_sub(began.elapsed().saturating_sub(LOOK));
            return quiet;
        }
    }
}

/// Everything but idle and waiting for the disk, of all processors.
fn busy_ticks() -> u64 {
    let text = fs::read_to_string("/proc/stat").expect("/proc/stat");
    let line = text.lines().next().expect("a first line");
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map(|word| word.parse().expect("ticks")).collect();
    let idle = ticks[3] + ticks[4];
    // The last two are parts of the first two.
    ticks.iter().take(8).sum::<u64>() - idle
}

/// Processor time of a process so far, in seconds; 0 when it is gone.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()));
    clock.and_then(clock_gettime).map_or(0.0, |time| Duration::from(time).as_secs_f64())
}

/// Processor time of all threads of a process with that name (at most 15 letters), in seconds; of those that have ended,
/// nothing.
pub(crate) fn thread_seconds(pid: u32, name: &str) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_that_name = tasks
        .map(|task| task.path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name));
    of_that_name.map(|task| scheduled_seconds(&task.join("schedstat"))).sum()
}

/// The first number of a `schedstat`: nanoseconds on a processor.
fn scheduled_seconds(path: &Path) -> f64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|word| word.parse::<f64>().ok());
    nanoseconds.unwrap_or_default() / 1e9
}

/// Processor time of the calling thread, in seconds.
pub(crate) fn own_seconds() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the thread's clock");
    Duration::from(time).as_secs_f64()
}

/// A line of `/proc/PID/status` that ends in kB, in MiB; 0 when there is none.
pub(crate) fn status_mib(pid: u32, key: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

/// A new directory on the disk that the build is on.
pub(crate) fn directory_on_disk() -> tempfile::TempDir {
    let here = program("cdp-server");
    let target = here.ancestors().nth(2).expect("a target directory");
    tempfile::Builder::new().prefix("cdp-bench-").tempdir_in(target).expect("a directory")
}

fn ticks_per_second() -> f64 {
    // USER_HZ of every Linux on a 64-bit PC.
    100.0
}

/// A command that runs on one core only, and as a service.
pub(crate) fn pinned(core: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = service("taskset");
    command.args(["-c", core]).arg(program);
    command
}

/// Restricts a running process, all its threads, to one core.
pub(crate) fn pin(pid: u32, core: &str) {
    let pinned = || {
        let taskset = Command::new("taskset").args(["-a", "-c", "-p", core, &pid.to_string()]).output();
        taskset.expect("taskset runs").status.success()
    };
    // It fails when a thread ends that it has just listed.
    assert!((0..10).any(|_| pinned()), "cannot pin process {pid}");
}

/// Gives the session of a process a tenth of a core's share, as the slice of `docs/operating/running.md` gives it to agent and
/// server: guests, and what the kernel does for them, go first. A kernel without groups of sessions has no such share.
pub(crate) fn give_way(pid: u32) {
    let group = format!("/proc/{pid}/autogroup");
    if has_session_groups() {
        fs::write(&group, "10").unwrap_or_else(|e| panic!("cannot lower the weight in {group}: {e}"));
    }
}

/// Whether the kernel gives each session a share of a core.
fn has_session_groups() -> bool {
    fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled").is_ok_and(|on| on.trim() == "1")
}

/// What the kernel does for shared memory that asks for huge pages: the word in brackets.
fn huge_pages() -> String {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    chosen.map_or("none", |(word, _)| word).to_owned()
}

/// Restricts the calling thread, and what it starts, to one core.
pub(crate) fn pin_thread(core: &str) {
    let mut cores = CpuSet::new();
    cores.set(core.parse().expect("a core's number")).expect("a core");
    sched_setaffinity(Pid::from_raw(0), &cores).expect("a core of this machine");
}

/// The command of the run, processor, kernel and program versions, for the report.
pub(crate) fn describe(command: &str) -> Vec<(String, String)> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    // Those of the machine, not those that this process is pinned to.
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let first_line = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().ok();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        text.and_then(|text| text.lines().next().map(str::to_owned)).unwrap_or_else(|| "missing".to_owned())
    };
    vec![
        ("command".to_owned(), format!("`{command}`")),
        ("processor".to_owned(), format!("{} × {cores}", model.map_or("unknown", |(_, name)| name))),
        (
            "load of the machine when the run ended".to_owned(),
            fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned(),
        ),
        ("kernel".to_owned(), first_line("uname", "-r")),
        ("QEMU".to_owned(), first_line("qemu-img", "--version")),
        ("fio".to_owned(), first_line("fio", "--version")),
        ("nbdkit".to_owned(), first_line("nbdkit", "--version")),
        ("huge pages of shared memory".to_owned(), huge_pages()),
        (
            "pinning".to_owned(),
            format!(
                "load and QEMU on core {GUEST_CORE}; agent, server and the peers' sinks on core {SINK_CORE}"
            ),
        ),
        (
            "sessions".to_owned(),
            match has_session_groups() {
                true => "one for each program; agent and server have a tenth of the weight".to_owned(),
                false => "one for each program; the kernel does not weigh them".to_owned(),
            },
        ),
    ]
}
