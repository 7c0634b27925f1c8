//! sys

pub mod peergroups;
pub mod pidfd;
pub mod termination;
