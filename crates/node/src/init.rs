//! `dunlin init`: builds the nest and is its PID 1.
//!
//! Owns the order in which a nest comes to be and init's three threads: the main one answers the daemon and reaps
//! ([`serve`]), one receives notified calls and steers PIDs ([`notify`], [`steer`]), one nudges callers out of calls
//! ([`nudger`]). Refuses to know about moves, peers and programs' contents: it does little, because while it lives the
//! nest lives, whatever becomes of the daemon, and when it dies everything in the nest dies.
//!
//! Invariants: standard input is the socket on which the blueprint arrives and the result goes back, once; init's own
//! threads have TIDs up to 100; the filter is installed on the thread that makes children, before it makes any, and on
//! no other, so that no thread of init can wait for itself.

mod build;
mod launch;
mod notify;
mod nudger;
mod outbox;
mod scan;
mod serve;
mod steer;
mod store;
mod surrogates;

use crate::nest::wire::{self, Blueprint, Built};
use build::{StepError, step};
use dunlin_cluster::allotment::Allotment;
use dunlin_proto::ids::{LAST_OWN_PID, Modulus, Slot};
use dunlin_sys::namespace::{self, Fork};
use dunlin_sys::seccomp::{Filter, Listener};
use dunlin_sys::sigwait::SignalFd;
use dunlin_sys::{fdpass, surrogate};
use rustix::rand::GetRandomFlags;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

/// The role's entry. Takes no arguments; a daemon starts it with a packet socket as standard input.
pub fn main(args: Vec<OsString>) -> ExitCode {
    // A thread that is lost silently would leave programs waiting for ever: better the nest ends, visibly.
    std::panic::set_hook(Box::new(|info| {
        complain(format_args!("{info}"));
        std::process::exit(70);
    }));
    if !args.is_empty() {
        complain(format_args!("takes no arguments; hint: it is started by `dunlin node`"));
        return ExitCode::from(2);
    }
    let taken = io::stdin().as_fd().try_clone_to_owned();
    let channel = match taken {
        Ok(channel) => channel,
        Err(e) => {
            complain(format_args!("standard input: {e}"));
            return ExitCode::from(2);
        }
    };
    let blueprint = fdpass::receive(&channel, true).and_then(|r| wire::decode::<Blueprint>(&r.bytes));
    let blueprint = match blueprint {
        Ok(blueprint) => blueprint,
        Err(e) => {
            complain(format_args!(
                "no blueprint on standard input: {e}; hint: it is started by `dunlin node`"
            ));
            return ExitCode::from(2);
        }
    };
    match build_nest(&blueprint).and_then(|server| report_ready(server, &channel)) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(server)) => {
            drop(channel);
            server.run()
        }
        Err(StepError { step, why }) => {
            complain(format_args!("{step}: {why}"));
            let failed = wire::encode(&Built::Failed { step, why });
            let _ = failed.and_then(|bytes| fdpass::send(&channel, &bytes, &[], None, true));
            ExitCode::FAILURE
        }
    }
}

/// The builder: leaves the namespaces of the machine and forks PID 1, in which alone this returns a server.
fn build_nest(blueprint: &Blueprint) -> Result<Option<serve::Server>, StepError> {
    if blueprint.version != wire::VERSION {
        let why = format!(
            "the daemon speaks version {}, this is {}",
            blueprint.version,
            wire::VERSION
        );
        return step("reading the blueprint", Err(why));
    }
    let socket = build::bind_socket(blueprint)?;
    build::join_cgroup(blueprint)?;
    build::leave_namespaces(blueprint)?;
    match step("forking PID 1", namespace::fork())? {
        Fork::Parent(_) => Ok(None),
        Fork::Child => pid_1(blueprint, socket).map(Some),
    }
}

