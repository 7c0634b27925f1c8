//! The daemon of a node and PID 1 of its nest.

pub mod capture;
pub mod config;
pub mod control;
pub mod daemon;
pub(crate) mod descriptors;
pub mod dirty;
pub mod edge;
pub mod entries;
pub mod files;
pub mod init;
pub mod install;
pub mod logs;
pub mod mover;
pub mod nest;
pub mod obstacle;
pub mod page_server;
pub mod pager;
pub mod peers;
pub mod ports;
pub mod processes;
pub mod restore;
pub mod runs;
pub mod signals;
pub mod sockets;
pub mod streams;
pub mod verify;
