//! The daemon of a node and PID 1 of its nest.

pub mod capture;
pub mod config;
pub mod files;
pub mod install;
pub mod obstacle;
pub mod peers;
pub mod processes;
pub mod restore;
