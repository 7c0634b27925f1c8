//! Where everything of a lab is: paths, namespace names, addresses, all from its name alone.
//!
//! Owns the naming. Refuses to look at the machine, but for [`Layout::nodes_on_disk`].

use crate::error::LabError;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Every lab has its directory here.
pub const LABS_DIR: &str = "/run/dunlin/lab";
/// Where `ip netns` keeps its names.
pub const NETNS_DIR: &str = "/run/netns";
/// The port of every daemon of a lab.
pub const PORT: u16 = 7117;
/// More nodes do not fit the addressing (and no machine).
pub const MAX_NODES: u16 = 200;

/// A name that can be part of a path, a namespace's name and a host name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct LabName(String);

impl LabName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for LabName {
    fn default() -> Self {
        LabName("lab".into())
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LabName {
    type Err = LabError;

    fn from_str(name: &str) -> Result<Self, LabError> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let good =
            (1..=40).contains(&name.len()) && name.chars().all(inner) && !name.starts_with('-') && !name.ends_with('-');
        if good {
            Ok(LabName(name.into()))
        } else {
            Err(LabError::Name { name: name.into() })
        }
    }
}

/// The places of one lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The lab's name.
    pub name: LabName,
}

impl Layout {
    /// The places of the lab of this name.
    pub fn new(name: LabName) -> Layout {
        Layout { name }
    }

    /// The lab's directory.
    pub fn dir(&self) -> PathBuf {
        Path::new(LABS_DIR).join(self.name.as_str())
    }

    /// Held while the lab is made or taken down. Beside the directory, which comes and goes under it.
    pub fn lock(&self) -> PathBuf {
        Path::new(LABS_DIR).join(format!("{}.lock", self.name))
    }

    /// A node's state directory.
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.dir().join(node)
    }

    /// Where a node's daemon listens for the command line.
    pub fn control_socket(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("control.sock")
    }

    /// A daemon's standard output and error.
    pub fn daemon_log(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("daemon.log")
    }

    /// A node's configuration.
    pub fn config(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("node.toml")
    }

    /// The name of a node's network namespace; `link` is that of the bridge.
    pub fn netns(&self, node: &str) -> String {
        format!("dunlin-{}-{node}", self.name)
    }

    /// The file that holds a node's network namespace.
    pub fn netns_path(&self, node: &str) -> PathBuf {
        Path::new(NETNS_DIR).join(self.netns(node))
    }

    /// Is this the name of one of the lab's network namespaces, and of which node? Exact, because `a` and `a-n1` are
    /// both names of labs.
    pub fn netns_node<'a>(&self, netns: &'a str) -> Option<&'a str> {
        let node = netns.strip_prefix("dunlin-")?.strip_prefix(self.name.as_str())?;
        let node = node.strip_prefix('-')?;
        (node == LINK || node == CLIENT || is_node_name(node)).then_some(node)
    }

    /// The lab's network: one of 16,384, by its name, so that the addresses of labs side by side tell them apart.
    pub fn subnet(&self) -> Ipv4Addr {
        // FNV-1a; any spread will do, but it must not change between the builds of two commands.
        let hash = self.name.as_str().bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let hash = hash ^ (hash >> 32);
        Ipv4Addr::new(10, 64 + (hash % 64) as u8, (hash >> 8) as u8, 0)
    }

    /// The addresses that all nests of the lab have.
    pub fn inside(&self) -> (Ipv4Addr, Ipv6Addr) {
        let [a, b, c, _] = self.subnet().octets();
        (Ipv4Addr::new(a, b + 64, c, 1), self.six(0, 1))
    }

    /// The addresses that the outside host reaches the cluster by.
    pub fn outside(&self) -> (Ipv4Addr, Ipv6Addr) {
        let [a, b, c, _] = self.subnet().octets();
        (Ipv4Addr::new(a, b + 128, c, 1), self.six(1, 1))
    }

    /// The outside host's own.
    pub fn client(&self) -> (Ipv4Addr, Ipv6Addr) {
        let [a, b, c, _] = self.subnet().octets();
        (Ipv4Addr::new(a, b + 128, c, 2), self.six(1, 2))
    }

    fn six(&self, net: u16, host: u16) -> Ipv6Addr {
        let [_, b, c, _] = self.subnet().octets();
        let lab = u16::from_be_bytes([b, c]);
        Ipv6Addr::new(0xfd64, 0x756e, 0x6c69, net, lab, 0, 0, host)
    }

    /// A node's address on the link.
    pub fn address(&self, slot: u16) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet().octets();
        Ipv4Addr::new(a, b, c, slot as u8)
    }

    /// Where a node's daemon listens for its peers.
    pub fn listen(&self, slot: u16) -> SocketAddr {
        (self.address(slot), PORT).into()
    }

    /// The nodes that have a directory, by slot.
    pub fn nodes_on_disk(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir()).into_iter().flatten().flatten();
        let mut nodes: Vec<String> = entries
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| is_node_name(n))
            .collect();
        nodes.sort_by_key(|n| (n.len(), n.clone()));
        nodes
    }
}

/// In place of a node's name: the namespace that holds the bridge.
pub const LINK: &str = "link";

/// In place of a node's name: the namespace of the host that is outside the cluster.
pub const CLIENT: &str = "client";

/// The gateway's device to the outside host.
pub const OUTSIDE_DEVICE: &str = "out0";

/// The name of the node with this slot.
pub fn node_name(slot: u16) -> String {
    format!("n{slot}")
}

/// Is this `n1`, `n2`, …?
pub fn is_node_name(name: &str) -> bool {
    name.strip_prefix('n')
        .is_some_and(|n| n.parse::<u16>().is_ok_and(|slot| slot > 0 && slot.to_string() == n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(name: &str) -> Layout {
        Layout::new(name.parse().unwrap())
    }

    #[test]
    fn names_that_would_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "A", "-a", "a-", "a b", "a.lock", &"a".repeat(41)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?}");
        }
        assert!("my-lab-2".parse::<LabName>().is_ok());
    }

    #[test]
    fn a_lab_takes_no_namespace_of_another_for_its_own() {
        let a = layout("a");
        assert_eq!(a.netns_node("dunlin-a-n1"), Some("n1"));
        assert_eq!(a.netns_node("dunlin-a-link"), Some("link"));
        assert_eq!(a.netns_node(&layout("a-n1").netns("n1")), None);
        assert_eq!(a.netns_node(&layout("ab").netns("n1")), None);
        assert_eq!(a.netns_node("dunlin-a-n01"), None);
    }

    #[test]
    fn two_labs_have_two_networks() {
        assert_ne!(layout("lab").subnet(), layout("lab2").subnet());
        assert_eq!(layout("lab").subnet(), layout("lab").subnet());
        assert_eq!(layout("lab").address(3).octets()[3], 3);
        assert!((64..128).contains(&layout("lab").subnet().octets()[1]));
        let (lab, lab2) = (layout("lab"), layout("lab2"));
        assert_ne!(lab.inside(), lab2.inside());
        assert_eq!(lab.outside().0.octets()[..3], lab.client().0.octets()[..3]);
        assert_ne!(lab.outside().1, lab.inside().1);
    }

    #[test]
    fn the_longest_name_fits_a_socket_address() {
        let longest = layout(&"a".repeat(40)).control_socket("n200");
        assert!(longest.as_os_str().len() < 108, "{longest:?}");
    }
}
