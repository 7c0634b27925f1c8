//! Bytes out of and into another process's memory.
//!
//! Owns the two ways there are: `/proc/PID/mem`, which outlives the task and goes past protections, and
//! process_vm_readv(2), which copies once instead of twice but wants a living task and readable mappings. Refuses to
//! know what the bytes are. Invariant: a read that stopped short says how far it came.

use crate::{Errno, check};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// Opens `/proc/PID/mem` for reading.
pub fn open_mem(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/mem"))
}

/// Opens `/proc/PID/mem` for reading and writing.
pub fn open_mem_writable(pid: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
}

/// Opens `/proc/PID/pagemap`.
pub fn open_pagemap(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}

/// Fills `into` from `address` on.
pub fn read(mem: &File, address: u64, into: &mut [u8]) -> io::Result<()> {
    mem.read_exact_at(into, address)
}

/// Writes `bytes` at `address`, whatever the protection of the mapping.
pub fn write(mem: &File, address: u64, bytes: &[u8]) -> io::Result<()> {
    mem.write_all_at(bytes, address)
}

/// A range of another process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: usize,
}

/// At most so many spans go into one [`gather`].
pub const MAX_SPANS: usize = 64;

/// Reads the spans one after another into `into` with one process_vm_readv, and returns how many bytes came before
/// the first that could not be read. `into` must hold them all.
pub fn gather(pid: i32, spans: &[Span], into: &mut [u8]) -> Result<usize, Errno> {
    let total: usize = spans.iter().map(|s| s.len).sum();
    assert!(spans.len() <= MAX_SPANS && total <= into.len(), "spans do not fit");
    let mut remote = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; MAX_SPANS];
    for (slot, span) in remote.iter_mut().zip(spans) {
        *slot = libc::iovec {
            iov_base: span.address as *mut libc::c_void,
            iov_len: span.len,
        };
    }
    let local = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: total,
    };
    // SAFETY: the kernel writes at most `total` bytes into `into`, which is that long; remote addresses are checked
    // by the kernel against the other process's address space.
    let read = unsafe { libc::process_vm_readv(pid, &local, 1, remote.as_ptr(), spans.len() as u64, 0) };
    check(read as i64).map(|n| n as usize)
}
