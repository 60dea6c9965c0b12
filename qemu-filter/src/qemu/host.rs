//! What the control thread asks of this QEMU: [`Host`] over the main thread.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use journal_format::ImageTag;

use super::background::Background;
use super::symbols::Symbols;
use super::types::Coroutine;
use super::version::{Version, c_text};
use super::{Glue, attach, glue, mainloop};
use crate::control::{DiskInfo, Host, Identity};
use crate::engine::{Capture, WaitToken, WakeFn};

/// How long the main thread may take to begin what it is asked, and again to finish it.
const MAIN_THREAD_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to come back to its loop before it is taken to be waiting for requests.
const AT_REST_LIMIT: Duration = Duration::from_millis(500);
/// How long a background coroutine may take to leave.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const LEAVE_POLL: Duration = Duration::from_millis(1);

/// Name of the VM, where the process has none of its own (a storage daemon).
const NAME_VARIABLE: &str = "CDP_VM_NAME";
/// UUID of the VM, likewise.
const UUID_VARIABLE: &str = "CDP_VM_UUID";

/// This QEMU: with its glue, or the reason why there is none.
pub(crate) struct QemuHost {
    identity: Identity,
    glue: Result<&'static Glue, String>,
}

impl QemuHost {
    /// A QEMU that was accepted or refused.
    pub(crate) fn new(
        symbols: Option<&Symbols>,
        version: Option<&Version>,
        glue: Result<&'static Glue, String>,
    ) -> Self {
        let program = program_name();
        let identity = Identity {
            vm_name: vm_name(symbols, &program),
            vm_uuid: vm_uuid(symbols),
            program,
            qemu_version: version.map(|version| version.text.clone()).unwrap_or_default(),
            refused: glue.as_ref().err().cloned().unwrap_or_default(),
        };
        Self { identity, glue }
    }

    fn glue(&self) -> Result<&'static Glue, String> {
        self.glue.clone()
    }
}

impl Host for QemuHost {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn disks(&self) -> Result<Vec<DiskInfo>, String> {
        let glue = self.glue()?;
        mainloop::run(glue, MAIN_THREAD_LIMIT, move || attach::disks(glue), drop)
    }

    fn wake_fn(&self) -> WakeFn {
        wake
    }

    fn attach(&self, device: &str, capture: Arc<Capture>, image: Option<ImageTag>) -> Result<(), String> {
        let glue = self.glue()?;
        let (device, late) = (device.to_owned(), device.to_owned());
        let undo = move |answer: Result<(), String>| {
            if answer.is_ok() {
                let _gone = attach::detach(glue, &late);
            }
        };
        let attach = move || attach::attach(glue, &device, capture, image);
        mainloop::run(glue, MAIN_THREAD_LIMIT, attach, undo)?
    }

    fn must_go(&self, device: &str) -> bool {
        let Ok(glue) = self.glue() else { return true };
        let device = device.to_owned();
        // A main thread that does not answer may be waiting for the very requests that wait.
        mainloop::run_at_rest(glue, AT_REST_LIMIT, move || attach::must_go(glue, &device)).unwrap_or(true)
    }

    fn detach(&self, device: &str) -> Result<(), String> {
        let glue = self.glue()?;
        let device = device.to_owned();
        let background =
            mainloop::run(glue, MAIN_THREAD_LIMIT, move || attach::detach(glue, &device), drop)??;
        wait_until_left(&background)
    }
}

fn wait_until_left(background: &Background) -> Result<(), String> {
    let began = Instant::now();
    while !background.is_finished() {
        if began.elapsed() > LEAVE_LIMIT {
            return Err("capture is off, but a read of its resync has not come back yet".to_owned());
        }
        thread::sleep(LEAVE_POLL);
    }
    Ok(())
}

/// Wakes a request that waits for one that overlaps.
fn wake(token: WaitToken) {
    if let Some(glue) = glue() {
        // SAFETY: the coroutine that `write::begin` gave, which waits for just this.
        unsafe { (glue.symbols.aio_co_wake)(token.0 as *mut Coroutine) };
    }
}

/// The file name of this process's program.
pub(crate) fn program_name() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn vm_name(symbols: Option<&Symbols>, program: &str) -> String {
    if let Ok(name) = std::env::var(NAME_VARIABLE) {
        return name;
    }
    // SAFETY: takes nothing; NULL or a text that stays.
    let name = symbols.and_then(|symbols| c_text(unsafe { (symbols.qemu_get_vm_name)() }));
    match name {
        Some(name) if !name.is_empty() => name,
        _ => format!("{program}-{}", std::process::id()),
    }
}

fn vm_uuid(symbols: Option<&Symbols>) -> [u8; 16] {
    if let Some(uuid) = std::env::var(UUID_VARIABLE).ok().as_deref().and_then(parse_uuid) {
        return uuid;
    }
    match symbols.and_then(|symbols| symbols.qemu_uuid) {
        // SAFETY: an object of this size that QEMU has filled when it parsed its arguments.
        Some(uuid) => unsafe { *uuid.as_ptr() },
        None => [0; 16],
    }
}

/// 32 hexadecimal digits, with or without dashes.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|&digit| digit != '-')
        .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let mut uuid = [0; 16];
    if digits.len() != 2 * uuid.len() {
        return None;
    }
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::parse_uuid;

    #[test]
    fn a_uuid_is_read_with_and_without_dashes() {
        let expected = Some([
            0x12, 0x3e, 0x45, 0x67, 0xe8, 0x9b, 0x12, 0xd3, 0xa4, 0x56, 0x42, 0x66, 0x14, 0x17, 0x40, 0,
        ]);
        assert_eq!(parse_uuid("123e4567-e89b-12d3-a456-426614174000"), expected);
        assert_eq!(parse_uuid("123E4567E89B12D3A456426614174000"), expected);
    }

    #[test]
    fn what_is_not_16_bytes_is_no_uuid() {
        for text in
            ["", "123e4567", "123e4567-e89b-12d3-a456-42661417400g", "123e4567-e89b-12d3-a456-4266141740001"]
        {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }
}
