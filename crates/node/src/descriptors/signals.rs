//! Descriptors from which signals are read. What is read are the signals of the process that reads, so that the mask is
//! all there is to one. See signalfd(2).

use super::{Found, Look};
use dunlin_proto::image::DescriptionKind;
use dunlin_sys::fdcalls;
use dunlin_sys::procfs::special;
use rustix::fs::OFlags;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

pub(crate) fn look(look: &Look<'_>) -> Found {
    Ok(Ok(DescriptionKind::Signals(special::signal_mask(
        &look.glimpse.steady,
    )?)))
}

pub(crate) fn make(mask: u64, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(fdcalls::signalfd(mask, flags.contains(OFlags::NONBLOCK))?)
}

/// Gives it another mask.
pub(crate) fn change(fd: &OwnedFd, mask: u64) -> io::Result<()> {
    Ok(fdcalls::set_signalfd(fd.as_fd(), mask)?)
}
