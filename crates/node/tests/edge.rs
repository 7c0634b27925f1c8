//! Two edges on this machine's kernel, in network namespaces: what is steered, held and handed over, packet by packet.

use dunlin_node::config::NodeConfig;
use dunlin_node::edge::{Edge, Shelf};
use dunlin_proto::endpoint::{Endpoint, Family, Proto};
use dunlin_proto::ids::{MoveId, Slot};
use dunlin_sys::links;
use dunlin_sys::namespace::{in_network, new_network};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const INSIDE: &str = "10.9.9.9";
const INSIDE6: &str = "fd09::9";
const OUTSIDE: &str = "192.0.2.1";
const OUTSIDE6: &str = "2001:db8::1";
const PATIENCE: Duration = Duration::from_secs(20);

type Kept = BTreeMap<String, (Vec<OwnedFd>, Vec<u8>)>;

/// What a nest's init keeps.
#[derive(Clone, Default)]
struct Drawer(Arc<Mutex<Kept>>);

impl Shelf for Drawer {
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], blob: Vec<u8>) -> io::Result<()> {
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<io::Result<_>>()?;
        self.0.lock().unwrap().insert(label.into(), (fds, blob));
        Ok(())
    }

    fn keep_soon(&self, label: &str, blob: Vec<u8>) -> io::Result<()> {
        self.keep(label, &[], blob)
    }

    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        let kept = self.0.lock().unwrap();
        let Some((fds, blob)) = kept.get(label) else {
            return Ok(None);
        };
        let fds = fds.iter().map(|fd| fd.try_clone()).collect::<io::Result<_>>()?;
        Ok(Some((fds, blob.clone())))
    }

    fn forget_soon(&self, label: &str) -> io::Result<()> {
        self.0.lock().unwrap().remove(label);
        Ok(())
    }

    fn accept(&self, _: &str, _: BorrowedFd<'_>, _: Vec<u8>) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        Ok(None)
    }

    fn labels(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }
}

/// A machine with its nest.
struct Machine {
    slot: Slot,
    host: OwnedFd,
    nest: OwnedFd,
    shelf: Drawer,
    edge: Edge,
}

/// Two machines, the first of which is the gateway, and a host outside.
struct Rig {
    machines: [Machine; 2],
    outside: OwnedFd,
}

fn ip(namespace: &OwnedFd, lines: &[String]) {
    in_network(namespace.as_fd(), || {
        for line in lines {
            let output = Command::new("ip").args(line.split(' ')).output()?;
            assert!(output.status.success(), "ip {line}: {output:?}");
        }
        Ok(())
    })
    .unwrap();
}

fn path(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}

fn config(slot: u16, tunnel: bool) -> NodeConfig {
    let other = 3 - slot;
    let text = format!(
        "cluster = \"rig-{}\"\nname = \"n{slot}\"\nslot = {slot}\nmodulus = 4\nlisten = \"10.1.0.{slot}:7117\"\n\
         state_dir = \"/nowhere\"\n[network]\ninside = \"{INSIDE}\"\ninside6 = \"{INSIDE6}\"\ngateway = \"n1\"\n\
         outside = \"{OUTSIDE}\"\noutside6 = \"{OUTSIDE6}\"\noutside_device = \"out0\"\ntunnel = {tunnel}\n\
         [[peer]]\nname = \"n{other}\"\nslot = {other}\naddress = \"10.1.0.{other}:7117\"\n",
        std::process::id()
    );
    NodeConfig::parse(&text).unwrap()
}

impl Rig {
    /// On one link.
    fn new() -> Rig {
        Rig::joined(false)
    }

