//! The bpf(2) calls that are made once a program is loaded: tables, and what holds a program to a device.
//!
//! Owns the system call and its forms. Refuses to know what is in a table. Invariant: a table's sizes are asked of the
//! kernel when its descriptor is taken, so no call reads or writes beyond the bytes it is given.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_LOOKUP: u32 = 1;
const MAP_UPDATE: u32 = 2;
const MAP_DELETE: u32 = 3;
const MAP_NEXT_KEY: u32 = 4;
const PROGRAM_LOAD: u32 = 5;
const OBJECT_INFO: u32 = 15;
const LINK_CREATE: u32 = 28;

const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;
/// In front of whatever else is attached.
const BEFORE: u32 = 1 << 3;

/// BPF_MAP_TYPE_PERCPU_HASH and its kin: a value for each processor.
const PER_CPU: [u32; 3] = [5, 6, 10];

/// More keys than any table of ours has.
const MAX_STEPS: usize = 1 << 21;

/// A table that programs and processes share.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key: usize,
    /// Of all processors, where each has its own.
    value: usize,
}

#[repr(C)]
struct Element {
    fd: u32,
    pad: u32,
    key: u64,
    value_or_next: u64,
    flags: u64,
}

impl Map {
    /// Takes the descriptor of a table.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Map> {
        // The beginning of bpf_map_info: type, id, key_size, value_size, max_entries, map_flags.
        let mut info = [0u32; 6];
        #[repr(C)]
        struct Info {
            fd: u32,
            length: u32,
            info: u64,
        }
        let mut attr = Info {
            fd: fd.as_raw_fd() as u32,
            length: size_of_val(&info) as u32,
            info: info.as_mut_ptr() as u64,
        };
        // SAFETY: the kernel writes at most `length` bytes to `info`, which lives until after the call.
        unsafe { call(OBJECT_INFO, &mut attr) }?;
        let (kind, key, value) = (info[0], info[2] as usize, info[3] as usize);
        let value = if PER_CPU.contains(&kind) {
            value.next_multiple_of(8) * possible_processors()?
        } else {
            value
        };
        Ok(Map { fd, key, value })
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        assert_eq!(key.len(), self.key, "a key of another table");
        let mut value = vec![0u8; self.value];
        let mut attr = self.element(key, value.as_mut_ptr() as u64, 0);
        // SAFETY: the kernel reads a key and writes a value of the sizes it has told for this table.
        match unsafe { call(MAP_LOOKUP, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sets the value of a key.
    pub fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        assert_eq!((key.len(), value.len()), (self.key, self.value), "of another table");
        let mut attr = self.element(key, value.as_ptr() as u64, 0);
        // SAFETY: the kernel reads a key and a value of the sizes it has told for this table.
        unsafe { call(MAP_UPDATE, &mut attr) }.map(drop)
    }

    /// Removes a key. `false`: it was not there.
    pub fn remove(&self, key: &[u8]) -> io::Result<bool> {
        assert_eq!(key.len(), self.key, "a key of another table");
        let mut attr = self.element(key, 0, 0);
        // SAFETY: the kernel reads a key of the size it has told for this table.
        match unsafe { call(MAP_DELETE, &mut attr) } {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// All keys. Those that come or go meanwhile may be among them or not; none is told twice.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys = std::collections::BTreeSet::new();
        let mut last: Option<Vec<u8>> = None;
        // A key that was removed meanwhile makes the kernel begin anew: not for ever.
        for _ in 0..MAX_STEPS {
            let mut next = vec![0u8; self.key];
            let mut attr = self.element(&[], next.as_mut_ptr() as u64, 0);
            attr.key = last.as_ref().map_or(0, |k| k.as_ptr() as u64);
            // SAFETY: the kernel reads a key (or none) and writes one, of the size it has told for this table.
            match unsafe { call(MAP_NEXT_KEY, &mut attr) } {
                Ok(_) => {
                    keys.insert(next.clone());
                    last = Some(next);
                }
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(keys.into_iter().collect())
    }

    fn element(&self, key: &[u8], value_or_next: u64, flags: u64) -> Element {
        Element {
            fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value_or_next,
            flags,
        }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One instruction, as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// The destination's number, and above it the source's.
    pub registers: u8,
    /// How far.
    pub offset: i16,
    /// With what.
    pub immediate: i32,
}

/// Loads a program that sees packets (BPF_PROG_TYPE_SCHED_CLS), under the licence that the kernel's own functions ask for.
pub fn load_classifier(name: &str, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    const CLASSIFIER: u32 = 3;
    const MAX_NAME: usize = 15;
    #[repr(C)]
    struct Program {
        kind: u32,
        count: u32,
        instructions: u64,
        licence: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut log = Vec::new();
    let mut try_to = |log_bytes: usize| {
        log.resize(log_bytes, 0u8);
        let mut attr = Program {
            kind: CLASSIFIER,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            licence: c"GPL".as_ptr() as u64,
            log_level: u32::from(log_bytes > 0),
            log_bytes: log_bytes as u32,
            log: if log_bytes > 0 { log.as_mut_ptr() as u64 } else { 0 },
            kernel: 0,
            flags: 0,
            name: [0; 16],
        };
        let length = name.len().min(MAX_NAME);
        attr.name[..length].copy_from_slice(&name.as_bytes()[..length]);
        // SAFETY: the kernel reads as many instructions as are said and a string that ends, and writes at most as many bytes of
        // the log as are said; all of it outlives the call. The answer is a descriptor of nobody's but ours.
        unsafe { call(PROGRAM_LOAD, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
    };
    match try_to(0) {
        Ok(program) => Ok(program),
        Err(error) => {
            // Once more, to hear why. If the log has no room for all of it, the first error is the one that counts.
            let _ = try_to(256 << 10);
            let text = String::from_utf8_lossy(&log);
            let text = text.trim_end_matches(['\0', '\n']);
            let end: Vec<&str> = text.lines().rev().take(3).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            Err(io::Error::new(error.kind(), format!("{error}: {}", end.join("; "))))
        }
    }
}

/// Which packets of a device a program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Those that come in by it.
    Ingress,
    /// Those that go out by it.
    Egress,
}

/// Has a program see the packets of a device of the calling thread's network namespace, before all others there, until
/// the last copy of the descriptor that is returned is closed, or the device goes.
pub fn attach(program: BorrowedFd<'_>, device: u32, side: Side) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Link {
        program: u32,
        device: u32,
        kind: u32,
        flags: u32,
        relative: u32,
        pad: u32,
        revision: u64,
    }
    let mut attr = Link {
        program: program.as_raw_fd() as u32,
        device,
        kind: match side {
            Side::Ingress => TCX_INGRESS,
            Side::Egress => TCX_EGRESS,
        },
        flags: BEFORE,
        relative: 0,
        pad: 0,
        revision: 0,
    };
    // SAFETY: the structure has no pointers; the answer is a descriptor of nobody's but ours.
    unsafe { call(LINK_CREATE, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd as i32)) }
}

/// SAFETY: what `attr` points to must be as large as the command makes the kernel read or write it.
unsafe fn call<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the kernel reads `size` bytes of `attr`; for the rest the caller answers.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    Ok(crate::check(answer)?)
}

/// How many values a table has for each key that has one for each processor.
fn possible_processors() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text
        .trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|n| n.parse::<usize>().ok());
    last.map(|n| n + 1).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
