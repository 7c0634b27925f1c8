//! Bytes of a program, onto our own standard streams.
//!
//! Written to the descriptors as they come: nothing is kept back, so nothing is lost by a sudden end.

use crate::exit::{FAILED, Failed};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, write as write_some};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Is anybody there to read?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// As far as is known.
    There,
    /// Gone, and it is the first time that this is noticed.
    Gone,
}

/// Writes to standard output (1) or error (2). To a reader that went away nothing is written any more.
pub fn write(stream: u8, bytes: &[u8]) -> Result<Reader, Failed> {
    static GONE: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
    let gone = &GONE[usize::from(stream == 2)];
    if gone.load(Ordering::Relaxed) {
        return Ok(Reader::There);
    }
    let written = match stream {
        2 => write_all(io::stderr().as_fd(), bytes),
        _ => write_all(io::stdout().as_fd(), bytes),
    };
    match written {
        Ok(()) => Ok(Reader::There),
        Err(Errno::PIPE) => {
            gone.store(true, Ordering::Relaxed);
            Ok(Reader::Gone)
        }
        Err(e) => Err(Failed::new(FAILED, format!("writing to stream {stream}: {e}"))),
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match write_some(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // Whoever shares the descriptor with us has set it to not blocking.
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None)
                    .map(drop)
                    .or_else(retry)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn retry(error: Errno) -> rustix::io::Result<()> {
    if error == Errno::INTR { Ok(()) } else { Err(error) }
}
