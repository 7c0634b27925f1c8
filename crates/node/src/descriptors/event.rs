//! Event counters. See eventfd(2).

use super::{Found, Look};
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::procfs::special;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use std::io;
use std::os::fd::OwnedFd;

pub(crate) fn look(look: &Look<'_>) -> Found {
    let (count, semaphore) = special::event(&look.glimpse.steady)?;
    Ok(Ok(DescriptionKind::Event { count, semaphore }))
}

pub(crate) fn make(count: u64, semaphore: bool, flags: OFlags) -> io::Result<OwnedFd> {
    let mut how = EventfdFlags::CLOEXEC;
    how.set(EventfdFlags::SEMAPHORE, semaphore);
    how.set(EventfdFlags::NONBLOCK, flags.contains(OFlags::NONBLOCK));
    let fd = eventfd(0, how)?;
    raise(&fd, count)?;
    Ok(fd)
}

/// Makes a counter that has `from` have `to`.
pub(crate) fn change(fd: &OwnedFd, from: u64, to: u64) -> io::Result<()> {
    if to < from {
        // A semaphore would give one at a time.
        let flags = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
        let mut word = [0; 8];
        while rustix::io::read(fd, &mut word).is_ok() {}
        rustix::fs::fcntl_setfl(fd, flags)?;
        return raise(fd, to);
    }
    raise(fd, to - from)
}

fn raise(fd: &OwnedFd, by: u64) -> io::Result<()> {
    if by > 0 {
        rustix::io::write(fd, &by.to_le_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_goes_up_and_down() {
        for semaphore in [false, true] {
            let fd = make(5, semaphore, OFlags::empty()).unwrap();
            for (from, to) in [(5, 9), (9, 2), (2, 0), (0, 1)] {
                change(&fd, from, to).unwrap();
                let own = dunlin_sys::procfs::ProcDir::own();
                let text = own.text(&format!("fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
                assert_eq!(special::event(&text.unwrap()).unwrap(), (to, semaphore));
            }
        }
    }
}
