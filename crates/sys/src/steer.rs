//! The programs at the edge of a nest (bpf/steer.bpf.c), and the tables that tell them where packets go.
//!
//! Owns the forms of the tables (bpf/steer.h says the same). Refuses to know nodes: there are *hops*, by number, and how to
//! reach them. Invariants: programs and tables live as long as a descriptor of theirs, or a device they are attached to;
//! a table is changed one whole entry at a time.

use crate::bpf::Map;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Raised by every change of the tables' forms, or of what a program makes of them: what an older build left running is
/// not taken up, but replaced.
pub const LAYOUT: u32 = 2;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer.bpf.o"));

/// Of the one element of its table.
const CONFIG_KEY: [u8; 4] = [0; 4];

/// No hop.
pub const NOWHERE: u16 = 0xffff;

const PROGRAMS: [&str; 6] = [
    "nest_egress",
    "nest_out",
    "link_in",
    "tunnel_in",
    "outside_in",
    "park_in",
];
const TABLES: [&str; 8] = [
    "config_of",
    "hops",
    "stations",
    "flows",
    "learned",
    "ports",
    "fragments",
    "counters",
];

/// The programs, loaded.
#[derive(Debug)]
pub struct Programs {
    /// For what leaves the nest by its own device: what is for the same nest turns back.
    pub nest_egress: OwnedFd,
    /// For what comes in by the host's end of that device: everything else.
    pub nest_out: OwnedFd,
    /// For what comes in by the link between the nodes.
    pub link_in: OwnedFd,
    /// For what comes in by a tunnel device.
    pub tunnel_in: OwnedFd,
    /// For what comes in by a gateway's device to the world.
    pub outside_in: OwnedFd,
    /// For what comes in by the device where held packets wait.
    pub park_in: OwnedFd,
}

impl Programs {
    /// Their descriptors, in an order that [`Programs::from_fds`] knows.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let all = [
            &self.nest_egress,
            &self.nest_out,
            &self.link_in,
            &self.tunnel_in,
            &self.outside_in,
            &self.park_in,
        ];
        all.into_iter().map(AsFd::as_fd).collect()
    }

    /// How many there are.
    pub const COUNT: usize = PROGRAMS.len();

    /// Takes the descriptors that [`Programs::fds`] gave.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Option<Programs> {
        let [nest_egress, nest_out, link_in, tunnel_in, outside_in, park_in] = fds.try_into().ok()?;
        Some(Programs {
            nest_egress,
            nest_out,
            link_in,
            tunnel_in,
            outside_in,
            park_in,
        })
    }
}

/// The tables that all programs of one edge share.
#[derive(Debug)]
pub struct Tables {
    config: Map,
    hops: Map,
    stations: Map,
    flows: Map,
    learned: Map,
    ports: Map,
    fragments: Map,
    counters: Map,
    /// The programs have been told that there are flows; before, they do not ask for them.
    flows_told: AtomicBool,
}

/// Loads the programs, with empty tables of their own.
pub fn load() -> io::Result<(Programs, Tables)> {
    let failed = |e: &dyn std::error::Error| {
        let mut why = e.to_string();
        let mut cause = e.source();
        while let Some(e) = cause {
            why = format!("{why}: {e}");
            cause = e.source();
        }
        io::Error::other(why)
    };
    let mut object = aya::EbpfLoader::new().load(OBJECT).map_err(|e| failed(&e))?;
    let mut programs = Vec::new();
    for name in PROGRAMS {
        let program = object.program_mut(name).expect("the object has it");
        let program: &mut aya::programs::SchedClassifier = program.try_into().map_err(|e| failed(&e))?;
        program.load().map_err(|e| failed(&e))?;
        let fd = program.fd().map_err(|e| failed(&e))?;
        programs.push(fd.as_fd().try_clone_to_owned()?);
    }
    let mut tables = Vec::new();
    for name in TABLES {
        let map = object.map(name).expect("the object has it");
        tables.push(map_fd(map)?);
    }
    let programs = Programs::from_fds(programs).expect("one for each name");
    Ok((programs, Tables::from_fds(tables)?))
}

