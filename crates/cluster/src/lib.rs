//! cluster

pub mod page_map;
