//! Datagrams that wait in a socket are seen without being taken, and arrive again as they came.

mod networks;

use dunlin_sys::socket::{udp, wire};
use networks::{CLIENT, INSIDE, Networks, address};
use std::net::UdpSocket;
use std::os::fd::AsFd;

#[test]
fn a_queue_is_seen_whole_and_arrives_again() {
    for which in [0, 1] {
        let networks = Networks::new();
        let bind = |node: usize| networks.nodes[node].within(|| UdpSocket::bind(address(INSIDE[which], 7000)).unwrap());
        let (old, new) = (bind(0), bind(1));
        let client = networks
            .client
            .within(|| UdpSocket::bind(address(CLIENT[which], 7009)).unwrap());
        let large: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        for bytes in [&b"first"[..], &large, b"last"] {
            client.send_to(bytes, address(INSIDE[which], 7000)).unwrap();
        }
        let waiting = loop {
            let waiting = udp::queue(old.as_fd(), which == 1).unwrap();
            if waiting.len() == 3 {
                break waiting;
            }
        };
        let again = udp::queue(old.as_fd(), which == 1).unwrap();
        assert!(again == waiting, "a look took something");
        for datagram in &waiting {
            let to = std::net::SocketAddr::new(datagram.to.unwrap(), 7000);
            let packet = wire::datagram(datagram.from, to, &datagram.bytes).unwrap();
            networks.deliver(1, &packet).unwrap();
        }
        let mut buffer = vec![0; 65536];
        for socket in [old, new] {
            for bytes in [&b"first"[..], &large, b"last"] {
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert!(&buffer[..length] == bytes, "other bytes came");
                assert_eq!(from, address(CLIENT[which], 7009));
            }
        }
    }
}

#[test]
fn an_empty_datagram_is_seen() {
    let networks = Networks::new();
    let socket = networks.nodes[0].within(|| UdpSocket::bind(address(INSIDE[0], 7000)).unwrap());
    let client = networks.client.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    client.send_to(b"", address(INSIDE[0], 7000)).unwrap();
    while dunlin_sys::socket::readiness(socket.as_fd()).unwrap() & 1 == 0 {}
    let waiting = udp::queue(socket.as_fd(), false).unwrap();
    assert_eq!(waiting.len(), 1);
    assert!(waiting[0].bytes.is_empty());
}
