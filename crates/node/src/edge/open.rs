//! How a daemon comes by its edge: it takes up what a former one left running, or makes it.
//!
//! Owns the making and what init keeps of it. Refuses to know what is steered where. Invariant: an edge of this build's
//! form is never made anew while its nest lives, so packets flow on whatever becomes of daemons.

use super::announce::News;
use super::devices::{self, Names};
use super::park::Park;
use super::{Edge, EdgeError, Inner, Inside, Slices, kernel};
use crate::config::{NetworkConfig, NodeConfig};
use crate::nest::Nest;
use dunlin_proto::ids::Slot;
use dunlin_sys::bpf::{self, Side};
use dunlin_sys::links::Device;
use dunlin_sys::namespace;
use dunlin_sys::sockdiag::SockDiag;
use dunlin_sys::steer::{self, NOWHERE, Programs, Tables};
use dunlin_sys::tap::Tap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

/// The label of programs, tables, the park and what attaches the programs.
const LABEL: &str = "edge/kernel";

/// Who keeps descriptors and bytes beyond a daemon's life.
pub trait Shelf: Send + Sync {
    /// Keeps these in place of what had the label.
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], blob: Vec<u8>) -> io::Result<()>;
    /// The same of bytes alone, without waiting; what was asked for before is kept before.
    fn keep_soon(&self, label: &str, blob: Vec<u8>) -> io::Result<()>;
    /// What is kept.
    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>>;
    /// Takes who waits at a listening socket out of its queue, as many as one label holds, and keeps them, with these bytes and
    /// after them who each one is. `None`: nobody waits.
    fn accept(
        &self,
        label: &str,
        listening: BorrowedFd<'_>,
        blob: Vec<u8>,
    ) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>>;
    /// Keeps it no longer, without waiting.
    fn forget_soon(&self, label: &str) -> io::Result<()>;
    /// The labels there are.
    fn labels(&self) -> io::Result<Vec<String>>;
}

impl Shelf for Nest {
    fn keep(&self, label: &str, fds: &[BorrowedFd<'_>], blob: Vec<u8>) -> io::Result<()> {
        self.store(label, fds, blob)
    }

    fn keep_soon(&self, label: &str, blob: Vec<u8>) -> io::Result<()> {
        self.store_soon(label, blob)
    }

    fn kept(&self, label: &str) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        self.fetch(label)
    }

    fn accept(
        &self,
        label: &str,
        listening: BorrowedFd<'_>,
        blob: Vec<u8>,
    ) -> io::Result<Option<(Vec<OwnedFd>, Vec<u8>)>> {
        Nest::accept(self, label, listening, blob)
    }

    fn forget_soon(&self, label: &str) -> io::Result<()> {
        self.drop_soon(label)
    }

    fn labels(&self) -> io::Result<Vec<String>> {
        self.list()
    }
}

/// The parts that live in the kernel.
struct Kernel {
    tables: Tables,
    park: OwnedFd,
}

impl Edge {
    /// The edge of a nest: as it is, or made.
    pub fn open(config: &NodeConfig, nest: &Nest) -> Result<Edge, EdgeError> {
        let path = format!("/proc/{}/ns/net", nest.init_pid());
        let namespace = std::fs::File::open(&path).map_err(kernel("opening", &path))?;
        Edge::join(config, namespace.as_fd(), Box::new(nest.clone()))
    }

    /// The same for any network namespace in a nest's place. The calling thread's is the machine's.
    pub fn join(config: &NodeConfig, nest: BorrowedFd<'_>, shelf: Box<dyn Shelf>) -> Result<Edge, EdgeError> {
        let Some(network) = &config.network else {
            return Ok(Edge::none());
        };
        let failed = |what| kernel(what, &"the nest's network");
        let names = Names::of(config);
        let link = devices::underlay(config.listen.ip()).map_err(failed("finding the link of"))?;
        let found = take_up(&*shelf, network).map_err(failed("taking up"))?;
        let kernel_side = match found {
            Some(kernel_side) => kernel_side,
            None => make(config, network, &names, nest, &link, &*shelf).map_err(failed("making"))?,
        };
        configure(config, network, &names, nest, &kernel_side.tables).map_err(failed("configuring"))?;
        let diag = namespace::in_network(nest, SockDiag::open).map_err(failed("looking into"))?;
        let inner = Arc::new(Inner {
            own: Slot(config.slot),
            inside: Inside {
                v4: network.inside,
                v6: network.inside6,
            },
            slices: Slices::new(network.first_port, config.modulus).expect("checked when it was read"),
            shelf,
            tunnel: network
                .tunnel
                .then(|| devices::named(&names.tunnel))
                .transpose()
                .map_err(failed("finding the tunnel of"))?,
            peers: config.peers.iter().map(|p| (Slot(p.slot), p.address.ip())).collect(),
            names,
            link,
            tables: kernel_side.tables,
            park: Mutex::new(Park::new(Tap::from_fd(kernel_side.park))),
            strays: Mutex::default(),
            strays_wanted: Condvar::new(),
            news: News::default(),
            diag: Mutex::new(diag),
            porter: OnceLock::new(),
        });
        let loaded = Arc::downgrade(&inner);
        std::thread::Builder::new()
            .name("edge porter".into())
            .spawn(move || loaded.upgrade().map(|inner| inner.porter().is_some()))
            .map_err(failed("serving"))?;
        let watched = Arc::downgrade(&inner);
        std::thread::Builder::new()
            .name("edge strays".into())
            .spawn(move || super::holds::watch_strays(watched))
            .map_err(failed("serving"))?;
        Ok(Edge(Some(inner)))
    }
}

