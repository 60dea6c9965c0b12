//! Which QEMU this is: asked of the process itself, never of a file on disk, which may have been upgraded
//! since the process started.
//!
//! Programs with a monitor answer `qmp_query_version`. The others (`qemu-io`, `qemu-nbd`) have their version
//! only inside the text that `--version` prints, in the program's read-only data; it is taken from there, and
//! only if all such texts agree.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::symbols::Symbols;
use super::types::VersionInfo;

/// What stands before the version in the texts of `--version`: "qemu-img version 10.0.2 (Debian …",
/// "%s version …" and, in qemu-nbd, "%s 10.0.2 (Debian …".
const INTRODUCTIONS: [&[u8]; 2] = [b" version ", b"%s "];

/// Longest version text taken from the program's data, in bytes.
const MAX_TEXT_BYTES: usize = 128;

/// The version of a running QEMU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// As QEMU writes it: "10.0.2 (Debian 1:10.0.2+ds-2)".
    pub(crate) text: String,
}

impl Version {
    /// Reads "major.minor.micro", with anything behind it that does not go on as a number.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let numbers = text.split_once(|after: char| after != '.' && !after.is_ascii_digit());
        let mut parts = numbers.map_or(text, |(numbers, _)| numbers).split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        let _micro: u32 = parts.next()?.parse().ok()?;
        parts.next().is_none().then(|| Self { major, minor, text: text.to_owned() })
    }

    /// The version of this process, or `None` when it cannot be told for certain.
    pub(crate) fn of_process(symbols: &Symbols) -> Option<Self> {
        ask_monitor(symbols).or_else(|| agreed(&program_texts()))
    }
}

fn ask_monitor(symbols: &Symbols) -> Option<Version> {
    let (query, free) = (symbols.qmp_query_version?, symbols.qapi_free_VersionInfo?);
    // SAFETY: QEMU's own command; a NULL errp is allowed, and it touches nothing but its answer.
    let info = unsafe { query(std::ptr::null_mut()) };
    if info.is_null() {
        return None;
    }
    // SAFETY: a VersionInfo that QEMU has just allocated, live until it is freed below.
    let VersionInfo { qemu, package } = *unsafe { &*info };
    // SAFETY: as above; this member is never NULL.
    let triple = unsafe { &*qemu };
    let numbers = format!("{}.{}.{}", triple.major, triple.minor, triple.micro);
    let text = match c_text(package) {
        Some(package) if !package.is_empty() => format!("{numbers} ({package})"),
        _ => numbers,
    };
    // SAFETY: `info` came from QEMU's allocator, and nothing of it is used below.
    unsafe { free(info) };
    Version::parse(&text)
}

/// A C string as text.
pub(crate) fn c_text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not NULL; every caller passes a NUL-terminated string of QEMU's that outlives this call.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The one version that all texts name.
fn agreed(texts: &[String]) -> Option<Version> {
    let mut versions = texts.iter().filter_map(|text| Version::parse(text));
    let first = versions.next()?;
    versions.all(|other| (other.major, other.minor) == (first.major, first.minor)).then_some(first)
}

/// Candidate texts from the read-only data of the main program.
fn program_texts() -> Vec<String> {
    let mut found = Vec::new();
    for segment in read_only_segments() {
        for introduction in INTRODUCTIONS {
            collect_texts(segment, introduction, &mut found);
        }
    }
    found
}

fn collect_texts(data: &[u8], introduction: &[u8], found: &mut Vec<String>) {
    let mut rest = data;
    while let Some(at) = rest.windows(introduction.len()).position(|window| window == introduction) {
        rest = &rest[at + introduction.len()..];
        if rest.first().is_some_and(u8::is_ascii_digit) {
            let text = &rest[..rest.len().min(MAX_TEXT_BYTES)];
            let end = text.iter().position(|&byte| byte == 0 || byte == b'\n').unwrap_or(0);
            // A version ends in its last number or in the bracket of its package.
            if let Ok(text) = std::str::from_utf8(&text[..end])
                && (text.ends_with(')') || text.ends_with(|last: char| last.is_ascii_digit()))
            {
                found.push(text.to_owned());
            }
        }
    }
}

/// The main program's segments that are mapped readable, and neither writable nor executable.
fn read_only_segments() -> Vec<&'static [u8]> {
    let mut segments: Vec<&'static [u8]> = Vec::new();
    // SAFETY: the callback matches the declared type and takes `data` for what it is: the vector above, which
    // outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(main_program), (&raw mut segments).cast()) };
    segments
}

/// Visits the first object, which is the main program, and stops.
unsafe extern "C" fn main_program(info: *mut libc::dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
    // SAFETY: `data` is the vector that `read_only_segments` passed, borrowed by nobody else.
    let segments = unsafe { &mut *data.cast::<Vec<&'static [u8]>>() };
    // SAFETY: the dynamic linker passes a valid description.
    let info = unsafe { &*info };
    // SAFETY: its header table has that many entries and stays mapped with the program.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    for header in headers {
        if header.p_type == libc::PT_LOAD && header.p_flags == libc::PF_R {
            let start = (info.dlpi_addr + header.p_vaddr) as *const u8;
            // SAFETY: the segment is mapped readable for as long as the program runs, and never written.
            segments.push(unsafe { std::slice::from_raw_parts(start, header.p_filesz as usize) });
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_with_and_without_a_package() {
        let with = Version::parse("10.0.2 (Debian 1:10.0.2+ds-2)").unwrap();
        assert_eq!((with.major, with.minor), (10, 0));
        let without = Version::parse("7.2.22").unwrap();
        assert_eq!((without.major, without.minor), (7, 2));
    }

    #[test]
    fn what_is_not_three_numbers_is_no_version() {
        for text in ["", "10", "10.0", "10.0.2.1", "10..2", "x.0.2", "99999999999.0.1"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn texts_of_version_output_are_found_in_program_data() {
        let data = b"\0qemu-img version 10.0.2 (Debian 1:10.0)\nusage\0%s 10.0.2 (Debian 1:10.0)\n\0TLS version %d\0";
        let mut found = Vec::new();
        for introduction in INTRODUCTIONS {
            collect_texts(data, introduction, &mut found);
        }
        assert_eq!(found, ["10.0.2 (Debian 1:10.0)", "10.0.2 (Debian 1:10.0)"]);
    }

    #[test]
    fn texts_that_disagree_tell_no_version() {
        assert_eq!(agreed(&["10.0.2".to_owned(), "11.1.3".to_owned()]), None);
        assert!(agreed(&["10.0.2".to_owned(), "10.0.2 (x)".to_owned()]).is_some());
    }
}
