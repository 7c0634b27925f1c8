//! Which ports of the inside address the nest has bound, as its kernel tells.
//!
//! Owns what is asked. Refuses to know who wants to know. Invariant: a datagram port that the kernel gave out by itself is left out:
//! its node is known from the number alone.

use crate::edge::{Edge, EdgeError, announce};
use dunlin_proto::endpoint::{Endpoint, Proto};
use dunlin_sys::sockdiag::{CLOSED, LISTENING};
use std::collections::BTreeSet;

/// TCP_BOUND_INACTIVE: bound, and neither listening nor connected. Not told before Linux 6.8: there, such a port is the
/// node's only for as long as its claim stands.
const BOUND: u8 = 13;

/// What is bound now.
pub fn look(edge: &Edge) -> Result<BTreeSet<Endpoint>, EdgeError> {
    announce::ports(edge, &[(Proto::Tcp, &[LISTENING, BOUND]), (Proto::Udp, &[CLOSED])])
}
