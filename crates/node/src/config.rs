//! What a node is told before it starts: the file behind `dunlin node --config FILE`.

use crate::edge::Slices;
use dunlin_proto::ids::{Modulus, Slot};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// One node's configuration (TOML).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The cluster's name; the hostname inside every nest.
    pub cluster: String,
    /// This node's name, unique in the cluster.
    pub name: String,
    /// This node's slot, below the modulus, unique in the cluster.
    pub slot: u16,
    /// M: the same on every node, for ever.
    #[serde(default = "default_modulus")]
    pub modulus: u16,
    /// Where peers reach this daemon.
    pub listen: SocketAddr,
    /// Holds `control.sock`, `init.sock`, logs and `daemon.pid`. Local to the node.
    pub state_dir: PathBuf,
    /// The other nodes.
    #[serde(default, rename = "peer")]
    pub peers: Vec<PeerConfig>,
    /// Directories that are the same file system on every node (NFS or the like), `/` in a lab. A file opened for
    /// writing moves only below one of these.
    #[serde(default)]
    pub shared: Vec<PathBuf>,
    /// The first PID that is never given out, in the nest (`pid_max` of the kernel where absent). Small values are
    /// for tests of the wrap-around.
    #[serde(default)]
    pub pid_limit: Option<i32>,
    /// Added to CLOCK_MONOTONIC and CLOCK_BOOTTIME inside the nest, in seconds. A lab gives its nodes different ones,
    /// as machines booted at different times have.
    #[serde(default)]
    pub clock_offset_seconds: i64,
    /// The network of the nests; without it they have a loopback device only.
    #[serde(default)]
    pub network: Option<NetworkConfig>,
}

/// The network that programs see: the same addresses in every nest (docs/decisions/0016).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// The inside address: every nest's own, the same in all, and nobody's outside.
    pub inside: Ipv4Addr,
    /// The same of IPv6.
    pub inside6: Ipv6Addr,
    /// The ports from this one to 65535 are sliced among the nodes, by slot: a node gives out only those of its slice
    /// to sockets that have none yet. The same on every node.
    #[serde(default = "default_first_port")]
    pub first_port: u16,
    /// The name of the node that lets programs reach the world, and be reached.
    #[serde(default)]
    pub gateway: Option<String>,
    /// The address that the world knows, which the gateway's device has beside its own ones; the same on every node.
    #[serde(default)]
    pub outside: Option<Ipv4Addr>,
    /// The same of IPv6.
    #[serde(default)]
    pub outside6: Option<Ipv6Addr>,
    /// On the gateway: its device to the world.
    #[serde(default)]
    pub outside_device: Option<String>,
    /// The nodes do not share an Ethernet link: packets between nests travel in VXLAN (UDP, at the port number of
    /// `listen`, which is the same on all of them; IPv4). The same on every node.
    #[serde(default)]
    pub tunnel: bool,
    /// The longest packet that goes to the world.
    #[serde(default = "default_outside_mtu")]
    pub outside_mtu: u32,
}

impl NetworkConfig {
    /// The device to the world, if this node is the gateway.
    pub fn outside_device_of(&self, node: &str) -> Option<&str> {
        let is_gateway = self.gateway.as_deref() == Some(node);
        self.outside_device.as_deref().filter(|_| is_gateway)
    }

    /// Outside addresses that are none of those that the outside device has: nobody answers for them.
    pub fn unanswered(&self, device: &[IpAddr]) -> Vec<IpAddr> {
        let outside = [self.outside.map(IpAddr::V4), self.outside6.map(IpAddr::V6)];
        let outside = outside.into_iter().flatten();
        outside.filter(|address| !device.contains(address)).collect()
    }
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its name.
    pub name: String,
    /// Its slot.
    pub slot: u16,
    /// Where its daemon listens.
    pub address: SocketAddr,
}

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("configuration {path}: {why}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        why: String,
    },
}

fn default_first_port() -> u16 {
    20000
}

fn default_outside_mtu() -> u32 {
    1500
}

fn default_modulus() -> u16 {
    Modulus::default().0
}

impl NodeConfig {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<NodeConfig, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(&text).map_err(|why| ConfigError::Parse { path: path.into(), why })
    }

    /// Parses and checks a configuration text; the error says which key is wrong.
    pub fn parse(text: &str) -> Result<NodeConfig, String> {
        let config: NodeConfig = toml::from_str(text).map_err(|e| e.to_string())?;
        if config.modulus == 0 || config.modulus > 1024 {
            return Err(format!("modulus = {} is not between 1 and 1024", config.modulus));
        }
        let mut slots = vec![(config.slot, &config.name)];
        slots.extend(config.peers.iter().map(|p| (p.slot, &p.name)));
        for (i, (slot, name)) in slots.iter().enumerate() {
            if *slot >= config.modulus {
                return Err(format!(
                    "slot {slot} of {name} is not below the modulus {}",
                    config.modulus
                ));
            }
            if let Some((_, other)) = slots[..i].iter().find(|(s, n)| s == slot || n == name) {
                return Err(format!("{name} and {other} share a slot or a name"));
            }
        }
        if let Some(network) = &config.network {
            network.check(&config)?;
        }
        Ok(config)
    }

    /// The slot and name of every node, this one included.
    pub fn nodes(&self) -> impl Iterator<Item = (Slot, &str)> {
        std::iter::once((Slot(self.slot), self.name.as_str()))
            .chain(self.peers.iter().map(|p| (Slot(p.slot), p.name.as_str())))
    }

    /// The name of a node, or its slot in words when the configuration has none.
    pub fn name_of(&self, slot: Slot) -> String {
        self.nodes()
            .find(|(s, _)| *s == slot)
            .map_or_else(|| slot.to_string(), |(_, n)| n.to_owned())
    }

    /// The slot behind a name.
    pub fn slot_of(&self, name: &str) -> Option<Slot> {
        self.nodes().find(|(_, n)| *n == name).map(|(s, _)| s)
    }
}

