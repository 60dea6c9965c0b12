//! What is mapped where in this process, from `/proc/self/maps`: used before anything is changed, to tell
//! QEMU's code from anything else and to know that a driver table may be written.

use std::io;

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mapping {
    start: usize,
    end: usize,
    readable: bool,
    writable: bool,
    code: bool,
}

/// All mappings at one moment. Read again whenever a module may have been loaded since.
#[derive(Debug)]
pub(crate) struct Maps(Vec<Mapping>);

impl Maps {
    /// The mappings of this process now.
    ///
    /// # Errors
    /// When `/proc` is not there or not readable.
    pub(crate) fn load() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/maps")?))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Mapping::parse).collect())
    }

    fn of(&self, address: usize, length: usize) -> Option<&Mapping> {
        let end = address.checked_add(length)?;
        self.0.iter().find(|mapping| mapping.start <= address && end <= mapping.end)
    }

    /// Whether the address is code of a program or library (mapped from a file, not writable).
    pub(crate) fn is_code(&self, address: usize) -> bool {
        self.of(address, 1).is_some_and(|mapping| mapping.code)
    }

    /// Whether all of the range can be read. It may cross from one mapping into the next: a heap is several in a process
    /// that has forked.
    pub(crate) fn is_readable(&self, address: usize, length: usize) -> bool {
        let Some(end) = address.checked_add(length) else { return false };
        let mut known = address;
        while known < end {
            match self.of(known, 1) {
                Some(mapping) if mapping.readable => known = mapping.end,
                _ => return false,
            }
        }
        true
    }

    /// Whether all of the range can be read and written.
    pub(crate) fn is_writable(&self, address: usize, length: usize) -> bool {
        self.of(address, length).is_some_and(|mapping| mapping.readable && mapping.writable)
    }
}

impl Mapping {
    /// `start-end perms offset device inode path`
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?.as_bytes();
        let path = fields.nth(3).unwrap_or("");
        let has = |permission: u8| permissions.contains(&permission);
        Some(Self {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            readable: has(b'r'),
            writable: has(b'w'),
            code: has(b'x') && !has(b'w') && path.starts_with('/'),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
1000-2000 r-xp 00000000 08:01 12 /usr/bin/qemu-io
2000-3000 r--p 00001000 08:01 12 /usr/bin/qemu-io
3000-5000 rw-p 00002000 08:01 12 /usr/bin/qemu-io
6000-7000 rwxp 00000000 00:00 0
7000-8000 r-xp 00000000 00:00 0 [vdso]
";

    #[test]
    fn code_is_what_is_mapped_executable_from_a_file() {
        let maps = Maps::parse(TEXT);
        assert!(maps.is_code(0x1000) && maps.is_code(0x1fff));
        for address in [0xfff, 0x2000, 0x3000, 0x6000, 0x7000, 0x9000] {
            assert!(!maps.is_code(address), "{address:#x}");
        }
    }

    #[test]
    fn a_range_is_writable_only_if_all_of_it_is() {
        let maps = Maps::parse(TEXT);
        assert!(maps.is_writable(0x3000, 0x2000));
        assert!(!maps.is_writable(0x4ff9, 8) && !maps.is_writable(0x2ff8, 16));
        assert!(!maps.is_writable(usize::MAX - 3, 8));
    }

    #[test]
    fn a_range_is_readable_if_all_of_its_mappings_are() {
        let maps = Maps::parse(TEXT);
        assert!(maps.is_readable(0x1ff8, 0x3000) && maps.is_readable(0x4000, 0x1000));
        assert!(!maps.is_readable(0x4000, 0x1001) && !maps.is_readable(0xff8, 16));
        assert!(!maps.is_readable(usize::MAX - 3, 8));
    }

    #[test]
    fn this_function_is_code_and_this_variable_is_not() {
        let maps = Maps::load().unwrap();
        let variable = 0_u64;
        assert!(maps.is_code(Maps::load as *const () as usize));
        assert!(!maps.is_code((&raw const variable) as usize));
        assert!(maps.is_writable((&raw const variable) as usize, 8));
    }
}
