//! Connections go from one network namespace to another that has the same address, and their peer does not notice.

mod networks;

use dunlin_sys::socket::options::{self, SocketOption};
use dunlin_sys::socket::tcp::{self, Connection, Finish, State};
use dunlin_sys::socket::{self, What};
use networks::{INSIDE, Networks, address};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

/// A connection between a program at the first node and the client.
struct Pair {
    networks: Networks,
    server: TcpStream,
    client: TcpStream,
}

fn pair(ip: &str) -> Pair {
    pair_with(ip, |_| {})
}

fn pair_with(ip: &str, adjust: impl FnOnce(&Networks)) -> Pair {
    let networks = Networks::new();
    adjust(&networks);
    let listener = networks.nodes[0].within(|| TcpListener::bind(address(ip, 7000)).unwrap());
    let client = networks
        .client
        .within(|| TcpStream::connect(address(ip, 7000)).unwrap());
    let (server, _) = listener.accept().unwrap();
    Pair {
        networks,
        server,
        client,
    }
}

/// What travels, read at the source, which stays in repair.
struct Captured {
    what: What,
    options: Vec<SocketOption>,
    connection: Connection,
    finish: Finish,
    ends: (SocketAddr, SocketAddr),
}

fn capture(networks: &Networks, server: &TcpStream) -> Captured {
    networks.hold();
    let fd = server.as_fd();
    let what = socket::what(fd).unwrap();
    let options = options::read(fd, what, true);
    let ends = (server.local_addr().unwrap(), server.peer_addr().unwrap());
    let buffers = tcp::buffers(fd).unwrap();
    tcp::enter_repair(fd).unwrap();
    Captured {
        what,
        connection: tcp::capture(fd).unwrap(),
        finish: Finish {
            buffers,
            options: options.clone(),
        },
        options,
        ends,
    }
}

fn rebuild(networks: &Networks, captured: &Captured) -> OwnedFd {
    let (local, remote) = captured.ends;
    networks.nodes[1].within(|| {
        let fd = socket::make(captured.what).unwrap();
        options::set_early(fd.as_fd(), &captured.options).unwrap();
        tcp::prepare(fd.as_fd(), local).unwrap();
        tcp::rebuild(fd.as_fd(), local, remote, &captured.connection, &|packet| {
            networks.deliver(1, packet)
        })
        .unwrap();
        fd
    })
}

/// The whole way. What is given in is closed in silence.
fn carry(networks: &Networks, server: TcpStream) -> TcpStream {
    let captured = capture(networks, &server);
    let copy = rebuild(networks, &captured);
    drop(server);
    networks.steer(1);
    tcp::finish(copy.as_fd(), &captured.finish).unwrap();
    TcpStream::from(copy)
}

fn says(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    hears(to, bytes);
}

fn hears(to: &mut TcpStream, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    to.read_exact(&mut got).unwrap();
    assert!(got == bytes, "other bytes came than were sent");
}

fn hears_the_end(to: &mut TcpStream) {
    assert_eq!(to.read(&mut [0]).unwrap(), 0, "more came");
}

fn state(of: &TcpStream) -> State {
    tcp::info(of.as_fd()).unwrap().state
}

/// Waits until a socket has come to a state: the packet that brings it there is under way.
fn reaches(of: &TcpStream, wanted: State) {
    let began = std::time::Instant::now();
    while state(of) != wanted {
        assert!(began.elapsed().as_secs() < 10, "{:?} and not {wanted:?}", state(of));
        std::thread::yield_now();
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ (i / 251) as u8).collect()
}

#[test]
fn a_connection_goes_on_with_all_that_was_queued() {
    for ip in INSIDE {
        let Pair {
            networks,
            mut server,
            mut client,
        } = pair(ip);
        says(&mut client, &mut server, b"hello");
        says(&mut server, &mut client, b"welcome");
        client.write_all(b"unread").unwrap();
        server.peek(&mut [0; 6]).unwrap();
        let mut server = carry(&networks, server);
        hears(&mut server, b"unread");
        says(&mut server, &mut client, b"from elsewhere");
        says(&mut client, &mut server, b"to elsewhere");
        drop(client);
        hears_the_end(&mut server);
        for count in ["TCPTimeouts", "EstabResets", "TCPAbortOnData", "PAWSEstab"] {
            assert_eq!(networks.counted(count), 0, "{count} over {ip}");
        }
    }
}

