//! What the live state promises.

use super::*;
use crate::data::socket::Socket;
use crate::limits::{HELD_RETRY, RECONCILE_RETRY, STATUS_FRESH};
use crate::model::VmReport;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

const DISK: DiskId = DiskId([3; 16]);

fn host(pid: u32) -> HostReport {
    let disk = DiskReport { id: DISK, device: "disk0".to_owned(), ..DiskReport::default() };
    let vm = VmReport { name: "vm".to_owned(), pid, disks: vec![disk], ..VmReport::default() };
    HostReport { vms: vec![vm], ..HostReport::default() }
}

fn status(mode: &str, captured_lsn: u64, host_stamp: u64) -> DiskStatus {
    DiskStatus { mode: mode.to_owned(), captured_lsn, host_stamp, ..DiskStatus::default() }
}

fn peer(fleet: &Fleet) -> (Arc<Peer>, std::sync::mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
    let (peer, outgoing) = Peer::new(fleet.next_session(), "host".to_owned(), Arc::new(Socket::Tcp(stream)));
    fleet.connected(&peer);
    (peer, outgoing)
}

#[test]
fn a_time_is_covered_once_what_was_captured_before_it_is_durable() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.reported(SessionId(1), &host(1));
    fleet.status(SessionId(1), DISK, status("capturing", 10, 1000), now);
    fleet.status(SessionId(1), DISK, status("capturing", 20, 2000), now);
    assert_eq!(fleet.covered_until(DISK, Lsn(9), now), Some(Stamp::ZERO));
    assert_eq!(fleet.covered_until(DISK, Lsn(15), now), Some(Stamp(1000)));
    assert_eq!(fleet.covered_until(DISK, Lsn(20), now), Some(Stamp(2000)));
    assert_eq!(fleet.covered_until(DISK, Lsn(20), now + STATUS_FRESH), None, "the agent has fallen silent");
}

#[test]
fn a_disk_that_is_only_tracked_covers_nothing() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.reported(SessionId(1), &host(1));
    fleet.status(SessionId(1), DISK, status("tracking", 10, 1000), now);
    assert_eq!(fleet.covered_until(DISK, Lsn(10), now), None);
}

#[test]
fn a_new_process_of_a_vm_is_not_taken_to_be_captured() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.reported(SessionId(1), &host(1));
    fleet.status(SessionId(1), DISK, status("capturing", 10, 1000), now);
    fleet.reported(SessionId(1), &host(1));
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);
    fleet.reported(SessionId(1), &host(2));
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Off);
}

#[test]
fn only_the_connection_that_reports_a_disk_speaks_for_it() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    fleet.reported(SessionId(1), &host(1));
    fleet.status(SessionId(2), DISK, status("capturing", 10, 1000), now);
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Off);
    fleet.disconnected(SessionId(2));
    assert!(fleet.live(DISK, now).is_some());
    fleet.disconnected(SessionId(1));
    assert!(fleet.live(DISK, now).is_none());
}

#[test]
fn a_result_reaches_who_asked_and_only_from_the_agent_that_was_asked() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let (asked, _outgoing) = peer(&fleet);
    fleet.reported(asked.id, &host(1));
    let mut answer =
        fleet.command(DISK, Command::SetProtection(Some(ProtectionOptions::default())), now).expect("sent");
    let request = fleet.lock().last_number;
    fleet.completed(asked.id, CommandResult { request, ..CommandResult::default() }, now);
    assert!(answer.try_recv().is_ok());
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);

    let mut answer = fleet.command(DISK, Command::SetProtection(None), now).expect("sent");
    let request = fleet.lock().last_number;
    fleet.completed(SessionId(999), CommandResult { request, ..CommandResult::default() }, now);
    assert!(answer.try_recv().is_err());
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);
}

