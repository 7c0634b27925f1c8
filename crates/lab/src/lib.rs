//! Whole dunlin clusters on one machine: nodes as network namespaces joined by a link, each with its own daemon.
//!
//! Owns the namespaces, links, control groups, directories and daemons of a lab, and that none of them outlives
//! [`down::down`]. Refuses to know what a daemon does: it starts `dunlin node` and asks it over its control socket.
//!
//! Invariants: everything a lab makes is found again from its *name* alone (never only from a record that a killed
//! `up` may not have written), so `down` after `kill -9` of any part leaves nothing; labs of different names share
//! nothing but the machine; the host's own network is not touched.

pub mod cgroup;
pub mod control;
pub mod down;
pub mod error;
pub mod exec;
pub mod harness;
mod harness_run;
pub mod layout;
pub mod links;
pub mod lock;
pub mod processes;
pub mod record;
pub mod status;
pub mod up;

pub use error::LabError;
pub use harness::Lab;
pub use layout::{LabName, Layout};
pub use up::Options;
