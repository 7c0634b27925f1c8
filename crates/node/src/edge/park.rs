//! Where held packets wait, and how they go on.
//!
//! Owns the device's far end and the order of what is read from it. Refuses to know where packets go: each is written
//! back as it was read, and the program on the device steers it. Invariant: the packets of one endpoint go on in the order
//! in which they came; those of a hold that is not being ended stay, in front of what comes.

use dunlin_sys::steer::Name;
use dunlin_sys::tap::{HEADER_BYTES, MAX_PACKET_BYTES, Tap};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

/// So long a flush that is still being filled goes on before it lets everything through.
const FLUSH_WITHIN: Duration = Duration::from_millis(20);

/// The packets that wait.
#[derive(Debug)]
pub struct Park {
    tap: Tap,
    buffer: Vec<u8>,
    /// Whose packets are held, by which hold.
    held: HashMap<Name, u64>,
    last_hold: u64,
    /// Those that were read when others were let go, in order.
    kept: HashMap<u64, VecDeque<Vec<u8>>>,
    /// The first fragments among those: the later ones have no ports.
    fragments: HashMap<Fragment, Name>,
}

type Fragment = (IpAddr, u32, u8);

impl Park {
    /// With nothing held.
    pub fn new(tap: Tap) -> Park {
        Park {
            tap,
            buffer: vec![0; MAX_PACKET_BYTES],
            held: HashMap::new(),
            last_hold: 0,
            kept: HashMap::new(),
            fragments: HashMap::new(),
        }
    }

    /// The number of a new hold: at least this one, and greater than all before.
    pub fn next_hold(&mut self, least: u64) -> u64 {
        self.last_hold = least.max(self.last_hold + 1);
        self.last_hold
    }

    /// These are held from now on.
    pub fn hold(&mut self, hold: u64, names: impl IntoIterator<Item = Name>) {
        self.held.extend(names.into_iter().map(|name| (name, hold)));
    }

    /// These are held no longer: the table says so.
    pub fn end(&mut self, hold: u64) {
        self.held.retain(|_, held| *held != hold);
        if self.held.is_empty() {
            self.fragments.clear();
        }
    }

    /// Lets go what waits of one hold, and whatever nobody holds.
    pub fn flush(&mut self, hold: u64) -> io::Result<()> {
        for packet in self.kept.remove(&hold).unwrap_or_default() {
            self.pass(&packet);
        }
        let deadline = Instant::now() + FLUSH_WITHIN;
        while let Some(length) = self.tap.receive(&mut self.buffer)? {
            match self.holder() {
                Some(holder) if holder != hold => {
                    let packet = self.buffer[..length].to_vec();
                    self.kept.entry(holder).or_default().push_back(packet);
                }
                _ => self.pass(&self.buffer[..length]),
            }
            if Instant::now() > deadline {
                break;
            }
        }
        Ok(())
    }

    /// Lets go what nobody holds.
    pub fn flush_strays(&mut self) -> io::Result<()> {
        while let Some(length) = self.tap.receive(&mut self.buffer)? {
            let packet = self.buffer[..length].to_vec();
            match self.holder() {
                Some(holder) => self.kept.entry(holder).or_default().push_back(packet),
                None => self.pass(&packet),
            }
        }
        Ok(())
    }

    /// The far end, to wait for what comes.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    fn pass(&self, packet: &[u8]) {
        // What the kernel does not take is lost as on any network, and its sender sends it again.
        if let Err(e) = self.tap.send(packet) {
            tracing::debug!("a held packet of {} bytes is lost: {e}", packet.len());
        }
    }

    /// Who holds the packet in the buffer?
    fn holder(&mut self) -> Option<u64> {
        let parsed = parse(&self.buffer[HEADER_BYTES..])?;
        let flow = match parsed {
            Parsed::Later(fragment) => *self.fragments.get(&fragment)?,
            Parsed::Whole(flow, _) => flow,
        };
        let port = Name { peer: None, ..flow };
        let (name, hold) = [flow, port].iter().find_map(|n| self.held.get_key_value(n))?;
        if let Parsed::Whole(_, Some(fragment)) = parsed {
            self.fragments.insert(fragment, *name);
        }
        Some(*hold)
    }
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parsed {
    /// This end; the first of several fragments.
    Whole(Name, Option<Fragment>),
    /// A later fragment.
    Later(Fragment),
}