#[test]
fn a_failed_command_rests_before_it_is_tried_again() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let (asked, _outgoing) = peer(&fleet);
    fleet.reported(asked.id, &host(1));
    let _answer =
        fleet.command(DISK, Command::SetProtection(Some(ProtectionOptions::default())), now).expect("sent");
    let request = fleet.lock().last_number;
    let error = "no".to_owned();
    fleet.completed(asked.id, CommandResult { request, error, ..CommandResult::default() }, now);
    assert!(fleet.live(DISK, now).expect("live").resting);
    let later = now + RECONCILE_RETRY + Duration::from_secs(1);
    assert!(!fleet.live(DISK, later).expect("live").resting);
}

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);
const HOST_1: HostId = HostId([1; 16]);
const HOST_2: HostId = HostId([2; 16]);

fn host_of(id: u8, pid: u32) -> HostReport {
    HostReport { id: HostId([id; 16]), name: format!("host{id}"), ..host(pid) }
}

/// A disk that host 1 has, on session [`A`], and that a clone on host 2 claims, on session [`B`].
fn cloned() -> Fleet {
    let fleet = Fleet::default();
    fleet.reported(A, &host_of(1, 10));
    fleet.opened(A, HOST_1, DISK, Epoch(1));
    fleet.reported(B, &host_of(2, 20));
    fleet
}

fn vm_pid(fleet: &Fleet) -> Option<u32> {
    fleet.live(DISK, Instant::now()).map(|live| live.vm_pid)
}

#[test]
fn a_clone_changes_nothing_and_is_shown_as_a_conflict_while_it_lasts() {
    let (fleet, now) = (cloned(), Instant::now());
    fleet.status(A, DISK, DiskStatus { epoch: 1, ..status("capturing", 10, 1000) }, now);
    fleet.status(B, DISK, DiskStatus { epoch: 1, ..status("tracking", 99, 9000) }, now);
    let live = fleet.live(DISK, now).expect("live");
    assert_eq!((live.vm_pid, live.mode, live.status.captured_lsn), (10, Mode::Capturing, 10));
    let conflicts = fleet.conflicts(DISK);
    assert_eq!(conflicts.len(), 1);
    assert_eq!((conflicts[0].host.as_str(), conflicts[0].vm_pid), ("host2", 20));
    assert!(conflicts[0].reason.contains("process 10"), "{}", conflicts[0].reason);
    fleet.held(B, DISK, "host1 has it".to_owned());
    assert_eq!(fleet.conflicts(DISK)[0].reason, "host1 has it");
    fleet.reported(B, &HostReport { vms: Vec::new(), ..host_of(2, 20) });
    assert_eq!((fleet.conflicts(DISK), vm_pid(&fleet)), (Vec::new(), Some(10)));
}

#[test]
fn the_disk_follows_its_owner_and_the_catalog_learns_of_it() {
    let fleet = cloned();
    let written = |fleet: &Fleet| -> Vec<(SessionId, usize)> {
        fleet.unwritten().into_iter().map(|(session, report)| (session, report.vms.len())).collect()
    };
    assert_eq!(written(&fleet), [(A, 1), (B, 0)], "the clone is not written down");
    assert_eq!(written(&fleet), [], "once");
    fleet.reported(A, &host_of(1, 10));
    assert_eq!(written(&fleet), [(A, 1)], "whatever is reported anew");
    fleet.closed(DISK);
    assert_eq!(vm_pid(&fleet), Some(10), "who came first");
    fleet.opened(B, HOST_2, DISK, Epoch(2));
    assert_eq!(vm_pid(&fleet), Some(20));
    assert_eq!(fleet.conflicts(DISK)[0].host, "host1");
    assert_eq!(written(&fleet), [(B, 1)]);
    fleet.disconnected(B);
    assert_eq!((vm_pid(&fleet), fleet.conflicts(DISK)), (Some(10), Vec::new()));
    assert_eq!(written(&fleet), [(A, 1)]);
    fleet.write_again(A);
    assert_eq!(written(&fleet), [(A, 1)]);
    fleet.opened(A, HOST_1, DISK, Epoch(3));
    fleet.reported(B, &host_of(2, 20));
    assert_eq!(written(&fleet), [(B, 0)]);
    fleet.disconnected(A);
    assert_eq!(written(&fleet), [(B, 1)], "the one that came second is the only one left");
}