fn map_fd(map: &aya::maps::Map) -> io::Result<OwnedFd> {
    use aya::maps::Map::{Array, HashMap, LruHashMap, PerCpuArray};
    let (Array(data) | HashMap(data) | LruHashMap(data) | PerCpuArray(data)) = map else {
        return Err(io::Error::other("a table of an unknown kind"));
    };
    data.fd().as_fd().try_clone_to_owned()
}

/// What the programs must know of their surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The addresses of all nests.
    pub inside: (Ipv4Addr, Ipv6Addr),
    /// Those that the world knows; none without.
    pub outside: (Option<Ipv4Addr>, Option<Ipv6Addr>),
    /// The node's own on the link: not for anybody outside.
    pub underlay: IpAddr,
    /// The host's end of the nest's device.
    pub nest_if: u32,
    /// The nest's end.
    pub inner_if: u32,
    /// Where held packets wait.
    pub park_if: u32,
    /// A gateway's device to the world; 0: this is none.
    pub outside_if: u32,
    /// Where tunnels end; 0: there are none.
    pub tunnel_if: u32,
    /// The hop that is this edge itself.
    pub own: u16,
    /// The gateway's, or [`NOWHERE`].
    pub gateway: u16,
    /// The ports from this one on are sliced…
    pub slice_first: u16,
    /// …in slices of so many…
    pub slice_width: u16,
    /// …so many times.
    pub slices: u16,
}

/// How to reach a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// A neighbour on a link.
    Neighbour {
        /// Its address there.
        mac: [u8; 6],
        /// Ours.
        own_mac: [u8; 6],
        /// Our device.
        device: u32,
    },
    /// At the other end of a tunnel.
    Tunnel {
        /// Its address.
        address: Ipv4Addr,
        /// The device's own address, which is that of all of them.
        mac: [u8; 6],
        /// The device.
        device: u32,
    },
}

/// A protocol and port of the inside address, for everybody or for one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// The protocol's number.
    pub proto: u8,
    /// IPv6.
    pub six: bool,
    /// The port.
    pub port: u16,
    /// The peer, of the same family.
    pub peer: Option<SocketAddr>,
}

/// What a table says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Who has it.
    pub hop: u16,
    /// Its packets wait.
    pub hold: bool,
    /// What has been seen of its end; see [`Entry::is_closed`].
    pub seen: u8,
    /// Whatever the daemon means by it.
    pub epoch: u64,
    /// So many packets.
    pub packets: u64,
    /// So many bytes.
    pub bytes: u64,
    /// When the last one came, on CLOCK_MONOTONIC; zero: never.
    pub used: Duration,
}

impl Entry {
    /// Both ends of the connection have said that they are done, or one has reset it.
    pub fn is_closed(&self) -> bool {
        self.seen & 3 == 3 || self.seen & 4 != 0
    }
}

/// How many packets came to nothing, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Their source was not theirs.
    pub spoofed: u64,
    /// From outside, to something that has no entry.
    pub closed: u64,
    /// There is no way to where they were to go.
    pub unreachable: u64,
    /// Fragments whose first one was not seen.
    pub fragment: u64,
    /// They went round.
    pub looped: u64,
    /// They could not be rewritten.
    pub odd: u64,
    /// Not lost: they were made to wait.
    pub held: u64,
    /// Sent by no hop that is known.
    pub stranger: u64,
}

