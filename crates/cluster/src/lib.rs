//! The decisions of a cluster as pure state machines: which PID is next, where a process is, who may run it.
//!
//! Owns decisions. Refuses to know sockets, file descriptors, threads, clocks and random numbers: events go in
//! together with the time, actions come out, and the caller carries them out. So one seed reproduces a whole cluster
//! with all its faults (`tests/simulation`). Invariants: no machine does I/O; every table, queue and retry has a named
//! limit; iteration order is that of the keys (`BTreeMap`), never of a hash.

pub mod allotment;
pub mod page_map;
pub mod ports;
pub mod relocation;
pub mod table;