/// As bpf/packet.h does it: whatever is not understood here is held by nobody.
fn parse(frame: &[u8]) -> Option<Parsed> {
    match u16_at(frame, 12)? {
        0x0800 => {
            let ip = frame.get(14..)?;
            let l4 = usize::from(ip.first()? & 15) * 4;
            let (proto, fragment) = (*ip.get(9)?, u16_at(ip, 6)?);
            let id = (v4(ip, 12)?, u32::from(u16_at(ip, 4)?), proto);
            if fragment & 0x1fff != 0 {
                return Some(Parsed::Later(id));
            }
            let first = (fragment & 0x2000 != 0).then_some(id);
            let inner = |error: &[u8]| {
                let inner = error.get(8..)?;
                let l4 = usize::from(inner.first()? & 15) * 4;
                Some(reversed(false, *inner.get(9)?, v4(inner, 16)?, inner.get(l4..)?))
            };
            let name = match proto {
                1 => inner(ip.get(l4..)?)??,
                _ => direct(false, proto, v4(ip, 12)?, ip.get(l4..)?)?,
            };
            Some(Parsed::Whole(name, first))
        }
        0x86dd => {
            let ip = frame.get(14..)?;
            let (mut proto, mut at) = (*ip.get(6)?, 40);
            let mut first = None;
            let source = v6(ip, 8)?;
            for _ in 0..3 {
                let head = ip.get(at..);
                match proto {
                    44 => {
                        let head = head?;
                        let id = u32::from(u16_at(head, 4)?) << 16 | u32::from(u16_at(head, 6)?);
                        proto = *head.first()?;
                        let offset = u16_at(head, 2)?;
                        let fragment = (source, id, proto);
                        if offset & 0xfff8 != 0 {
                            return Some(Parsed::Later(fragment));
                        }
                        first = (offset & 1 != 0).then_some(fragment);
                        at += 8;
                    }
                    0 | 43 | 60 => {
                        proto = *head?.first()?;
                        at += 8 + usize::from(*head?.get(1)?) * 8;
                    }
                    _ => break,
                }
            }
            let rest = ip.get(at..)?;
            let name = match proto {
                58 => {
                    let inner = rest.get(8..)?;
                    reversed(true, *inner.get(6)?, v6(inner, 24)?, inner.get(40..)?)?
                }
                _ => direct(true, proto, source, rest)?,
            };
            Some(Parsed::Whole(name, first))
        }
        _ => None,
    }
}

/// The end that a packet from `source` is for.
fn direct(six: bool, proto: u8, source: IpAddr, l4: &[u8]) -> Option<Name> {
    name(six, proto, u16_at(l4, 2)?, SocketAddr::new(source, u16_at(l4, 0)?))
}

/// The end that has sent a packet to `target`, which an error is about.
fn reversed(six: bool, proto: u8, target: IpAddr, l4: &[u8]) -> Option<Name> {
    name(six, proto, u16_at(l4, 0)?, SocketAddr::new(target, u16_at(l4, 2)?))
}

fn name(six: bool, proto: u8, port: u16, peer: SocketAddr) -> Option<Name> {
    matches!(proto, 6 | 17).then_some(Name {
        proto,
        six,
        port,
        peer: Some(peer),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn v4(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(IpAddr::V4(Ipv4Addr::from(octets)))
}

fn v6(bytes: &[u8], at: usize) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(IpAddr::V6(Ipv6Addr::from(octets)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet frame of IPv4 with 4 bytes of ports.
    fn frame(proto: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0x12, 0x34]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, proto, 0, 0, 192, 0, 2, 7, 10, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_packet_names_its_end_and_an_error_the_end_that_it_is_about() {
        let ports = [0x12, 0x67, 0, 80];
        let Some(Parsed::Whole(name, None)) = parse(&frame(6, 0, &ports)) else {
            panic!("a whole packet");
        };
        assert_eq!((name.port, name.peer), (80, Some("192.0.2.7:4711".parse().unwrap())));
        // The answer of 192.0.2.7 to what port 80 has sent it.
        let mut sent = frame(17, 0, &[0, 80, 0x12, 0x67]).split_off(14);
        sent.swap(12, 16);
        sent[12..20].copy_from_slice(&[10, 0, 0, 1, 192, 0, 2, 7]);
        let error = frame(1, 0, &[&[3, 3, 0, 0, 0, 0, 0, 0][..], &sent].concat());
        let Some(Parsed::Whole(name, None)) = parse(&error) else {
            panic!("a whole packet");
        };
        assert_eq!((name.proto, name.port), (17, 80));
        assert_eq!(name.peer, Some("192.0.2.7:4711".parse().unwrap()));
    }

    #[test]
    fn fragments_are_told_apart_and_what_is_cut_short_is_nobodys() {
        let first = parse(&frame(17, 0x2000, &[0, 1, 0, 2])).unwrap();
        let later = parse(&frame(17, 0x2001, &[])).unwrap();
        let (Parsed::Whole(_, Some(a)), Parsed::Later(b)) = (first, later) else {
            panic!("{first:?} {later:?}");
        };
        assert_eq!(a, b);
        let whole = frame(6, 0, &[0, 1, 0, 2]);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
    }
}