    fn joined(tunnel: bool) -> Rig {
        // On one processor, or packets overtake each other between two of them, as they may on any network.
        let mut one = rustix::thread::CpuSet::new();
        one.set(0);
        rustix::thread::sched_setaffinity(None, &one).unwrap();
        let hosts = [new_network().unwrap(), new_network().unwrap()];
        let outside = new_network().unwrap();
        let link = format!(
            "link add name link0 type veth peer name link0 netns {}",
            path(&hosts[1])
        );
        let out = format!("link add name out0 type veth peer name eth0 netns {}", path(&outside));
        ip(&hosts[0], &[link, out]);
        for (host, slot) in hosts.iter().zip(1..) {
            let address = format!("addr add 10.1.0.{slot}/24 dev link0");
            ip(host, &[address, "link set lo up".into(), "link set link0 up".into()]);
        }
        let ends = [(&hosts[0], "out0", 1), (&outside, "eth0", 2)];
        for (host, device, number) in ends {
            let four = format!("addr add 192.0.2.{number}/24 dev {device}");
            let six = format!("addr add 2001:db8::{number}/64 dev {device} nodad");
            ip(host, &[four, six, format!("link set {device} up")]);
        }
        for (host, device) in [
            (&hosts[0], "link0"),
            (&hosts[1], "link0"),
            (&hosts[0], "out0"),
            (&outside, "eth0"),
        ] {
            until("the links run", || {
                let devices = in_network(host.as_fd(), links::devices).unwrap();
                devices.iter().any(|d| d.name == device && d.is_running)
            });
        }
        let machine = |(host, slot): (OwnedFd, u16)| {
            let (nest, shelf) = (new_network().unwrap(), Drawer::default());
            let edge = open(&host, &nest, &shelf, config(slot, tunnel));
            Machine {
                slot: Slot(slot),
                host,
                nest,
                shelf,
                edge,
            }
        };
        let [one, two] = hosts;
        let machines = [machine((one, 1)), machine((two, 2))];
        for (this, other) in [(0, 1), (1, 0)] {
            let station = machines[other].edge.station().unwrap();
            machines[this].edge.neighbour(machines[other].slot, station).unwrap();
        }
        Rig { machines, outside }
    }

    /// Both edges know who has this port.
    fn assign(&self, endpoint: Endpoint, to: Slot, epoch: u64) {
        for machine in &self.machines {
            assert!(machine.edge.assign(endpoint, to, epoch).unwrap());
        }
    }
}

fn open(host: &OwnedFd, nest: &OwnedFd, shelf: &Drawer, config: NodeConfig) -> Edge {
    in_network(host.as_fd(), || {
        Edge::join(&config, nest.as_fd(), Box::new(shelf.clone())).map_err(io::Error::other)
    })
    .unwrap()
}

