//! Two nodes with the same address, and a client that reaches one of them at a time.

#![allow(dead_code, reason = "each test uses its part")]

use dunlin_sys::socket::wire::Frames;
use dunlin_sys::socket::{in_network, leave_network};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

/// The address that both nodes have.
pub const INSIDE: [&str; 2] = ["10.77.0.1", "fd77::1"];
/// The client's address.
pub const CLIENT: [&str; 2] = ["10.77.1.1", "fd77:1::1"];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A network namespace, for as long as this lives.
pub struct Network(pub File);

impl Network {
    pub fn new() -> Network {
        let made = std::thread::spawn(|| {
            leave_network().unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Network(made.join().unwrap())
    }

    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_network(self.0.as_fd(), work).unwrap()
    }

    pub fn ip(&self, words: &str) {
        let output = self.within(|| Command::new("ip").args(words.split_whitespace()).output().unwrap());
        assert!(output.status.success(), "ip {words}: {output:?}");
    }

    pub fn set(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/net/{}", key.replace('.', "/"));
        self.within(|| std::fs::write(&path, value).unwrap());
    }
}

/// The whole.
pub struct Networks {
    pub client: Network,
    pub nodes: [Network; 2],
    frames: [Frames; 2],
    /// Where everything is dropped without a word.
    limbo: Network,
}

impl Networks {
    pub fn new() -> Networks {
        let (client, nodes) = (Network::new(), [Network::new(), Network::new()]);
        client.set("ipv4.conf.all.rp_filter", "0");
        client.set("ipv4.conf.default.rp_filter", "0");
        for (index, node) in nodes.iter().enumerate() {
            let there = format!("/proc/{}/fd/{}", std::process::id(), node.0.as_raw_fd());
            client.ip(&format!(
                "link add c{index} arp off address 02:00:00:00:00:01 type veth peer name eth0 arp off address 02:00:00:00:00:01 netns {there}"
            ));
            client.set(&format!("ipv4.conf.c{index}.rp_filter"), "0");
            client.ip(&format!("link set c{index} up"));
            node.set("ipv4.conf.all.rp_filter", "0");
            node.set("ipv4.conf.eth0.rp_filter", "0");
            node.ip("link set eth0 up");
            node.ip(&format!("addr add {}/32 dev eth0", INSIDE[0]));
            node.ip(&format!("addr add {}/128 dev eth0 nodad", INSIDE[1]));
            node.ip(&format!("route add default dev eth0 src {}", INSIDE[0]));
            node.ip(&format!("-6 route add default dev eth0 src {}", INSIDE[1]));
        }
        let limbo = Network::new();
        let there = format!("/proc/{}/fd/{}", std::process::id(), limbo.0.as_raw_fd());
        client.ip(&format!(
            "link add limbo arp off type veth peer name eth0 netns {there}"
        ));
        client.ip("link set limbo up");
        limbo.ip("link set eth0 up");
        client.ip(&format!("addr add {}/32 dev lo", CLIENT[0]));
        client.ip(&format!("addr add {}/128 dev lo nodad", CLIENT[1]));
        let frames = [0, 1].map(|index| {
            client.within(|| {
                let number = std::fs::read_to_string(format!("/sys/class/net/c{index}/ifindex"));
                // /sys shows the network of whoever mounted it.
                let number = number.ok().and_then(|n| n.trim().parse().ok());
                Frames::open(number.unwrap_or_else(|| index_of(&format!("c{index}")))).unwrap()
            })
        });
        let all = Networks {
            client,
            nodes,
            frames,
            limbo,
        };
        all.steer(0);
        all
    }

    /// From now on what the client sends goes to this node.
    pub fn steer(&self, node: usize) {
        self.route(&format!("c{node}"));
    }

    /// From now on what the client sends is dropped.
    pub fn hold(&self) {
        self.route("limbo");
    }

    fn route(&self, device: &str) {
        self.client.ip(&format!(
            "route replace {}/32 dev {device} src {}",
            INSIDE[0], CLIENT[0]
        ));
        self.client.ip(&format!(
            "-6 route replace {}/128 dev {device} src {}",
            INSIDE[1], CLIENT[1]
        ));
    }

    /// Delivers a packet at a node, as if it came from outside.
    pub fn deliver(&self, node: usize, packet: &[u8]) -> std::io::Result<()> {
        for piece in dunlin_sys::socket::wire::fragments(packet, 1500, 7) {
            self.frames[node].send(MAC, &piece)?;
        }
        Ok(())
    }

    /// How often something was counted in the client's network, by the name in /proc/net/netstat or snmp.
    pub fn counted(&self, name: &str) -> u64 {
        let text = self.client.within(|| {
            ["netstat", "snmp"]
                .map(|file| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap())
                .concat()
        });
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.chunks(2) {
            let (names, values) = (pair[0].split_whitespace(), pair[1].split_whitespace());
            if let Some((_, value)) = names.zip(values).find(|(n, _)| *n == name) {
                return value.parse().unwrap();
            }
        }
        panic!("nothing is counted as {name}");
    }
}

pub fn index_of(name: &str) -> i32 {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(':').next().unwrap().trim().parse().unwrap()
}

pub fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}