impl Tables {
    /// Their descriptors, in an order that [`Tables::from_fds`] knows.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let all = [
            &self.config,
            &self.hops,
            &self.stations,
            &self.flows,
            &self.learned,
            &self.ports,
            &self.fragments,
            &self.counters,
        ];
        all.into_iter().map(AsFd::as_fd).collect()
    }

    /// How many there are.
    pub const COUNT: usize = TABLES.len();

    /// Takes the descriptors that [`Tables::fds`] gave.
    pub fn from_fds(fds: Vec<OwnedFd>) -> io::Result<Tables> {
        let maps = fds.into_iter().map(Map::from_fd).collect::<io::Result<Vec<Map>>>()?;
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidData);
        let [config, hops, stations, flows, learned, ports, fragments, counters]: [Map; 8] =
            maps.try_into().map_err(wrong)?;
        Ok(Tables {
            config,
            hops,
            stations,
            flows,
            learned,
            ports,
            fragments,
            counters,
            flows_told: AtomicBool::new(false),
        })
    }

    /// Tells the programs their surroundings.
    pub fn configure(&self, config: &Config) -> io::Result<()> {
        let mut value = Vec::new();
        value.extend(address(config.inside.0.into()));
        value.extend(address(config.inside.1.into()));
        value.extend(config.outside.0.map_or([0; 16], |a| address(a.into())));
        value.extend(config.outside.1.map_or([0; 16], |a| address(a.into())));
        value.extend(address(config.underlay));
        let devices = [
            config.nest_if,
            config.inner_if,
            config.park_if,
            config.outside_if,
            config.tunnel_if,
        ];
        value.extend(devices.iter().flat_map(|d| d.to_ne_bytes()));
        let numbers = [
            config.own,
            config.gateway,
            config.slice_first,
            config.slice_width,
            config.slices,
        ];
        value.extend(numbers.iter().flat_map(|n| n.to_ne_bytes()));
        let flows = !self.flows.keys()?.is_empty();
        value.extend(u16::from(flows).to_ne_bytes());
        self.config.set(&CONFIG_KEY, &value)?;
        self.flows_told.store(flows, Ordering::Relaxed);
        Ok(())
    }

    /// Has the programs ask for flows from now on.
    fn tell_flows(&self) -> io::Result<()> {
        if !self.flows_told.load(Ordering::Relaxed) {
            let mut value = self.config.get(&CONFIG_KEY)?.ok_or(io::ErrorKind::NotFound)?;
            let at = value.len() - 2;
            value[at..].copy_from_slice(&1u16.to_ne_bytes());
            self.config.set(&CONFIG_KEY, &value)?;
            self.flows_told.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Says how a hop is reached, and whose packets are believed to be its.
    pub fn set_hop(&self, number: u16, hop: &Hop) -> io::Result<()> {
        let (mac, own_mac, device, tunnel, station) = match *hop {
            Hop::Neighbour { mac, own_mac, device } => (mac, own_mac, device, 0, mac),
            Hop::Tunnel { address, mac, device } => {
                let host = u32::from(address);
                let mut station = [0xff; 6];
                station[2..].copy_from_slice(&host.to_ne_bytes());
                (mac, mac, device, host, station)
            }
        };
        let key = u32::from(number).to_ne_bytes();
        let value = [&mac[..], &own_mac, &device.to_ne_bytes(), &tunnel.to_ne_bytes()].concat();
        self.stations.set(&[&station[..], &[0, 0]].concat(), &key)?;
        self.hops.set(&key, &value)
    }

    /// What is said of a name by whoever writes the tables.
    pub fn get(&self, name: &Name) -> io::Result<Option<Entry>> {
        let (table, key) = self.placed(name);
        Ok(table.get(&key)?.as_deref().and_then(Entry::parse))
    }

    /// Says it. Of a connection, what was learned is forgotten.
    pub fn set(&self, name: &Name, entry: &Entry) -> io::Result<()> {
        let (table, key) = self.placed(name);
        if name.peer.is_some() {
            self.tell_flows()?;
        }
        table.set(&key, &entry.bytes())?;
        self.unlearn(name)
    }

    /// The same of a connection that something is said of already: nothing of it can have been learned.
    pub fn change(&self, name: &Name, entry: &Entry) -> io::Result<()> {
        let (table, key) = self.placed(name);
        table.set(&key, &entry.bytes())
    }

    /// Says nothing of it any more. `false`: nothing was said.
    pub fn remove(&self, name: &Name) -> io::Result<bool> {
        let (table, key) = self.placed(name);
        table.remove(&key)
    }

    /// Forgets what was learned of a connection.
    pub fn unlearn(&self, name: &Name) -> io::Result<()> {
        match name.peer {
            Some(peer) => self.learned.remove(&flow_key(name, peer)).map(drop),
            None => Ok(()),
        }
    }

    /// Everything that is said.
    pub fn entries(&self) -> io::Result<Vec<(Name, Entry)>> {
        let mut all = list(&self.ports, parse_port)?;
        all.extend(list(&self.flows, parse_flow)?);
        Ok(all)
    }

    /// Everything that was learned.
    pub fn learned(&self) -> io::Result<Vec<(Name, Entry)>> {
        list(&self.learned, parse_flow)
    }

    /// What has come to nothing.
    pub fn counters(&self) -> io::Result<Counters> {
        let count = |which: u32| -> io::Result<u64> {
            let values = self.counters.get(&which.to_ne_bytes())?.unwrap_or_default();
            let each = values.chunks_exact(8).map(|c| u64_at(c, 0));
            Ok(each.sum())
        };
        Ok(Counters {
            spoofed: count(0)?,
            closed: count(1)?,
            unreachable: count(2)?,
            fragment: count(3)?,
            looped: count(4)?,
            odd: count(5)?,
            held: count(6)?,
            stranger: count(7)?,
        })
    }

    fn placed(&self, name: &Name) -> (&Map, Vec<u8>) {
        match name.peer {
            Some(peer) => (&self.flows, flow_key(name, peer)),
            None => (&self.ports, port_key(name)),
        }
    }
}

fn list(table: &Map, parse: impl Fn(&[u8]) -> Option<Name>) -> io::Result<Vec<(Name, Entry)>> {
    let mut all = Vec::new();
    for key in table.keys()? {
        // Removed meanwhile: then it is not there.
        let entry = table.get(&key)?.as_deref().and_then(Entry::parse);
        all.extend(parse(&key).zip(entry));
    }
    Ok(all)
}

impl Entry {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(40);
        bytes.extend(self.hop.to_ne_bytes());
        bytes.extend([u8::from(self.hold), self.seen, 0, 0, 0, 0]);
        let used = self.used.as_nanos() as u64;
        bytes.extend(
            [self.epoch, self.packets, self.bytes, used]
                .iter()
                .flat_map(|n| n.to_ne_bytes()),
        );
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Entry> {
        (bytes.len() == 40).then(|| Entry {
            hop: u16::from_ne_bytes([bytes[0], bytes[1]]),
            hold: bytes[2] != 0,
            seen: bytes[3],
            epoch: u64_at(bytes, 8),
            packets: u64_at(bytes, 16),
            bytes: u64_at(bytes, 24),
            used: Duration::from_nanos(u64_at(bytes, 32)),
        })
    }
}

/// As the programs have addresses: IPv4 in the first four of sixteen bytes.
fn address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            bytes
        }
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn family(six: bool) -> u8 {
    if six { 6 } else { 4 }
}

fn port_key(name: &Name) -> Vec<u8> {
    let port = name.port.to_be_bytes();
    vec![name.proto, family(name.six), port[0], port[1]]
}

fn parse_port(key: &[u8]) -> Option<Name> {
    (key.len() == 4).then(|| Name {
        proto: key[0],
        six: key[1] == 6,
        port: u16::from_be_bytes([key[2], key[3]]),
        peer: None,
    })
}

fn flow_key(name: &Name, peer: SocketAddr) -> Vec<u8> {
    let mut key = port_key(name);
    key.extend(peer.port().to_be_bytes());
    key.extend([0, 0]);
    key.extend(address(peer.ip()));
    key
}

fn parse_flow(key: &[u8]) -> Option<Name> {
    let port = parse_port(key.get(..4)?)?;
    let bytes: [u8; 16] = key.get(8..24)?.try_into().ok()?;
    let peer = match port.six {
        true => IpAddr::V6(Ipv6Addr::from(bytes)),
        false => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
    };
    let peer = SocketAddr::new(peer, u16::from_be_bytes([key[4], key[5]]));
    Some(Name {
        peer: Some(peer),
        ..port
    })
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
