//! Where a socket is reached: its protocol and port on the cluster's inside address, and whom it talks to.
//!
//! Owns [`Endpoint`]. Refuses to know which node has it, and what the inside address is: all nests have the same, so
//! an endpoint names a socket wherever it is. Invariants: a peer's address has the family of the endpoint, is never an
//! IPv4 address in IPv6 clothes, and has no scope.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// A transport protocol whose packets are steered by port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// The protocol's number in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
        }
    }

    /// The protocol of this number.
    pub fn from_number(number: u8) -> Option<Proto> {
        match number {
            6 => Some(Proto::Tcp),
            17 => Some(Proto::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        })
    }
}

/// Which internet protocol: a port is two endpoints, because two sockets can have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// An address's family; that of an IPv4 address in IPv6 clothes is IPv4.
    pub fn of(address: IpAddr) -> Family {
        match address.to_canonical() {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

/// A socket's place on the inside address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its protocol.
    pub proto: Proto,
    /// Of the packets that reach it.
    pub family: Family,
    /// Its port on the inside address.
    pub port: u16,
    /// Whom it talks to: a connection. `None`: everybody else (a listening socket, an unconnected one of UDP).
    peer: Option<SocketAddr>,
}

impl Endpoint {
    /// A listening socket, or one of UDP that takes datagrams from everybody. A socket of both families has two.
    pub fn port(proto: Proto, family: Family, port: u16) -> Endpoint {
        Endpoint {
            proto,
            family,
            port,
            peer: None,
        }
    }

    /// The end on this port of a connection with `peer` (the inside address itself for one within the cluster).
    pub fn flow(proto: Proto, port: u16, peer: SocketAddr) -> Endpoint {
        let address = peer.ip().to_canonical();
        Endpoint {
            proto,
            family: Family::of(address),
            port,
            peer: Some(SocketAddr::new(address, peer.port())),
        }
    }

    /// Whom it talks to.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// As it should be, if it came from elsewhere; `None` for one that no constructor makes.
    pub fn checked(self) -> Option<Endpoint> {
        match self.peer {
            None => Some(self),
            Some(peer) => (Endpoint::flow(self.proto, self.port, peer) == self).then_some(self),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let six = if self.family == Family::V6 { "6" } else { "" };
        write!(f, "{}{six} port {}", self.proto, self.port)?;
        match self.peer {
            Some(peer) => write!(f, " with {peer}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_has_one_name() {
        let plain = Endpoint::flow(Proto::Tcp, 80, "192.0.2.7:4000".parse().unwrap());
        let clothed = Endpoint::flow(Proto::Tcp, 80, "[::ffff:192.0.2.7]:4000".parse().unwrap());
        assert_eq!(plain, clothed);
        assert_eq!(plain.family, Family::V4);
        assert_eq!(plain.to_string(), "tcp port 80 with 192.0.2.7:4000");
        let scoped = "[fe80::1%3]:9".parse().unwrap();
        let flow = Endpoint::flow(Proto::Udp, 53, scoped);
        assert_eq!(flow.peer(), Some("[fe80::1]:9".parse().unwrap()));
    }

    #[test]
    fn what_no_constructor_makes_is_refused() {
        let good = Endpoint::flow(Proto::Tcp, 80, "192.0.2.7:4000".parse().unwrap());
        assert_eq!(good.checked(), Some(good));
        let odd = Endpoint {
            family: Family::V6,
            ..good
        };
        assert_eq!(odd.checked(), None);
    }
}