/// What a former daemon left, if it is of this build's form.
fn take_up(shelf: &dyn Shelf, network: &NetworkConfig) -> io::Result<Option<Kernel>> {
    let Some((mut fds, blob)) = shelf.kept(LABEL)? else {
        return Ok(None);
    };
    if blob != form(network) || fds.len() < Programs::COUNT + Tables::COUNT + 1 {
        tracing::warn!(
            "the nest's edge was made by another version or configuration and is made anew; what it held is lost"
        );
        shelf.forget_soon(LABEL)?;
        return Ok(None);
    }
    // The programs come first, and last what attaches them: they are needed by nobody but the kernel.
    let mut fds = fds.drain(Programs::COUNT..);
    let tables = Tables::from_fds(fds.by_ref().take(Tables::COUNT).collect())?;
    let park = fds.next().expect("counted");
    Ok(Some(Kernel { tables, park }))
}

fn make(
    config: &NodeConfig,
    network: &NetworkConfig,
    names: &Names,
    nest: BorrowedFd<'_>,
    link: &Device,
    shelf: &dyn Shelf,
) -> io::Result<Kernel> {
    let (programs, tables) = steer::load()?;
    let mtu = match network.tunnel {
        true => devices::make_tunnel(names, config.listen.port(), link)?,
        false => link.mtu,
    };
    devices::join(names, nest, mtu)?;
    let park = Tap::make(&names.park)?;
    devices::ready_park(names)?;
    configure(config, network, names, nest, &tables)?;
    let ingress = |program: &OwnedFd, device: u32| bpf::attach(program.as_fd(), device, Side::Ingress);
    let mut links = vec![
        ingress(&programs.nest_out, devices::named(&names.nest)?.index)?,
        ingress(&programs.park_in, devices::named(&names.park)?.index)?,
    ];
    links.push(match network.tunnel {
        true => ingress(&programs.tunnel_in, devices::named(&names.tunnel)?.index)?,
        false => ingress(&programs.link_in, link.index)?,
    });
    if let Some(outside) = network.outside_device_of(&config.name) {
        links.push(ingress(&programs.outside_in, devices::named(outside)?.index)?);
    }
    links.push(namespace::in_network(nest, || {
        let inner = devices::named(devices::INNER)?;
        bpf::attach(programs.nest_egress.as_fd(), inner.index, Side::Egress)
    })?);
    devices::furnish(nest, network, Slot(config.slot), config.modulus, mtu)?;
    let mut fds = programs.fds();
    fds.extend(tables.fds());
    fds.push(park.as_fd());
    fds.extend(links.iter().map(AsFd::as_fd));
    shelf.keep(LABEL, &fds, form(network))?;
    Ok(Kernel {
        park: park.as_fd().try_clone_to_owned()?,
        tables,
    })
}

/// What must be the same for a daemon to take an edge up.
fn form(network: &NetworkConfig) -> Vec<u8> {
    let mut form = steer::LAYOUT.to_le_bytes().to_vec();
    form.push(network.tunnel.into());
    form
}

fn configure(
    config: &NodeConfig,
    network: &NetworkConfig,
    names: &Names,
    nest: BorrowedFd<'_>,
    tables: &Tables,
) -> io::Result<()> {
    let inner = namespace::in_network(nest, || devices::named(devices::INNER))?;
    let outside_if = match network.outside_device_of(&config.name) {
        Some(name) => {
            let device = devices::named(name)?;
            for address in network.unanswered(&device.addresses) {
                tracing::warn!(
                    "nobody answers for the outside address {address}: {name} does not have it; hint: ip address add {address} dev {name}"
                );
            }
            device.index
        }
        None => 0,
    };
    let tunnel_if = match network.tunnel {
        true => devices::named(&names.tunnel)?.index,
        false => 0,
    };
    let gateway = network.gateway.as_ref().and_then(|name| config.slot_of(name));
    let slices = Slices::new(network.first_port, config.modulus).expect("checked when it was read");
    tables.configure(&steer::Config {
        inside: (network.inside, network.inside6),
        outside: (network.outside, network.outside6),
        underlay: config.listen.ip(),
        nest_if: devices::named(&names.nest)?.index,
        inner_if: inner.index,
        park_if: devices::named(&names.park)?.index,
        outside_if,
        tunnel_if,
        own: config.slot,
        gateway: gateway.map_or(NOWHERE, |slot| slot.0),
        slice_first: network.first_port,
        slice_width: slices.width(),
        slices: config.modulus,
    })
}
