//! `cdpctl verify`: has the server check journals, waits, and says what it found.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use cdp_api::{Client, ClientError, Verification, VerificationState};

/// How often it asks how far a check is.
const POLL: Duration = Duration::from_millis(200);

/// Checks one disk, or all that have a journal; returns when all checks are done.
pub(crate) fn run(client: &Client, disk: Option<&str>) -> Result<Vec<Verification>, ClientError> {
    let disks = match disk {
        Some(disk) => vec![disk.to_owned()],
        None => with_journal(client)?,
    };
    // All are begun before any is waited for; the server takes them one by one.
    disks.iter().try_for_each(|disk| client.start_verification(disk).map(drop))?;
    disks.iter().map(|disk| wait(client, disk)).collect()
}

/// A disk that was never protected has nothing to check; one whose journal cannot be opened is a failure to report.
fn with_journal(client: &Client) -> Result<Vec<String>, ClientError> {
    let mut found = Vec::new();
    for disk in client.disks()? {
        if disk.fault.is_some() || client.disk(&disk.id)?.journal.is_some() {
            found.push(disk.id);
        }
    }
    Ok(found)
}

fn wait(client: &Client, disk: &str) -> Result<Verification, ClientError> {
    let terminal = std::io::stderr().is_terminal();
    loop {
        let check = client.verification(disk)?;
        if check.state == VerificationState::Done {
            if terminal {
                show("\r\u{1b}[K");
            }
            return Ok(check);
        }
        if terminal {
            let percent = check.done_bytes.saturating_mul(100).checked_div(check.total_bytes).unwrap_or(0);
            show(&format!("\r{disk}: {percent} % of {} bytes checked ", check.total_bytes));
        }
        std::thread::sleep(POLL);
    }
}

/// Progress that cannot be shown is no reason to stop.
fn show(text: &str) {
    let mut terminal = std::io::stderr().lock();
    let _ = terminal.write_all(text.as_bytes()).and_then(|()| terminal.flush());
}