fn udp(namespace: &OwnedFd, address: &str) -> UdpSocket {
    let socket = in_network(namespace.as_fd(), || UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn tcp(namespace: &OwnedFd, address: &str) -> TcpListener {
    in_network(namespace.as_fd(), || TcpListener::bind(address)).unwrap()
}

fn dial(namespace: &OwnedFd, address: &str) -> TcpStream {
    let address: SocketAddr = address.parse().unwrap();
    let stream = in_network(namespace.as_fd(), || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// Nothing is in the socket's queue.
fn is_quiet(socket: &UdpSocket) -> bool {
    socket.set_nonblocking(true).unwrap();
    let quiet = matches!(socket.recv(&mut [0; 9]), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
    socket.set_nonblocking(false).unwrap();
    quiet
}

fn take_numbers(socket: &UdpSocket, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let mut bytes = [0; 4];
        socket
            .recv(&mut bytes)
            .unwrap_or_else(|e| panic!("number {number}: {e}"));
        assert_eq!(u32::from_ne_bytes(bytes), number);
    }
}

fn port(proto: Proto, port: u16) -> Endpoint {
    Endpoint::port(proto, Family::V4, port)
}

fn by(nonce: u64) -> MoveId {
    MoveId { source: Slot(2), nonce }
}

#[test]
fn what_is_held_comes_later_and_in_order() {
    held_and_released(&Rig::new());
}

#[test]
fn what_is_held_comes_later_through_a_tunnel_too() {
    held_and_released(&Rig::joined(true));
}

fn held_and_released(rig: &Rig) {
    let [one, two] = &rig.machines;
    let server = udp(&two.nest, "0.0.0.0:5000");
    rig.assign(port(Proto::Udp, 5000), two.slot, 1);
    // From another nest, from outside, and from the same nest.
    let senders = [
        (udp(&one.nest, "0.0.0.0:0"), INSIDE),
        (udp(&rig.outside, "0.0.0.0:0"), OUTSIDE),
        (udp(&two.nest, "0.0.0.0:0"), INSIDE),
    ];
    for (nonce, (sender, address)) in senders.iter().enumerate() {
        sender.connect((*address, 5000)).unwrap();
        let send = |numbers: std::ops::Range<u32>| {
            for number in numbers {
                sender.send(&number.to_ne_bytes()).unwrap();
            }
        };
        send(0..10);
        take_numbers(&server, 0..10);
        let before = two.edge.counters().unwrap().held;
        let hold = two.edge.hold(by(nonce as u64), &[port(Proto::Udp, 5000)]).unwrap();
        send(10..110);
        until("all are held", || two.edge.counters().unwrap().held == before + 100);
        assert!(is_quiet(&server));
        two.edge.release(&hold).unwrap();
        send(110..120);
        take_numbers(&server, 10..120);
        assert!(two.edge.held().unwrap().is_empty());
    }
}

#[test]
fn what_is_held_for_one_does_not_wait_for_another() {
    let rig = Rig::new();
    let [one, two] = &rig.machines;
    let servers = [udp(&two.nest, "0.0.0.0:5000"), udp(&two.nest, "0.0.0.0:5001")];
    let sender = udp(&one.nest, "0.0.0.0:0");
    let mut holds = Vec::new();
    // Two holds of one move are two as well.
    for number in [5000, 5001] {
        rig.assign(port(Proto::Udp, number), two.slot, 1);
        holds.push(two.edge.hold(by(1), &[port(Proto::Udp, number)]).unwrap());
    }
    for number in 0..50u32 {
        for port in [5000, 5001] {
            sender.send_to(&number.to_ne_bytes(), (INSIDE, port)).unwrap();
        }
    }
    until("all are held", || two.edge.counters().unwrap().held == 100);
    assert_eq!(two.edge.held().unwrap().len(), 2);
    two.edge.release(&holds[1]).unwrap();
    take_numbers(&servers[1], 0..50);
    assert!(is_quiet(&servers[0]));
    for number in 50..60u32 {
        sender.send_to(&number.to_ne_bytes(), (INSIDE, 5000)).unwrap();
    }
    until("all are held", || two.edge.counters().unwrap().held == 110);
    two.edge.release(&holds[0]).unwrap();
    take_numbers(&servers[0], 0..60);
}

#[test]
fn what_is_handed_over_goes_to_where_the_socket_is() {
    handed_over(&Rig::new());
}

#[test]
fn what_is_handed_over_goes_there_through_a_tunnel_too() {
    handed_over(&Rig::joined(true));
}

fn handed_over(rig: &Rig) {
    let [one, two] = &rig.machines;
    let endpoint = port(Proto::Udp, 5000);
    let old = udp(&two.nest, "0.0.0.0:5000");
    rig.assign(endpoint, two.slot, 1);
    let senders = [
        (udp(&two.nest, "0.0.0.0:0"), INSIDE),
        (udp(&one.nest, "0.0.0.0:0"), INSIDE),
        (udp(&rig.outside, "0.0.0.0:0"), OUTSIDE),
    ];
    let hold = two.edge.hold(by(1), &[endpoint]).unwrap();
    for (sender, address) in &senders {
        sender.connect((*address, 5000)).unwrap();
        let held = two.edge.counters().unwrap().held;
        for number in 0..20u32 {
            sender.send(&number.to_ne_bytes()).unwrap();
        }
        until("all are held", || two.edge.counters().unwrap().held == held + 20);
    }
    let new = udp(&one.nest, "0.0.0.0:5000");
    two.edge.hand_over(&hold, one.slot).unwrap();
    // They went to and fro, to a node that did not know yet, and came to an end. So the destination has to know before.
    let looped = || two.edge.counters().unwrap().looped + one.edge.counters().unwrap().looped;
    until("they have come to their end", || looped() == 60);
    assert!(is_quiet(&new));
    let hold = two.edge.hold(by(2), &[endpoint]).unwrap();
    let held = two.edge.counters().unwrap().held;
    for (sender, _) in &senders {
        for number in 0..20u32 {
            sender.send(&number.to_ne_bytes()).unwrap();
        }
    }
    until("all are held", || two.edge.counters().unwrap().held == held + 60);
    one.edge.arrive(&[endpoint]).unwrap();
    two.edge.hand_over(&hold, one.slot).unwrap();
    for _ in &senders {
        take_numbers(&new, 0..20);
    }
    // The gateway has it itself now; the old nest's own go on by the tombstone.
    for (sender, _) in &senders {
        sender.send(&7u32.to_ne_bytes()).unwrap();
        take_numbers(&new, 7..8);
    }
    assert!(is_quiet(&old));
    // Old news does not undo it.
    assert!(!two.edge.assign(endpoint, two.slot, 1).unwrap());
}

#[test]
fn a_stream_of_datagrams_loses_none_by_many_holds() {
    let rig = Rig::new();
    let [one, two] = &rig.machines;
    let endpoint = port(Proto::Udp, 5000);
    let server = udp(&two.nest, "0.0.0.0:5000");
    rig.assign(endpoint, two.slot, 1);
    let sender = udp(&one.nest, "0.0.0.0:0");
    sender.connect((INSIDE, 5000)).unwrap();
    const COUNT: u32 = 20_000;
    std::thread::scope(|scope| {
        let took = scope.spawn(|| {
            let mut seen = vec![false; COUNT as usize];
            for _ in 0..COUNT {
                let mut bytes = [0; 4];
                server.recv(&mut bytes).expect("none is lost");
                let number = u32::from_ne_bytes(bytes) as usize;
                assert!(!std::mem::replace(&mut seen[number], true), "{number} came twice");
            }
        });
        scope.spawn(|| {
            for number in 0..COUNT {
                sender.send(&number.to_ne_bytes()).unwrap();
                // Not more than the receiver's queue takes.
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        let mut nonce = 0;
        while !took.is_finished() {
            nonce += 1;
            let hold = two.edge.hold(by(nonce), &[endpoint]).unwrap();
            std::thread::yield_now();
            two.edge.release(&hold).unwrap();
        }
        assert!(nonce > 5);
    });
    assert!(two.edge.counters().unwrap().held > 0);
}

#[test]
fn an_established_connection_stays_when_its_listeners_port_goes() {
    port_goes(&Rig::new());
}

#[test]
fn an_established_connection_stays_behind_a_tunnel_too() {
    port_goes(&Rig::joined(true));
}

fn port_goes(rig: &Rig) {
    let [one, two] = &rig.machines;
    let listener = tcp(&two.nest, "0.0.0.0:5000");
    rig.assign(port(Proto::Tcp, 5000), two.slot, 1);
    let clients = [
        dial(&one.nest, &format!("{INSIDE}:5000")),
        dial(&rig.outside, &format!("{OUTSIDE}:5000")),
        dial(&two.nest, &format!("{INSIDE}:5000")),
    ];
    let mut served: Vec<TcpStream> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
    rig.assign(port(Proto::Tcp, 5000), one.slot, 2);
    let other = tcp(&one.nest, "0.0.0.0:5000");
    for mut client in &clients {
        let peer = client.local_addr().unwrap();
        let stream = served.iter_mut().find(|s| s.peer_addr().unwrap() == peer).unwrap();
        client.write_all(b"still here").unwrap();
        let mut got = [0; 10];
        stream.read_exact(&mut got).unwrap();
        stream.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"still here");
    }
    let _new = dial(&rig.outside, &format!("{OUTSIDE}:5000"));
    other.accept().unwrap();
}

#[test]
fn errors_find_the_socket_that_they_are_about() {
    let rig = Rig::new();
    let [one, two] = &rig.machines;
    for (family, address, bind) in [(Family::V4, INSIDE, "0.0.0.0:0"), (Family::V6, INSIDE6, "[::]:0")] {
        // Nobody is there, on the other node: its kernel says so.
        rig.assign(Endpoint::port(Proto::Udp, family, 5001), two.slot, 1);
        let socket = udp(&one.nest, bind);
        socket.connect((address.parse::<IpAddr>().unwrap(), 5001)).unwrap();
        socket.send(b"x").unwrap();
        let error = socket.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
    // From outside, to a server that has gone while its entry is still there; and the answer of the world to a program.
    for (family, address, bind) in [(Family::V4, OUTSIDE, "0.0.0.0:0"), (Family::V6, OUTSIDE6, "[::]:0")] {
        rig.assign(Endpoint::port(Proto::Udp, family, 5002), two.slot, 1);
        let socket = udp(&rig.outside, bind);
        socket.connect((address.parse::<IpAddr>().unwrap(), 5002)).unwrap();
        socket.send(b"x").unwrap();
        let error = socket.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
    for (address, bind) in [("192.0.2.2", "0.0.0.0:0"), ("2001:db8::2", "[::]:0")] {
        let socket = udp(&two.nest, bind);
        socket.connect((address.parse::<IpAddr>().unwrap(), 5003)).unwrap();
        socket.send(b"x").unwrap();
        let error = socket.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
}

#[test]
fn a_new_daemon_takes_up_what_is_held() {
    let mut rig = Rig::new();
    let endpoint = port(Proto::Udp, 5000);
    let server = udp(&rig.machines[1].nest, "0.0.0.0:5000");
    rig.assign(endpoint, Slot(2), 1);
    let sender = udp(&rig.machines[0].nest, "0.0.0.0:0");
    sender.connect((INSIDE, 5000)).unwrap();
    let two = &mut rig.machines[1];
    let _ = two.edge.hold(by(9), &[endpoint]).unwrap();
    sender.send(&0u32.to_ne_bytes()).unwrap();
    two.edge = Edge::none();
    sender.send(&1u32.to_ne_bytes()).unwrap();
    two.edge = open(&two.host, &two.nest, &two.shelf, config(2, false));
    until("both are held", || two.edge.counters().unwrap().held == 2);
    assert!(is_quiet(&server));
    let held = two.edge.held().unwrap();
    assert_eq!(
        (held.len(), held[0].by(), held[0].endpoints()),
        (1, by(9), &[endpoint][..])
    );
    two.edge.release(&held[0]).unwrap();
    take_numbers(&server, 0..2);
}
