//! The QEMU glue: everything that touches a running, stock QEMU.
//!
//! *Owns* QEMU's symbols and structure layouts, the interposed driver callbacks, the list of disks, and the
//! switching on and off of capture for each of them. *Must not know* the ring or the agent's protocol: it carries
//! requests to [`crate::engine`] and commands from [`crate::control`].
//!
//! # How QEMU is entered
//!
//! [`start`] runs when the library is loaded. In a process that is not a QEMU it returns at once. In a QEMU it
//! waits for the main loop, checks that this QEMU is one it has a layout for ([`layout`], [`verify`]), and starts
//! the control thread; nothing of QEMU's is changed until a disk is to be protected.
//!
//! # How a disk is protected
//!
//! [`hook`] replaces the write-side callbacks in the tables of all drivers; [`callbacks`] ask [`slots`] whether a
//! request's node is the first that is not a filter below a protected device, and only then hand it to the engine.
//! The graph stays as it is. The first time, all this is proven on a scratch node ([`proof`]). When no disk is
//! protected, the tables hold QEMU's own functions.
//!
//! # Threads
//!
//! | part | thread |
//! | --- | --- |
//! | `callbacks`, `write`, `parts`, `tracked`, `slots::find` | any of QEMU's, inside a coroutine; never block, lock, allocate (but see `tracked`) |
//! | `graph`, `mirror` | any of QEMU's, where nodes may have changed; may lock and allocate |
//! | `attach`, `devices`, `image`, `names`, `hook`, `proof` | QEMU's main thread, entered through [`mainloop`] |
//! | `background` | the device's AioContext, in a coroutine of ours |
//! | `host` | the control thread |

#![allow(unsafe_code)]

mod attach;
mod background;
mod callbacks;
mod devices;
mod drain;
mod driver;
mod graph;
mod hook;
mod host;
mod image;
mod layout;
mod mainloop;
mod maps;
mod mirror;
mod names;
mod once;
mod parts;
mod proof;
mod slots;
mod start;
mod symbols;
mod tracked;
mod types;
mod verify;
mod version;
mod write;

use std::sync::OnceLock;

use layout::Layout;
use symbols::Symbols;
use version::Version;

/// Overrides the version that is found, for a QEMU that words it in another way. The table that it chooses is
/// verified like any other.
const VERSION_VARIABLE: &str = "CDP_QEMU_VERSION";

/// What is known of the running QEMU.
#[derive(Debug)]
pub(crate) struct Glue {
    pub(crate) symbols: Symbols,
    pub(crate) layout: &'static Layout,
}

static GLUE: OnceLock<Glue> = OnceLock::new();

/// The glue, once [`prepare`] has accepted this QEMU.
pub(crate) fn glue() -> Option<&'static Glue> {
    GLUE.get()
}

/// Learns what there is to know of this QEMU, and changes nothing.
///
/// # Errors
/// Why disks of this QEMU cannot be protected, and what to do.
pub(crate) fn prepare(symbols: &Symbols, version: Option<&Version>) -> Result<&'static Glue, String> {
    if symbols::has_control_flow_integrity() {
        return Err(
            "this QEMU was built with control-flow integrity, which would abort at a replaced callback: \
                    use a build without it"
                .to_owned(),
        );
    }
    let version = version.ok_or_else(|| {
        format!(
            "cannot tell the version of this QEMU: set {VERSION_VARIABLE}, such as 10.0.2, if you know it"
        )
    })?;
    let known = || format!("known are {}; a newer qemu-cdp may know this one", Layout::known());
    let layout = Layout::for_version(version)
        .ok_or_else(|| format!("QEMU {} is not known here: {}", version.text, known()))?;
    let maps = maps::Maps::load().map_err(|error| format!("cannot read /proc/self/maps: {error}"))?;
    verify::verify(layout, symbols, &maps).map_err(|what| {
        format!("QEMU {} does not have the layout of {} ({what}): {}", version.text, layout.family, known())
    })?;
    Ok(GLUE.get_or_init(|| Glue { symbols: *symbols, layout }))
}

/// The version to go by: the one that the process tells, or the operator.
pub(crate) fn find_version(symbols: &Symbols) -> Option<Version> {
    match std::env::var(VERSION_VARIABLE) {
        Ok(text) => Version::parse(&text),
        Err(_) => Version::of_process(symbols),
    }
}