/// Tells the daemon, and gives up standard input: its end tells the daemon that nobody builds any more.
fn report_ready(server: Option<serve::Server>, channel: &OwnedFd) -> Result<Option<serve::Server>, StepError> {
    if server.is_some() {
        let report = || -> io::Result<()> {
            let null = std::fs::File::open("/dev/null")?;
            fdpass::send(channel, &wire::encode(&Built::Ready)?, &[], None, true)?;
            Ok(rustix::stdio::dup2_stdin(&null)?)
        };
        step("reporting", report())?;
    }
    Ok(server)
}

/// To the log that the daemon gave as standard error. Not `eprintln!`, which panics when the disk is full.
fn complain(what: std::fmt::Arguments<'_>) {
    use io::Write;
    let _ = writeln!(io::stderr(), "dunlin init: {what}");
}

/// Makes this process a PID 1 that is ready to serve.
fn pid_1(blueprint: &Blueprint, socket: OwnedFd) -> Result<serve::Server, StepError> {
    build::furnish(blueprint)?;
    let _ = rustix::thread::set_name(c"dunlin-init");
    let (oom_score_adj, open_files) = build::privileges();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let kernel_limit = build::pid_max(&release)?;
    let limit = blueprint.pid_limit.map_or(kernel_limit, |l| l.min(kernel_limit));
    let (modulus, slot) = (Modulus(blueprint.modulus), Slot(blueprint.slot));
    let allotment = step("allotting PIDs", Allotment::new(modulus, slot, limit))?;
    let cookie = step("drawing the cookie", random())?;
    let last_pid = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/proc/sys/kernel/ns_last_pid");
    let last_pid = step("opening ns_last_pid (needs CONFIG_CHECKPOINT_RESTORE)", last_pid)?;

    let name = format!("dunlin-{:016x}", step("drawing a name", random())?);
    let reports = step("binding the surrogates' socket", surrogate::reports(name.as_bytes()))?;
    let program = step("writing the surrogates' program", surrogate::program(name.as_bytes()))?;

    let signals = step("blocking SIGCHLD", SignalFd::new(&[17]))?;
    let outbox = Arc::new(step("making the outbox", outbox::Outbox::new())?);
    let (nudger, nudges) = nudger::Nudger::new();
    let steering = steer::Steering::new(allotment, last_pid, cookie, nudger);
    let steering = Arc::new(step("making the steering", steering)?);

    // All threads before the filter: their clone would wait for a listener that nobody reads.
    let (hand_over, receive_listener) = std::sync::mpsc::channel::<Listener>();
    let (for_notify, for_nudger) = (outbox.clone(), outbox.clone());
    let notify_steering = steering.clone();
    let notify = move || {
        if let Ok(listener) = receive_listener.recv() {
            notify::run(&listener, &notify_steering, &for_notify);
        }
        // Without this thread every fork in the nest would hang for ever. Ending init ends the nest, visibly.
        complain(format_args!("the notification thread has ended, and the nest with it"));
        std::process::exit(70);
    };
    step("starting a thread", thread("dunlin-steer", notify))?;
    let nudge = move || nudger::run(&nudges, &for_nudger);
    step("starting a thread", thread("dunlin-nudge", nudge))?;

    // Listening, not binding, records PID 1 as the peer of whoever connects. Before the filter, which has it notified.
    step("listening", rustix::net::listen(&socket, 8))?;
    let filter = Filter {
        cookie,
        last_own_pid: LAST_OWN_PID as u32,
        modulus: u32::from(modulus.0),
        residue: u32::from(slot.0),
        ports: blueprint.network,
    };
    let listener = step("installing the seccomp filter", filter.install())?;
    let copy = step("copying the listener", listener.as_fd().try_clone_to_owned())?;
    step("handing the listener over", hand_over.send(Listener::from(copy)))?;
    Ok(serve::Server {
        cookie,
        residue: (modulus.0, slot.0),
        socket,
        signals,
        outbox,
        steering,
        listener,
        program,
        surrogates: surrogates::Surrogates::new(reports),
        launch: launch::Defaults {
            oom_score_adj,
            open_files,
        },
        store: store::Store::default(),
        daemon: None,
        told: Vec::new(),
    })
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

fn random() -> rustix::io::Result<u64> {
    let mut bytes = [0u8; 8];
    rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}
