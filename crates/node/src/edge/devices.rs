//! The devices and routes of a nest's network.
//!
//! Owns the pair of devices that joins the nest to its machine, the nest's addresses, rules and routes, and the names of
//! it all. Refuses to know what passes through. iproute2 does the work, as in labs (docs/decisions/0002).
//!
//! Every nest has the same address, and a socket bound to it may have its other end on the same address in another nest.
//! So the table of local addresses is not looked up first, as usual, but only for what comes in, and for loopback's own:
//! what programs send to the inside address leaves by the device like everything else, and the programs of
//! [`dunlin_sys::steer`] turn back what is for this nest.

use crate::config::{NetworkConfig, NodeConfig};
use dunlin_proto::ids::Slot;
use dunlin_sys::links::{self, Device};
use dunlin_sys::namespace;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::{Command, Stdio};

/// The nest's device, as programs see it.
pub const INNER: &str = "eth0";
/// Where the way to the inside address is told.
const TABLE: u32 = 99;
/// What VXLAN adds to a packet: Ethernet, IPv4, UDP and its own header.
const TUNNEL_BYTES: u32 = 50;
/// So many packets wait for a move at most.
const PARKED_PACKETS: u32 = 16384;
/// Longer than any packet of the devices that it takes packets from.
const PARK_MTU: u32 = 65521;

/// The names of a node's devices, which another daemon's on the same machine do not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The host's end of the nest's device.
    pub nest: String,
    /// Where held packets wait.
    pub park: String,
    /// Where the tunnels to other nodes end, if there are any.
    pub tunnel: String,
}

impl Names {
    /// Of a node of a cluster.
    pub fn of(config: &NodeConfig) -> Names {
        // FNV-1a, folded; it must not change between two builds.
        let text = format!("{}/{}", config.cluster, config.name);
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let hash = (hash ^ (hash >> 32)) as u32;
        Names {
            nest: format!("dunlin-{hash:08x}"),
            park: format!("dunlip-{hash:08x}"),
            tunnel: format!("dunlit-{hash:08x}"),
        }
    }
}

/// The device of this machine that has an address.
pub fn underlay(address: IpAddr) -> io::Result<Device> {
    let found = links::devices()?
        .into_iter()
        .find(|d| d.addresses.contains(&address.to_canonical()));
    found.ok_or_else(|| {
        io::Error::other(format!(
            "no device of this machine has the address {address} that `listen` names; hint: nests need one address there, not all"
        ))
    })
}

/// The device of this name.
pub fn named(name: &str) -> io::Result<Device> {
    let found = links::devices()?.into_iter().find(|d| d.name == name);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no network device {name}")))
}

/// Makes the pair of devices, the inner one in the nest; what was left of an older nest's goes.
pub fn join(names: &Names, inner: BorrowedFd<'_>, mtu: u32) -> io::Result<()> {
    let nest = &names.nest;
    // As `ip`, our child, finds it.
    let namespace = format!("/proc/{}/fd/{}", std::process::id(), inner.as_raw_fd());
    if links::devices()?.iter().any(|d| d.name == *nest) {
        ip(&format!("link del {nest}\n"))?;
    }
    ip(&format!(
        "link add name {nest} mtu {mtu} type veth peer name {INNER} mtu {mtu} netns {namespace}\n"
    ))?;
    quiet(nest)?;
    ip(&format!("link set {nest} arp off\nlink set {nest} up\n"))
}

/// Makes the device where tunnels end, one for all peers: each packet says which one it is for. The longest packet it takes.
pub fn make_tunnel(names: &Names, port: u16, link: &Device) -> io::Result<u32> {
    let (tunnel, mtu) = (&names.tunnel, link.mtu.saturating_sub(TUNNEL_BYTES));
    if links::devices()?.iter().any(|d| d.name == *tunnel) {
        ip(&format!("link del {tunnel}\n"))?;
    }
    ip(&format!(
        "link add name {tunnel} mtu {mtu} type vxlan external dstport {port}\n"
    ))?;
    quiet(tunnel)?;
    ip(&format!("link set {tunnel} arp off\nlink set {tunnel} up\n"))?;
    Ok(mtu)
}

