//! The daemon of a node and PID 1 of its nest.

pub mod config;
pub mod dirty;
pub mod page_server;
pub mod pager;
