//! What a nest's network needs, tried in a network namespace of its own.

use super::{Need, useful};
use crate::doctor::Row;
use dunlin_sys::bpf::{self, Side};
use dunlin_sys::socket::callers::Porter;
use dunlin_sys::tap::Tap;
use dunlin_sys::{links, namespace, steer};
use std::io;
use std::os::fd::AsFd;
use std::process::Command;

const WITHOUT: &str = "nests have a loopback device only: a daemon with a [network] section does not start";

/// All of it.
pub fn all() -> Vec<Row> {
    let tap = useful(
        "tun",
        "where packets for a socket that moves wait",
        WITHOUT,
        "modprobe tun; a container needs /dev/net/tun",
    );
    let veth = useful(
        "veth",
        "joins a nest to its machine",
        WITHOUT,
        "modprobe veth; install iproute2",
    );
    let steering = useful(
        "steering programs",
        "BPF programs that bring each packet to the node that has its socket (tcx, Linux 6.6)",
        WITHOUT,
        "a kernel with CONFIG_BPF_SYSCALL, CONFIG_BPF_JIT and CONFIG_NET_XGRESS, and CAP_BPF and CAP_NET_ADMIN",
    );
    let porter = useful(
        "unaccepted callers",
        "connections that a program has not accepted move with its listening socket (bpf_sk_assign_tcp_reqsk)",
        "a program that has callers it does not accept is moved when it has accepted them",
        "Linux 6.9 or later with CONFIG_DEBUG_INFO_BTF and CONFIG_SYN_COOKIES; sysctl net.ipv4.tcp_syncookies=1",
    );
    let rows = |needs: [Need; 4]| {
        let attempts: [fn() -> io::Result<()>; 4] = [try_tap, try_veth, try_steering, try_porter];
        let rows = needs.iter().zip(attempts).map(|(need, attempt)| {
            let space = namespace::new_network();
            let tried = space.and_then(|space| namespace::in_network(space.as_fd(), attempt));
            need.row(tried.map(|()| "works".into()).map_err(|e| e.to_string()))
        });
        rows.collect()
    };
    rows([tap, veth, steering, porter])
}

fn try_tap() -> io::Result<()> {
    Tap::make("probe0").map(drop)
}

fn try_veth() -> io::Result<()> {
    let add = [
        "link", "add", "name", "probe0", "type", "veth", "peer", "name", "probe1",
    ];
    let output = Command::new("ip").args(add).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}

fn try_steering() -> io::Result<()> {
    let (programs, _tables) = steer::load()?;
    let devices = links::devices()?;
    let lo = devices.iter().find(|d| d.name == "lo").ok_or(io::ErrorKind::NotFound)?;
    bpf::attach(programs.link_in.as_fd(), lo.index, Side::Ingress).map(drop)
}

fn try_porter() -> io::Result<()> {
    let devices = links::devices()?;
    let lo = devices.iter().find(|d| d.name == "lo").ok_or(io::ErrorKind::NotFound)?;
    Porter::load()?.watch(&[lo.index]).map(drop)
}
