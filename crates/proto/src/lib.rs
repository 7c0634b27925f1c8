//! The bytes that pass between nodes, and between the command line and a daemon.
//!
//! Owns the message types and their framing. Refuses to know sockets, files, processes or time: it turns values
//! into bytes and back, over `std::io` traits. Invariants: every message has a bound ([`frame::MAX_FRAME_BYTES`]);
//! whatever arrives is parsed and never trusted; [`PROTOCOL`] is raised by every change that an older peer would
//! misread.

mod bytes;
pub mod control;
pub mod endpoint;
pub mod frame;
pub mod ids;
pub mod image;
pub mod pages;
pub mod peer;
pub mod relocation;
pub mod stream;

/// The version both ends must share; sent in every [`peer::Hello`].
pub const PROTOCOL: u32 = 1;
