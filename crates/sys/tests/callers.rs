//! Connections that nobody has accepted go from the queue of one listening socket into another's, and their peers do not notice.

mod networks;

use dunlin_sys::socket::callers::{Caller, Porter};
use dunlin_sys::socket::tcp;
use networks::{INSIDE, Networks, address, index_of};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;

/// Accepts all that wait, and captures them; they are closed in silence.
fn take_out(listener: &TcpListener, count: usize) -> Vec<Caller> {
    let mut all = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..count {
        let (socket, from) = listener.accept().unwrap();
        tcp::enter_repair(socket.as_fd()).unwrap();
        all.push(Caller {
            from,
            to: socket.local_addr().unwrap(),
            connection: tcp::capture(socket.as_fd()).unwrap(),
            reset: false,
        });
        sockets.push(socket);
    }
    all
}

fn waiting(listener: &TcpListener) -> u32 {
    tcp::info(listener.as_fd()).unwrap().waiting
}

/// Puts them into the queue of a node's listener.
fn put_in(networks: &Networks, node: usize, listener: &TcpListener, callers: &[Caller]) {
    let porter = Porter::load().unwrap();
    let device = networks.nodes[node].within(|| index_of("eth0")) as u32;
    let _on_duty = networks.nodes[node].within(|| porter.watch(&[device]).unwrap());
    porter
        .let_in(listener.as_fd(), callers, &|packet| networks.deliver(node, packet))
        .unwrap();
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ (i / 251) as u8).collect()
}

#[test]
fn callers_change_the_queue_they_wait_in() {
    for ip in INSIDE {
        let networks = Networks::new();
        let listener = networks.nodes[0].within(|| TcpListener::bind(address(ip, 7000)).unwrap());
        let call = || {
            networks
                .client
                .within(|| TcpStream::connect(address(ip, 7000)).unwrap())
        };
        let mut clients = [call(), call(), call(), call()];
        let said = [Vec::new(), b"hello".to_vec(), pattern(50_000), b"last words".to_vec()];
        for (client, bytes) in clients.iter_mut().zip(&said) {
            client.write_all(bytes).unwrap();
        }
        clients[3].shutdown(Shutdown::Write).unwrap();
        let names = clients.each_ref().map(|client| client.local_addr().unwrap());
        // Once where it was, as if a move had failed, then elsewhere.
        let elsewhere = networks.nodes[1].within(|| TcpListener::bind(address(ip, 7000)).unwrap());
        for (from, node, to) in [(&listener, 0, &listener), (&listener, 1, &elsewhere)] {
            while waiting(from) < 4 {
                std::thread::yield_now();
            }
            networks.hold();
            let callers = take_out(from, 4);
            assert_eq!(callers.each_received(), said);
            put_in(&networks, node, to, &callers);
            assert_eq!(waiting(to), 4);
            networks.steer(node);
        }
        for (index, client) in clients.iter_mut().enumerate() {
            let (mut server, from) = elsewhere.accept().unwrap();
            assert_eq!(from, names[index]);
            let mut got = vec![0; said[index].len()];
            server.read_exact(&mut got).unwrap();
            assert!(got == said[index], "other bytes came than were sent");
            if index < 3 {
                client.write_all(b"more").unwrap();
                let mut more = [0; 4];
                server.read_exact(&mut more).unwrap();
                assert_eq!(&more, b"more");
                client.shutdown(Shutdown::Write).unwrap();
            }
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            server.write_all(&pattern(100_000)).unwrap();
            drop(server);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert!(answer == pattern(100_000), "another answer came than was sent");
        }
        for count in ["TCPTimeouts", "EstabResets", "TCPAbortOnData", "PAWSEstab"] {
            assert_eq!(networks.counted(count), 0, "{count} over {ip}");
        }
    }
}

#[test]
fn a_caller_that_has_filled_its_window_loses_nothing() {
    for ip in INSIDE {
        let networks = Networks::new();
        let listener = networks.nodes[0].within(|| TcpListener::bind(address(ip, 7000)).unwrap());
        let elsewhere = networks.nodes[1].within(|| TcpListener::bind(address(ip, 7000)).unwrap());
        let mut client = networks
            .client
            .within(|| TcpStream::connect(address(ip, 7000)).unwrap());
        let bytes = pattern(64 << 20);
        client.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(more) = client.write(&bytes[written..]) {
            written += more;
        }
        while waiting(&listener) < 1 {
            std::thread::yield_now();
        }
        networks.hold();
        let callers = take_out(&listener, 1);
        assert!(callers[0].connection.received.len() > 50_000, "its window was small");
        put_in(&networks, 1, &elsewhere, &callers);
        networks.steer(1);
        client.set_nonblocking(false).unwrap();
        let (mut server, _) = elsewhere.accept().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                client.write_all(&bytes[written..]).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
            });
            let mut got = Vec::new();
            server.read_to_end(&mut got).unwrap();
            assert!(got == bytes, "other bytes came than were sent");
        });
    }
}

trait Received {
    fn each_received(&self) -> Vec<Vec<u8>>;
}

impl Received for Vec<Caller> {
    fn each_received(&self) -> Vec<Vec<u8>> {
        self.iter().map(|caller| caller.connection.received.clone()).collect()
    }
}
