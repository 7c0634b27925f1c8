//! The supplementary groups of the process at the other end of a unix socket, as of its `connect`.
//!
//! Owns the one call that rustix does not have. Refuses to know what they permit. Reading `/proc/PID/status` instead
//! would trust that the PID still is the caller's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `SO_PEERGROUPS`.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    const MAX_GROUPS: usize = 65536;
    let mut groups = vec![0u32; 64];
    loop {
        let mut bytes = (groups.len() * 4) as libc::socklen_t;
        // SAFETY: the buffer is as long as `bytes` says, and the kernel writes at most that much.
        let r = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut bytes,
            )
        };
        if r == 0 {
            groups.truncate(bytes as usize / 4);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= MAX_GROUPS {
            return Err(error);
        }
        groups.resize(MAX_GROUPS, 0);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ones_own_groups_are_seen_through_a_socket() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut seen = super::peer_groups(&a).unwrap();
        let mut own: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .iter()
            .map(|g| g.as_raw())
            .collect();
        seen.sort();
        own.sort();
        assert_eq!(seen, own);
    }
}
