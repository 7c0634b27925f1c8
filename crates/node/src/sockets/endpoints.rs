//! By which names packets reach a socket.

use super::{is_loopback, is_tcp};
use dunlin_proto::endpoint::{Endpoint, Family, Proto};
use dunlin_proto::image::Socket;
use dunlin_sys::socket::FAMILY_V6;
use std::net::{IpAddr, SocketAddr};

/// The endpoints of a socket: none for one that only its own nest can reach.
pub fn of(socket: &Socket) -> Vec<Endpoint> {
    let proto = if is_tcp(socket) { Proto::Tcp } else { Proto::Udp };
    let Some(local) = socket
        .local
        .filter(|local| local.port() != 0 && !is_loopback(local.ip()))
    else {
        return Vec::new();
    };
    if let Some(remote) = socket.remote {
        return vec![Endpoint::flow(proto, local.port(), remote)];
    }
    if proto == Proto::Tcp && !socket.listening {
        return Vec::new();
    }
    let port = |family| Endpoint::port(proto, family, local.port());
    match local.ip() {
        IpAddr::V6(address) if address.is_unspecified() && !is_v6_only(socket) => {
            vec![port(Family::V6), port(Family::V4)]
        }
        address => vec![port(Family::of(address))],
    }
}

/// Those of connections that nobody has accepted yet: whose they are, and to which address.
pub fn of_callers(all: impl Iterator<Item = (SocketAddr, SocketAddr)>) -> Vec<Endpoint> {
    all.map(|(from, to)| Endpoint::flow(Proto::Tcp, to.port(), from))
        .collect()
}

fn is_v6_only(socket: &Socket) -> bool {
    const IPPROTO_IPV6: i32 = 41;
    const IPV6_V6ONLY: i32 = 26;
    let mut options = socket.options.iter();
    let only = options.find(|option| option.level == IPPROTO_IPV6 && option.name == IPV6_V6ONLY);
    socket.family == FAMILY_V6 && only.is_some_and(|option| option.value.iter().any(|byte| *byte != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::image::SocketOption;
    use dunlin_sys::socket::{DATAGRAM, FAMILY_V4, STREAM};

    fn socket(kind: i32, local: &str) -> Socket {
        let local: std::net::SocketAddr = local.parse().unwrap();
        Socket {
            family: if local.is_ipv6() { FAMILY_V6 } else { FAMILY_V4 },
            kind,
            protocol: if kind == STREAM { 6 } else { 17 },
            owner: (0, 0),
            local: Some(local),
            remote: None,
            listening: kind == STREAM,
            options: Vec::new(),
        }
    }

    fn names(socket: &Socket) -> Vec<String> {
        of(socket).iter().map(Endpoint::to_string).collect()
    }

    #[test]
    fn a_socket_of_both_families_has_two() {
        let mut both = socket(STREAM, "[::]:80");
        assert_eq!(names(&both), ["tcp6 port 80", "tcp port 80"]);
        both.options.push(SocketOption {
            level: 41,
            name: 26,
            value: dunlin_proto::image::OptionValue::new(&[1, 0, 0, 0]).unwrap(),
        });
        assert_eq!(names(&both), ["tcp6 port 80"]);
        assert_eq!(names(&socket(DATAGRAM, "0.0.0.0:53")), ["udp port 53"]);
    }

    #[test]
    fn a_connection_has_its_peers_and_what_is_not_reached_has_none() {
        let mut connected = socket(STREAM, "10.0.0.1:80");
        connected.remote = Some("192.0.2.7:4000".parse().unwrap());
        assert_eq!(names(&connected), ["tcp port 80 with 192.0.2.7:4000"]);
        assert_eq!(names(&socket(STREAM, "127.0.0.1:80")), [""; 0]);
        let mut bound = socket(STREAM, "10.0.0.1:80");
        bound.listening = false;
        assert_eq!(names(&bound), [""; 0]);
    }
}
