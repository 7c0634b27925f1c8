//! How a daemon comes by its nest: it finds init listening, or starts it and waits until it does.
//!
//! Owns `init.sock`'s path, init's log and the check that a found nest is the configured one. A nest is never rebuilt
//! over a living one: whoever answers on the socket keeps it.

use super::connection::Connection;
use super::wire::{self, Answer, Blueprint, Built, Request};
use super::{Inner, Nest, NestError, NestEvent};
use crate::config::NodeConfig;
use dunlin_sys::fdpass;
use dunlin_sys::seccomp::Listener;
use dunlin_sys::spawn::with_stdio_alone;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

/// What init writes goes here, in the state directory.
const LOG_NAME: &str = "init.log";

/// See [`Nest::open`].
pub fn open(config: &NodeConfig, exe: &Path) -> Result<(Nest, Receiver<NestEvent>), NestError> {
    let state_dir = std::path::absolute(&config.state_dir).unwrap_or_else(|_| config.state_dir.clone());
    let path = state_dir.join(wire::SOCKET_NAME);
    let talk = |source| NestError::Talk {
        socket: path.clone(),
        source,
    };
    let socket = match connect(&path) {
        Ok(socket) => socket,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            build(config, &state_dir, exe)?;
            connect(&path).map_err(talk)?
        }
        Err(e) => return Err(talk(e)),
    };
    let init_pid = sockopt::socket_peercred(&socket)
        .map_err(|e| talk(e.into()))?
        .pid
        .as_raw_nonzero()
        .get();
    let (connection, events) = Connection::new(socket).map_err(talk)?;
    let hello = Request::Hello { version: wire::VERSION };
    let mut reply = connection.ask(hello, &[]).map_err(talk)?;
    let Answer::Welcome {
        version,
        cookie,
        modulus,
        slot,
    } = reply.answer
    else {
        return Err(talk(super::unexpected(reply.answer)));
    };
    let foreign = |what: String| NestError::Foreign { what, init_pid };
    if version != wire::VERSION {
        return Err(foreign(format!("protocol version {version}, not {}", wire::VERSION)));
    }
    if (modulus, slot) != (config.modulus, config.slot) {
        return Err(foreign(format!("slot {slot} of modulus {modulus}")));
    }
    let (Some(program), Some(listener)) = (reply.fds.pop(), reply.fds.pop()) else {
        return Err(talk(io::ErrorKind::InvalidData.into()));
    };
    let root = rustix::fs::open(
        format!("/proc/{init_pid}/root"),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let pid = rustix::process::Pid::from_raw(init_pid).expect("a peer has a PID");
    let init = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
    let inner = Inner {
        connection,
        init_pid,
        init: init.map_err(|e| talk(e.into()))?,
        root: root.map_err(|e| talk(e.into()))?,
        cookie,
        listener: Listener::from(listener),
        program,
        steering: Mutex::new(()),
        cgroup: cgroup_of(init_pid),
        socket: path,
    };
    Ok((Nest(Arc::new(inner)), events))
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = packet_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn packet_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Starts init and returns when the nest stands.
fn build(config: &NodeConfig, state_dir: &Path, exe: &Path) -> Result<(), NestError> {
    let exec = |source| NestError::Exec {
        exe: exe.into(),
        source,
    };
    let log_path = state_dir.join(LOG_NAME);
    let log = std::fs::create_dir_all(state_dir)
        .and_then(|()| std::fs::File::options().create(true).append(true).open(&log_path));
    let log = log.map_err(exec)?;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| exec(e.into()))?;
    let mut builder = Command::new(exe);
    builder
        .arg("init")
        .stdin(Stdio::from(theirs))
        .stdout(log.try_clone().map_err(exec)?)
        .stderr(log);
    let mut builder = with_stdio_alone(&mut builder).spawn().map_err(exec)?;
    let blueprint = Blueprint {
        version: wire::VERSION,
        cluster: config.cluster.clone(),
        node: config.name.clone(),
        slot: config.slot,
        modulus: config.modulus,
        pid_limit: config.pid_limit,
        clock_offset_seconds: config.clock_offset_seconds,
        network: config.network.is_some(),
        state_dir: state_dir.as_os_str().as_bytes().to_vec(),
    };
    let result = wire::encode(&blueprint)
        .and_then(|bytes| fdpass::send(&ours, &bytes, &[], None, true))
        .and_then(|()| fdpass::receive(&ours, true))
        .and_then(|received| wire::decode::<Built>(&received.bytes));
    // The builder ends in any case: PID 1 is another process. Nobody's child then, it is not reaped by this daemon.
    builder.wait().map_err(exec)?;
    match result {
        Ok(Built::Ready) => Ok(()),
        Ok(Built::Failed { step, why }) => Err(NestError::Build { step, why }),
        Err(_) => Err(NestError::Silent { log: log_path }),
    }
}

/// The directory of a process's cgroup (of the unified hierarchy).
fn cgroup_of(pid: i32) -> Option<PathBuf> {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let below = cgroups.lines().find_map(|l| l.strip_prefix("0::"))?;
    // Never the root, nor a cgroup that somebody else made.
    let ours = below.split('/').nth_back(2) == Some("dunlin");
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mountinfo.lines().find_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        (rest.split(' ').next() == Some("cgroup2")).then(|| fields.split(' ').nth(4))?
    })?;
    ours.then(|| Path::new(mount).join(below.trim_start_matches('/')))
}

/// Removes an empty cgroup, and those above it that it leaves empty, up to dunlin's own.
pub fn remove_cgroup(path: &Path) {
    for directory in path.ancestors().take(3) {
        if std::fs::remove_dir(directory).is_err() {
            return;
        }
    }
}
