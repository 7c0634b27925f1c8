//! Every unsafe block and raw system call of dunlin. Knows no cluster terms and names no node.

pub mod fdpass;
pub mod namespace;
pub mod nudge;
pub mod seccomp;
pub mod sigwait;
pub mod spawn;
pub mod surrogate;
