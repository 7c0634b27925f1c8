//! `maps` and the VmFlags of `smaps`.

use super::{ParseError, bad};

/// One mapping of an address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared, not private.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// The file's device, as the kernel prints it (`08:01`).
    pub device: (u32, u32),
    /// The file's inode; 0 without a file.
    pub inode: u64,
    /// The file's path, `[heap]` and its like, or empty; raw bytes with the kernel's escapes undone.
    pub name: Vec<u8>,
}

/// The two-letter flags of proc(5)'s `VmFlags`.
pub type VmFlags = Vec<[u8; 2]>;

impl Mapping {
    /// Its size in bytes.
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is backed by a file (or by shared memory, which is one).
    pub fn has_file(&self) -> bool {
        self.inode != 0
    }
}

/// Parses a whole `maps`.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, ParseError> {
    text.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(parse_line)
        .collect()
}

/// Parses a whole `smaps`, keeping the mappings and their VmFlags.
pub fn parse_with_flags(text: &[u8]) -> Result<Vec<(Mapping, VmFlags)>, ParseError> {
    let mut all: Vec<(Mapping, VmFlags)> = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        if line[0].is_ascii_uppercase() {
            if let Some(flags) = line.strip_prefix(b"VmFlags:")
                && let Some((_, last)) = all.last_mut()
            {
                last.extend(flags.split(|b| *b == b' ').filter_map(|f| <[u8; 2]>::try_from(f).ok()));
            }
        } else {
            all.push((parse_line(line)?, Vec::new()));
        }
    }
    Ok(all)
}

fn parse_line(line: &[u8]) -> Result<Mapping, ParseError> {
    parse_fields(line).ok_or_else(|| bad("maps", &String::from_utf8_lossy(line)))
}

fn parse_fields(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = |separator: u8| {
        let at = rest.iter().position(|b| *b == separator).unwrap_or(rest.len());
        let (field, after) = rest.split_at(at);
        rest = after.get(1..).unwrap_or_default();
        field
    };
    let start = hex(field(b'-'))?;
    let end = hex(field(b' '))?;
    let permissions: [u8; 4] = field(b' ').try_into().ok()?;
    let offset = hex(field(b' '))?;
    let major = hex(field(b':'))? as u32;
    let minor = hex(field(b' '))? as u32;
    let inode = std::str::from_utf8(field(b' ')).ok()?.parse().ok()?;
    let name = rest.iter().position(|b| *b != b' ').map_or(&[][..], |at| &rest[at..]);
    (start < end).then(|| Mapping {
        start,
        end,
        read: permissions[0] == b'r',
        write: permissions[1] == b'w',
        execute: permissions[2] == b'x',
        shared: permissions[3] == b's',
        offset,
        device: (major, minor),
        inode,
        name: unescape(name),
    })
}

fn hex(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The kernel writes a newline in a path as `\012` and nothing else (seq_file's mangle_path with "\n").
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.windows(4).position(|w| w == b"\\012") {
        plain.extend_from_slice(&rest[..at]);
        plain.push(b'\n');
        rest = &rest[at + 4..];
    }
    plain.extend_from_slice(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind() {
        let text = b"\
55d0a0000000-55d0a0002000 r--p 00000000 fe:00 1234                       /usr/bin/a b\n\
7ffd1000-7ffd3000 rw-p 00000000 00:00 0                          [stack]\n\
7f0000000000-7f0000001000 ---s 00001000 00:01 99\n";
        let maps = parse(text).unwrap();
        assert_eq!(maps[0].name, b"/usr/bin/a b");
        assert_eq!(maps[0].device, (0xfe, 0));
        assert_eq!(maps[1].name, b"[stack]");
        assert!(!maps[1].has_file());
        assert!(maps[2].shared && maps[2].has_file() && !maps[2].read && maps[2].name.is_empty());
    }

    #[test]
    fn flags_follow_their_mapping() {
        let text = b"\
1000-2000 rw-p 00000000 00:00 0 \nRss: 4 kB\nVmFlags: rd wr mr mw me ac sd \n\
3000-4000 r--p 00000000 00:00 0 \nVmFlags: rd mr dd\n";
        let all = parse_with_flags(text).unwrap();
        assert!(all[0].1.contains(b"ac"));
        assert_eq!(all[1].1, vec![*b"rd", *b"mr", *b"dd"]);
    }

    #[test]
    fn nonsense_is_named() {
        assert!(parse(b"what\n").unwrap_err().to_string().contains("what"));
        assert!(parse(b"2000-1000 rw-p 0 00:00 0\n").is_err());
    }

    #[test]
    fn own_maps_parse() {
        let maps = parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        assert!(maps.iter().any(|m| m.name == b"[vdso]"));
        let smaps = parse_with_flags(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(smaps.iter().all(|(_, flags)| !flags.is_empty()));
    }
}