#[test]
fn a_full_sending_queue_arrives_whole() {
    for ip in INSIDE {
        let Pair {
            networks,
            mut server,
            mut client,
        } = pair(ip);
        // The client does not read: first its window is full, then the queue.
        server.set_nonblocking(true).unwrap();
        let bytes = pattern(64 << 20);
        let mut written = 0;
        while let Ok(more) = server.write(&bytes[written..]) {
            written += more;
        }
        let captured = capture(&networks, &server);
        assert!(captured.connection.unsent > 0, "nothing waits for the window");
        let copy = rebuild(&networks, &captured);
        drop(server);
        networks.steer(1);
        tcp::finish(copy.as_fd(), &captured.finish).unwrap();
        let mut server = TcpStream::from(copy);
        server.set_nonblocking(false).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                server.write_all(&bytes[written..]).unwrap();
                server.shutdown(Shutdown::Write).unwrap();
            });
            hears(&mut client, &bytes);
            hears_the_end(&mut client);
        });
    }
}

#[test]
fn what_was_sent_and_lost_is_sent_again() {
    let Pair {
        networks,
        mut server,
        mut client,
    } = pair(INSIDE[0]);
    says(&mut server, &mut client, b"before");
    // Nothing of this arrives.
    networks.nodes[0].ip("link set eth0 arp off address 02:00:00:00:00:02");
    networks.client.ip("link set c0 down");
    let bytes = pattern(9000);
    server.write_all(&bytes).unwrap();
    let mut server = carry(&networks, server);
    hears(&mut client, &bytes);
    says(&mut client, &mut server, b"after");
}

#[test]
fn each_half_closed_state_is_what_it_was() {
    for ip in INSIDE {
        // Ours is closed, and the client knows.
        let Pair {
            networks,
            server,
            mut client,
        } = pair(ip);
        server.shutdown(Shutdown::Write).unwrap();
        hears_the_end(&mut client);
        reaches(&server, State::FinWait2);
        let mut server = carry(&networks, server);
        assert_eq!(state(&server), State::FinWait2);
        says(&mut client, &mut server, b"one way");
        drop(client);
        hears_the_end(&mut server);
        reaches(&server, State::Closed);

        // The client's is closed.
        let Pair {
            networks,
            server,
            mut client,
        } = pair(ip);
        client.write_all(b"last words").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        reaches(&server, State::CloseWait);
        let mut server = carry(&networks, server);
        assert_eq!(state(&server), State::CloseWait);
        hears(&mut server, b"last words");
        hears_the_end(&mut server);
        says(&mut server, &mut client, b"the other way");
        drop(server);
        hears_the_end(&mut client);
        assert_eq!(networks.counted("EstabResets"), 0);
    }
}

#[test]
fn a_farewell_that_was_not_heard_is_said_again() {
    for ip in INSIDE {
        for client_first in [false, true] {
            let Pair {
                networks,
                mut server,
                mut client,
            } = pair(ip);
            if client_first {
                client.shutdown(Shutdown::Write).unwrap();
                reaches(&server, State::CloseWait);
            }
            networks.nodes[0].ip("link set eth0 address 02:00:00:00:00:02");
            networks.client.ip("link set c0 down");
            server.write_all(b"unheard").unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            let was = if client_first { State::LastAck } else { State::FinWait1 };
            assert_eq!(state(&server), was);
            let server = carry(&networks, server);
            hears(&mut client, b"unheard");
            hears_the_end(&mut client);
            if client_first {
                reaches(&server, State::Closed);
            } else {
                reaches(&server, State::FinWait2);
            }
        }
    }
}

#[test]
fn a_farewell_behind_a_full_queue_comes_after_it() {
    let Pair {
        networks,
        mut server,
        mut client,
    } = pair(INSIDE[0]);
    server.set_nonblocking(true).unwrap();
    let bytes = pattern(64 << 20);
    let mut written = 0;
    while let Ok(more) = server.write(&bytes[written..]) {
        written += more;
    }
    server.shutdown(Shutdown::Write).unwrap();
    let captured = capture(&networks, &server);
    assert!(captured.connection.fin_unsent);
    let copy = rebuild(&networks, &captured);
    drop(server);
    networks.steer(1);
    tcp::finish(copy.as_fd(), &captured.finish).unwrap();
    hears(&mut client, &bytes[..written]);
    hears_the_end(&mut client);
}