#[test]
fn a_second_process_of_one_host_is_a_conflict_with_its_agents_words() {
    let fleet = Fleet::default();
    let mut both = host_of(1, 10);
    let mut second = both.vms[0].clone();
    (second.pid, second.disks[0].refused) = (11, "process 10 has it".to_owned());
    both.vms.insert(0, second);
    fleet.reported(A, &both);
    assert_eq!(vm_pid(&fleet), Some(10));
    assert_eq!(fleet.conflicts(DISK)[0].reason, "process 10 has it");
    let [(_, written)] = &fleet.unwritten()[..] else { panic!("one report") };
    assert_eq!(written.vms.iter().map(|vm| vm.pid).collect::<Vec<_>>(), [10]);
    both.vms.remove(1);
    both.vms[0].disks[0].refused.clear();
    fleet.reported(A, &both);
    assert_eq!((vm_pid(&fleet), fleet.conflicts(DISK)), (Some(11), Vec::new()));
}

/// What the agent still says of the first one's capture would make the second one look protected.
#[test]
fn a_second_process_is_not_taken_to_be_captured_by_what_is_said_of_the_first() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let (agent, _outgoing) = peer(&fleet);
    let session = agent.id;
    let both = |disk_is_of: u32| {
        let mut both = host_of(1, 10);
        both.vms.push(VmReport { pid: 11, ..both.vms[0].clone() });
        for vm in both.vms.iter_mut().filter(|vm| vm.pid != disk_is_of) {
            vm.disks[0].refused = format!("process {disk_is_of} has it");
        }
        both
    };
    let capturing = |epoch| DiskStatus { epoch, ..status("capturing", 10, 1000) };
    let mode = || fleet.live(DISK, now).map(|live| (live.vm_pid, live.mode));
    fleet.reported(session, &both(10));
    fleet.opened(session, HOST_1, DISK, Epoch(1));
    fleet.status(session, DISK, capturing(1), now);
    let _answer = fleet.command(DISK, Command::SetProtection(Some(ProtectionOptions::default())), now);
    let request = fleet.lock().last_number;
    fleet.reported(session, &both(11));
    assert_eq!(mode(), Some((11, Mode::Off)));
    fleet.status(session, DISK, capturing(1), now);
    assert_eq!(mode(), Some((11, Mode::Off)));
    fleet.completed(session, CommandResult { request, ..CommandResult::default() }, now);
    assert_eq!(mode(), Some((11, Mode::Off)));
    fleet.closed(DISK);
    fleet.status(session, DISK, capturing(1), now);
    assert_eq!(mode(), Some((11, Mode::Off)));
    fleet.opened(session, HOST_1, DISK, Epoch(2));
    fleet.status(session, DISK, capturing(2), now);
    assert_eq!(mode(), Some((11, Mode::Capturing)));
    fleet.reported(session, &both(10));
    assert_eq!(mode(), Some((10, Mode::Off)), "what was known of its former capture is old");
}

#[test]
fn a_new_connection_of_a_host_takes_the_place_of_the_old_one() {
    let fleet = cloned();
    let again = SessionId(3);
    fleet.reported(again, &host_of(1, 10));
    let rivals: Vec<String> = fleet.conflicts(DISK).into_iter().map(|rival| rival.host).collect();
    assert_eq!((vm_pid(&fleet), rivals), (Some(10), vec!["host2".to_owned()]));
    fleet.disconnected(A);
    assert_eq!(vm_pid(&fleet), Some(10));
}

