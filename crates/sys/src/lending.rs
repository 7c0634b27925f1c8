//! Memory of another process that goes into a socket without being copied.
//!
//! Owns the borrower's side of a child that [lends](crate::script::Script::child_lends): its descriptor 1 is the end of a
//! socket to ask by, its descriptor 2 the end of a pipe in which the pages come. Refuses to know what the memory is.
//! Invariants: nobody writes to memory that is borrowed (what was sent may still lie in a socket, and be sent again);
//! the pipe is empty between two loans; after anything unexpected there are no more loans, and whoever wants the memory
//! has to copy it.

use crate::script::MAX_LENT;
use crate::vmcopy::Span;
use rustix::fs::FileType;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};
use rustix::pipe::{SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, splice};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// So many bytes can be borrowed at once.
pub const MAX_BYTES: usize = 1 << 20;
/// A lender that does not answer for so long is stopped, or worse.
const PATIENCE: Duration = Duration::from_millis(500);

/// A process that lends its memory.
#[derive(Debug)]
pub struct Lender {
    asking: OwnedFd,
    pipe: OwnedFd,
}

impl Lender {
    /// The lender with this PID; `None` if it lends nothing, or another borrower has asked it before: what that one did
    /// not take might still be on its way.
    pub fn of(pid: i32) -> io::Result<Option<Lender>> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let fetch = |fd| match pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::BADF) => Ok(None),
            Err(errno) => Err(errno),
        };
        let (Some(asking), Some(pipe)) = (fetch(1)?, fetch(2)?) else {
            return Ok(None);
        };
        let is_pipe = FileType::from_raw_mode(rustix::fs::fstat(&pipe)?.st_mode) == FileType::Fifo;
        let is_socket = sockopt::socket_type(&asking).is_ok_and(|kind| kind == SocketType::SEQPACKET);
        // Its size tells that somebody has been here.
        if !is_pipe || !is_socket || fcntl_getpipe_size(&pipe)? >= MAX_BYTES {
            return Ok(None);
        }
        fcntl_setpipe_size(&pipe, MAX_BYTES)?;
        sockopt::set_socket_timeout(&asking, Timeout::Recv, Some(PATIENCE))?;
        Ok(Some(Lender { asking, pipe }))
    }

    /// Borrows these ranges, all of them, at most [`MAX_BYTES`]: whole pages.
    pub fn borrow(self, spans: &[Span]) -> io::Result<Loan> {
        let bytes: usize = spans.iter().map(|span| span.len).sum();
        assert!(spans.len() <= MAX_LENT && bytes <= MAX_BYTES, "more than can be lent");
        let mut list = [0u8; MAX_LENT * 16];
        for (slot, span) in list.chunks_exact_mut(16).zip(spans) {
            slot[..8].copy_from_slice(&span.address.to_le_bytes());
            slot[8..].copy_from_slice(&(span.len as u64).to_le_bytes());
        }
        let list = &list[..spans.len() * 16];
        retry_on_intr(|| send(&self.asking, list, SendFlags::NOSIGNAL))?;
        let mut answer = [0u8; 8];
        retry_on_intr(|| recv(&self.asking, &mut answer, RecvFlags::empty()))?;
        if i64::from_le_bytes(answer) == bytes as i64 {
            Ok(Loan { lender: self, bytes })
        } else {
            Err(io::Error::other("not all of the memory could be lent"))
        }
    }
}

/// What has been borrowed and not yet sent.
#[derive(Debug)]
pub struct Loan {
    lender: Lender,
    bytes: usize,
}

impl Loan {
    /// Sends all of it; `more` follows at once. The lender comes back for the next loan.
    pub fn send(mut self, to: impl AsFd, more: bool) -> io::Result<Lender> {
        let flags = if more { SpliceFlags::MORE } else { SpliceFlags::empty() };
        while self.bytes > 0 {
            let sent = retry_on_intr(|| splice(&self.lender.pipe, None, &to, None, self.bytes, flags))?;
            if sent == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.bytes -= sent;
        }
        Ok(self.lender)
    }
}
