//! The kinds of faults.

use cdp_tests::random::Random;

/// Something bad.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    AgentKilled,
    AgentStopped,
    AgentFrozen,
    ServerKilled,
    ServerStopped,
    ServerFrozen,
    /// Agent and server at once.
    BothKilled,
    NetworkDown,
    NetworkStalled,
    NetworkSlow,
    /// The server's disk is full, or fails now and then to write, to make durable, to read.
    StoreFails,
    /// One byte of the server's files is another one, until it is put back.
    ByteRots,
    /// Strangers talk to every port, and to the agent's socket: anything, or nothing at all.
    Strangers,
    /// Policy, sync mode and the next ring's size are changed.
    SettingsChanged,
    /// An overlay comes on top of the disk, and is committed into it again: no fault, and no gap.
    NodesChanged,
    QemuKilled,
    /// QEMU, agent and server at once.
    EverythingKilled,
    ProtectionOff,
}

const FAULTS: [Fault; 18] = [
    Fault::AgentKilled,
    Fault::AgentStopped,
    Fault::AgentFrozen,
    Fault::ServerKilled,
    Fault::ServerStopped,
    Fault::ServerFrozen,
    Fault::BothKilled,
    Fault::NetworkDown,
    Fault::NetworkStalled,
    Fault::NetworkSlow,
    Fault::StoreFails,
    Fault::ByteRots,
    Fault::Strangers,
    Fault::SettingsChanged,
    Fault::NodesChanged,
    Fault::QemuKilled,
    Fault::EverythingKilled,
    Fault::ProtectionOff,
];

impl Fault {
    /// Whether QEMU dies.
    pub(crate) fn kills_qemu(self) -> bool {
        matches!(self, Self::QemuKilled | Self::EverythingKilled)
    }

    /// Whether history has a gap where this happened.
    pub(crate) fn costs_history(self) -> bool {
        self.kills_qemu() || self == Self::ProtectionOff
    }
}

/// Those that `CDP_FAULTS_ONLY` names, else all.
pub(crate) fn kinds() -> Vec<Fault> {
    let Ok(only) = std::env::var("CDP_FAULTS_ONLY") else { return FAULTS.to_vec() };
    let named = |name: &str| FAULTS.into_iter().find(|fault| format!("{fault:?}") == name);
    only.split(',')
        .map(|name| named(name).unwrap_or_else(|| panic!("no fault {name}; there are {FAULTS:?}")))
        .collect()
}

/// What the server's drill is to be for [`Fault::StoreFails`].
pub(crate) fn drill(random: &mut Random) -> String {
    match random.within(0..5) {
        0 => format!("disk-full-after={}KiB", random.within(0..512)),
        1 => format!("fsync-error-after={}", random.within(0..20)),
        2 => format!("write-error-every={}", random.within(2..50)),
        3 => format!("read-error-every={}", random.within(2..50)),
        _ => format!(
            "write-error-every={},read-error-every={},fsync-error-after={}",
            random.within(20..200),
            random.within(20..200),
            random.within(0..50)
        ),
    }
}