/// A restart of the agent once made the clone the disk's VM, until the agent opened the disk again.
#[test]
fn a_host_that_comes_back_has_its_disk_before_it_opens_it() {
    let (fleet, now) = (cloned(), Instant::now());
    fleet.disconnected(A);
    assert_eq!(vm_pid(&fleet), Some(20), "there is no other");
    let again = SessionId(3);
    fleet.reported(again, &host_of(1, 10));
    assert_eq!(vm_pid(&fleet), Some(10));
    fleet.status(B, DISK, DiskStatus { epoch: 1, ..status("tracking", 99, 9000) }, now);
    fleet.status(again, DISK, DiskStatus { epoch: 1, ..status("capturing", 10, 1000) }, now);
    assert_eq!(fleet.live(DISK, now).expect("live").mode, Mode::Capturing);
}

#[test]
fn who_was_refused_a_disk_asks_again_soon_and_at_once_when_it_is_given_up() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let (owner, _kept) = peer(&fleet);
    let (clone, _outgoing) = peer(&fleet);
    fleet.reported(owner.id, &host_of(1, 10));
    fleet.opened(owner.id, HOST_1, DISK, Epoch(1));
    fleet.reported(clone.id, &host_of(2, 20));
    let refused = |at: Instant| {
        let command = Command::SetProtection(Some(ProtectionOptions::default()));
        let _answer = fleet.command_to(clone.id, DISK, command, at).expect("sent");
        let (request, error) = (fleet.lock().last_number, "held".to_owned());
        fleet.held(clone.id, DISK, error.clone());
        fleet.completed(clone.id, CommandResult { request, error, ..CommandResult::default() }, at);
    };
    let rests = |at: Instant| {
        let all = fleet.everywhere(DISK, at);
        all.iter().find(|live| live.session == clone.id).expect("claims it").resting
    };
    refused(now);
    assert!(rests(now) && !rests(now + HELD_RETRY));
    fleet.closed(DISK);
    assert!(!rests(now));
    fleet.opened(owner.id, HOST_1, DISK, Epoch(2));
    refused(now);
    fleet.disconnected(owner.id);
    assert!(!rests(now));
}

/// The agent of a host that had been silent answered "it is captured" before it had heard that it was replaced, and the
/// disk was shown as protected when its heir ended.
#[test]
fn who_was_replaced_is_not_taken_to_capture_the_disk() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let (lost, _kept) = peer(&fleet);
    fleet.reported(lost.id, &host_of(1, 10));
    fleet.opened(lost.id, HOST_1, DISK, Epoch(1));
    fleet.status(lost.id, DISK, DiskStatus { epoch: 1, ..status("capturing", 10, 1000) }, now);
    assert!(fleet.live(DISK, now).expect("live").fresh);
    fleet.opened(B, HOST_2, DISK, Epoch(2));
    assert!(!fleet.live(DISK, now).expect("live").fresh);
    let command = Command::SetProtection(Some(ProtectionOptions::default()));
    let _answer = fleet.command_to(lost.id, DISK, command, now).expect("sent");
    let request = fleet.lock().last_number;
    fleet.completed(lost.id, CommandResult { request, ..CommandResult::default() }, now);
    let live = fleet.live(DISK, now).expect("live");
    assert!(!live.fresh && live.mode == Mode::Off);
}

/// The numbers of a sync that was over were once shown for the next one until its first status came.
#[test]
fn a_status_of_another_epoch_than_the_one_opened_says_nothing() {
    let (fleet, now) = (Fleet::default(), Instant::now());
    let read = |fleet: &Fleet| fleet.live(DISK, now).expect("live").status.sync_read_bytes;
    let status = |epoch| DiskStatus { epoch, sync_read_bytes: 7, ..status("capturing", 10, 1000) };
    fleet.reported(A, &host_of(1, 10));
    fleet.opened(A, HOST_1, DISK, Epoch(1));
    fleet.status(A, DISK, status(1), now);
    assert_eq!(read(&fleet), 7);
    fleet.opened(A, HOST_1, DISK, Epoch(2));
    assert_eq!(read(&fleet), 0);
    fleet.status(A, DISK, status(1), now);
    assert_eq!(read(&fleet), 0);
    fleet.status(A, DISK, status(2), now);
    assert_eq!(read(&fleet), 7);
}
