//! What a node is told before it starts: the file behind `dunlin node --config FILE`.

use dunlin_proto::ids::{Modulus, Slot};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
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
        let unknown = format!("colour = 1\n{GOOD}");
        assert!(NodeConfig::parse(&unknown).unwrap_err().contains("colour"));
    }
}