/// Readies the device of held packets.
pub fn ready_park(names: &Names) -> io::Result<()> {
    let park = &names.park;
    quiet(park)?;
    ip(&format!(
        "link set {park} mtu {PARK_MTU} txqueuelen {PARKED_PACKETS}\nlink set {park} arp off\nlink set {park} up\n"
    ))
}

/// Nothing of our stack's own goes out by this device.
fn quiet(device: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    match std::fs::write(&path, "1") {
        // A machine without IPv6 has nothing to say.
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io::Error::new(e.kind(), format!("{path}: {e}"))),
        _ => Ok(()),
    }
}

/// Gives the nest its addresses, rules, routes and ports.
pub fn furnish(
    nest: BorrowedFd<'_>,
    network: &NetworkConfig,
    slot: Slot,
    modulus: u16,
    inner_mtu: u32,
) -> io::Result<()> {
    let (a4, a6, mtu) = (network.inside, network.inside6, network.outside_mtu.min(inner_mtu));
    let slices = super::Slices::new(network.first_port, modulus).expect("checked when it was read");
    let (first, last) = slices.of(slot);
    let settings = [
        // The inside address comes as the source of others' packets, too.
        ("ipv4/conf/all/accept_local", "1".to_owned()),
        ("ipv4/conf/eth0/accept_local", "1".to_owned()),
        ("ipv4/conf/all/rp_filter", "0".to_owned()),
        ("ipv4/conf/eth0/rp_filter", "0".to_owned()),
        ("ipv6/conf/eth0/accept_dad", "0".to_owned()),
        ("ipv6/conf/eth0/accept_ra", "0".to_owned()),
        ("ipv6/conf/eth0/autoconf", "0".to_owned()),
        ("ipv6/conf/eth0/router_solicitations", "0".to_owned()),
        ("ipv4/ip_local_port_range", format!("{first} {last}")),
    ];
    let rules = |family: &str, loopback: &str, inside: IpAddr, length: u8| {
        format!(
            "{family} rule add pref 5 from {loopback} iif lo lookup local\n\
             {family} rule add pref 10 to {inside}/{length} iif lo lookup {TABLE}\n\
             {family} rule add pref 100 lookup local\n\
             {family} rule del pref 0\n\
             {family} route add {inside}/{length} dev {INNER} src {inside} table {TABLE}\n\
             {family} route add default dev {INNER} src {inside} mtu {mtu}\n"
        )
    };
    let steps = [
        format!(
            "link set lo up\nlink set {INNER} arp off\nlink set {INNER} addrgenmode none\n\
             addr add {a4}/32 dev {INNER}\naddr add {a6}/128 dev {INNER} nodad\nlink set {INNER} up\n"
        ),
        rules("-4", "127.0.0.0/8", a4.into(), 32),
        rules("-6", "::1/128", a6.into(), 128),
    ];
    namespace::in_network(nest, || {
        for (name, value) in settings {
            let path = format!("/proc/sys/net/{name}");
            std::fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
        }
        ip(&steps.concat())
    })
}

/// Feeds commands to one `ip`, in the calling thread's network namespace.
fn ip(commands: &str) -> io::Result<()> {
    // `-4` and `-6` are options of `ip` and not of a line of a batch: one `ip` for each.
    for family in ["", "-4", "-6"] {
        let of = |line: &&str| match family {
            "" => !line.starts_with('-'),
            _ => line.starts_with(family),
        };
        let batch: String = commands
            .lines()
            .filter(of)
            .map(|line| format!("{}\n", line.trim_start_matches(family).trim_start()))
            .collect();
        if !batch.is_empty() {
            run(family, &batch)?;
        }
    }
    Ok(())
}

fn run(family: &str, batch: &str) -> io::Result<()> {
    let mut command = Command::new("ip");
    if !family.is_empty() {
        command.arg(family);
    }
    command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("`ip`: {e}; hint: apt-get install iproute2")))?;
    let fed = child
        .stdin
        .take()
        .map_or(Ok(()), |mut input| input.write_all(batch.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("`ip`: {}", why.trim())));
    }
    fed
}