impl NetworkConfig {
    fn check(&self, config: &NodeConfig) -> Result<(), String> {
        if Slices::new(self.first_port, config.modulus).is_none() {
            return Err(format!(
                "first_port = {} leaves no ports to give out to {} slots (it is at least 1024)",
                self.first_port, config.modulus
            ));
        }
        if let Some(gateway) = &self.gateway
            && config.slot_of(gateway).is_none()
        {
            return Err(format!("gateway = {gateway:?} is no node of this configuration"));
        }
        let addresses = config.peers.iter().map(|p| p.address).chain([config.listen]);
        if self.tunnel
            && addresses
                .into_iter()
                .any(|a| !a.is_ipv4() || a.port() != config.listen.port())
        {
            return Err("tunnel = true needs IPv4 addresses and the same port in `listen` and all of `peer`".into());
        }
        let special = |a: &IpAddr| a.is_unspecified() || a.is_loopback() || a.is_multicast();
        let outside = [self.outside.map(IpAddr::V4), self.outside6.map(IpAddr::V6)];
        let mut addresses = vec![IpAddr::V4(self.inside), IpAddr::V6(self.inside6), config.listen.ip()];
        addresses.extend(outside.into_iter().flatten());
        for (i, address) in addresses.iter().enumerate() {
            if special(address) && i != 2 {
                return Err(format!("{address} cannot be an address of a nest or of the cluster"));
            }
            if addresses[..i].contains(address) {
                return Err(format!(
                    "{address} is given twice: the inside, the outside and the listening address differ"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "lab"
        name = "n1"
        slot = 1
        listen = "10.77.0.1:7117"
        state_dir = "/run/dunlin/lab/n1"
        shared = ["/"]
        [[peer]]
        name = "n2"
        slot = 2
        address = "10.77.0.2:7117"
    "#;

    #[test]
    fn a_good_file_is_read() {
        let config = NodeConfig::parse(GOOD).unwrap();
        assert_eq!(config.modulus, 64);
        assert_eq!(config.slot_of("n2"), Some(Slot(2)));
        assert_eq!(config.name_of(Slot(1)), "n1");
        assert_eq!(config.name_of(Slot(9)), "slot 9");
    }

    #[test]
    fn clashes_and_unknown_keys_are_named() {
        let clash = GOOD.replace("slot = 2", "slot = 1");
        assert_eq!(
            NodeConfig::parse(&clash).unwrap_err(),
            "n2 and n1 share a slot or a name"
        );
        let high = GOOD.replace("slot = 2", "slot = 64");
        assert!(NodeConfig::parse(&high).unwrap_err().contains("not below the modulus"));
        let network = |rest: &str| NodeConfig::parse(&format!("{GOOD}\n[network]\n{rest}"));
        let inside = "inside = \"10.9.9.9\"\ninside6 = \"fd00::9\"\n";
        assert_eq!(network(inside).unwrap().network.unwrap().first_port, 20000);
        let error = network(&format!("{inside}gateway = \"n7\"")).unwrap_err();
        assert!(error.contains("n7"), "{error}");
        let error = network(&format!("{inside}outside = \"10.9.9.9\"")).unwrap_err();
        assert!(error.contains("given twice"), "{error}");
        let other = network(&format!("{inside}tunnel = true")).unwrap();
        assert!(other.network.unwrap().tunnel);
        let error = network(&format!("{inside}first_port = 65530")).unwrap_err();
        assert!(error.contains("first_port"), "{error}");
        let gateway = format!("{inside}gateway = \"n1\"\noutside = \"192.0.2.1\"\noutside_device = \"eth1\"");
        let gateway = network(&gateway).unwrap().network.unwrap();
        assert_eq!(gateway.outside_device_of("n1"), Some("eth1"));
        assert_eq!(gateway.outside_device_of("n2"), None);
        let has = ["192.0.2.1".parse().unwrap()];
        assert_eq!(gateway.unanswered(&has), [] as [IpAddr; 0]);
        assert_eq!(gateway.unanswered(&[]), has);
        let unknown = format!("colour = 1\n{GOOD}");
        assert!(NodeConfig::parse(&unknown).unwrap_err().contains("colour"));
    }
}