#[test]
fn options_and_buffers_travel() {
    let Pair { networks, server, .. } = pair(INSIDE[1]);
    let fd = server.as_fd();
    server.set_nodelay(true).unwrap();
    let set = |level: i32, name: i32, value: &[u8]| SocketOption {
        level,
        name,
        value: value.to_vec(),
    };
    let timeout = [3u64.to_ne_bytes(), 500u64.to_ne_bytes()].concat();
    let linger = [1u32.to_ne_bytes(), 7u32.to_ne_bytes()].concat();
    let word = |word: u32| word.to_ne_bytes();
    // SO_KEEPALIVE, SO_LINGER, SO_RCVTIMEO, TCP_KEEPIDLE, TCP_CONGESTION, TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT, IPV6_TCLASS.
    let options = [
        set(1, 9, &word(1)),
        set(1, 13, &linger),
        set(1, 66, &timeout),
        set(6, 13, b"reno\0\0\0\0\0\0\0\0\0\0\0\0"),
        set(6, 4, &word(77)),
        set(6, 18, &word(12345)),
        set(6, 25, &word(16384)),
        set(41, 67, &word(0x20)),
    ];
    options::set_early(fd, &options).unwrap();
    tcp::set_buffers(
        fd,
        tcp::Buffers {
            send: 100_000,
            receive: 60_000,
            locked: 3,
        },
    )
    .unwrap();
    let what = socket::what(fd).unwrap();
    let (before, buffers) = (options::read(fd, what, true), tcp::buffers(fd).unwrap());
    let server = carry(&networks, server);
    assert_eq!(options::read(server.as_fd(), what, true), before);
    assert_eq!(tcp::buffers(server.as_fd()).unwrap(), buffers);
    let foreign = set(1, 26, &[0; 16]);
    assert!(
        options::set_early(server.as_fd(), &[foreign]).is_err(),
        "a filter was set"
    );
}

#[test]
fn one_that_is_not_carried_after_all_goes_on() {
    let Pair {
        networks,
        mut server,
        mut client,
    } = pair(INSIDE[0]);
    let captured = capture(&networks, &server);
    let copy = rebuild(&networks, &captured);
    assert!(tcp::in_repair(copy.as_fd()).unwrap());
    // In repair it closes in silence.
    drop(copy);
    networks.steer(0);
    tcp::leave_repair(server.as_fd(), true, Some(captured.connection.window)).unwrap();
    assert!(tcp::reuses_address(server.as_fd()).unwrap());
    says(&mut server, &mut client, b"still here");
    says(&mut client, &mut server, b"so am I");
    // A daemon that was killed has left no word of the window.
    tcp::enter_repair(server.as_fd()).unwrap();
    tcp::capture(server.as_fd()).unwrap();
    tcp::leave_repair(server.as_fd(), true, None).unwrap();
    let bytes = pattern(200_000);
    std::thread::scope(|scope| {
        scope.spawn(|| server.write_all(&bytes).unwrap());
        hears(&mut client, &bytes);
    });
}

#[test]
fn one_that_stopped_reading_is_deaf_there_too() {
    let Pair {
        networks,
        server,
        mut client,
    } = pair(INSIDE[0]);
    server.shutdown(Shutdown::Read).unwrap();
    let mut server = carry(&networks, server);
    hears_the_end(&mut server);
    says(&mut server, &mut client, b"it speaks");
}

#[test]
fn an_opening_is_begun_again() {
    let networks = Networks::new();
    let target = address(networks::CLIENT[0], 7001);
    networks.nodes[0].ip("link set eth0 address 02:00:00:00:00:02");
    let opening = networks.nodes[0].within(|| {
        let what = What {
            family: socket::FAMILY_V4,
            kind: socket::STREAM,
            protocol: socket::TCP,
        };
        let fd = socket::make(what).unwrap();
        rustix::net::bind(&fd, &address(INSIDE[0], 7002)).unwrap();
        rustix::io::ioctl_fionbio(&fd, true).unwrap();
        assert_eq!(rustix::net::connect(&fd, &target), Err(rustix::io::Errno::INPROGRESS));
        TcpStream::from(fd)
    });
    assert_eq!(state(&opening), State::SynSent);
    let fd = opening.as_fd();
    let what = socket::what(fd).unwrap();
    let options = options::read(fd, what, true);
    let finish = Finish {
        buffers: tcp::buffers(fd).unwrap(),
        options: options.clone(),
    };
    tcp::enter_repair(fd).unwrap();
    let first = tcp::first_sequence(fd).unwrap();
    networks.steer(1);
    let listener = networks.client.within(|| TcpListener::bind(target).unwrap());
    let copy = networks.nodes[1].within(|| {
        let copy = socket::make(what).unwrap();
        tcp::prepare(copy.as_fd(), address(INSIDE[0], 7002)).unwrap();
        rustix::io::ioctl_fionbio(&copy, true).unwrap();
        tcp::connect_again(copy.as_fd(), target, first, &finish).unwrap();
        TcpStream::from(copy)
    });
    drop(opening);
    let (mut there, _) = listener.accept().unwrap();
    copy.set_nonblocking(false).unwrap();
    let mut copy = copy;
    says(&mut there, &mut copy, b"come in");
    says(&mut copy, &mut there, b"thank you");
}
