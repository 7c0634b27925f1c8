//! What happens in the nest, and what the daemon does about it.
//!
//! Owns the thread that takes the nest's events, and the workers for what may have to wait for a peer. Refuses to wait
//! itself. Invariant: events about one process are acted upon in their order.

use super::Node;
use super::node::unreachable;
use crate::nest::NestEvent;
use crate::processes::exits::{self, Ended};
use crate::signals;
use dunlin_proto::ids::{Pid, Slot};
use dunlin_proto::peer::{PeerReply, PeerRequest};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// Events about one process all go to the same worker.
const WORKERS: usize = 4;
/// Between attempts to tell a home of an end.
const TELL_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Something to be done about a process.
enum Job {
    Event(NestEvent),
    Ended(Pid, Ended),
}

/// The workers' queues.
#[derive(Clone)]
pub struct Workers(Vec<Sender<Job>>);

impl Workers {
    /// Starts them; they end with the node.
    pub fn start(node: &Arc<Node>) -> std::io::Result<Workers> {
        let mut queues = Vec::new();
        for _ in 0..WORKERS {
            let (queue, jobs) = channel();
            let node = Arc::downgrade(node);
            thread::Builder::new()
                .name("nest events".into())
                .spawn(move || work(&node, &jobs))?;
            queues.push(queue);
        }
        Ok(Workers(queues))
    }

    /// A watched process has ended.
    pub fn ended(&self, pid: Pid, ended: Ended) {
        self.give(pid, Job::Ended(pid, ended));
    }

    fn give(&self, pid: Pid, job: Job) {
        // A worker ends only with the node.
        let _ = self.0[pid.0.unsigned_abs() as usize % WORKERS].send(job);
    }
}

/// Takes events until init is gone or the node is; returns whether init is.
pub fn take(node: &Weak<Node>, workers: &Workers, events: &Receiver<NestEvent>) -> bool {
    for event in events {
        let Some(node) = node.upgrade() else { return false };
        match event {
            NestEvent::InitGone => return true,
            NestEvent::Reaped { pid, status } => reaped(&node, pid, status),
            NestEvent::Notification { id, pid, nr, args } => signals::notified::take(&node, id, pid, nr, args),
            NestEvent::SurrogateSignal { pid, .. }
            | NestEvent::SurrogateStopped { pid }
            | NestEvent::SurrogateContinued { pid }
            | NestEvent::SurrogateGone { pid }
            | NestEvent::SurrogateChild { parent: pid, .. } => workers.give(pid, Job::Event(event)),
        }
    }
    true
}

fn reaped(node: &Arc<Node>, pid: Pid, status: i32) {
    let status = exits::decode(status);
    match node.runs.of(pid) {
        Some(run) => {
            node.exits.record(pid, status, run.owner().uid);
            node.runs.ended(pid, status);
        }
        None => node.exits.reaped(pid, status),
    }
}

fn work(node: &Weak<Node>, jobs: &Receiver<Job>) {
    for job in jobs {
        let Some(node) = node.upgrade() else { return };
        match job {
            Job::Ended(pid, ended) => watched_end(&node, pid, ended),
            Job::Event(event) => signals::surrogates::act(&node, event),
        }
    }
}

/// A process that was watched has ended here.
fn watched_end(node: &Arc<Node>, pid: Pid, ended: Ended) {
    let Some(resident) = node.residents.remove(pid) else {
        return;
    };
    // What it wrote comes before its end.
    node.runs.settle_relays();
    if let Some(mover) = &node.mover {
        mover.resident_ended(node, pid, ended);
    }
    let Some(home) = node.modulus.home(pid).filter(|home| *home != node.slot) else {
        return;
    };
    let status = ended.status;
    let request = PeerRequest::Exited {
        pid,
        uid: ended.uid,
        status,
        incarnation: resident.incarnation,
    };
    tell_home(node, home, &request);
}

fn tell_home(node: &Arc<Node>, home: Slot, request: &PeerRequest) {
    if let Err(e) = node.peers.call(home, request) {
        tracing::warn!(
            "a home does not hear that its process has ended, will tell it again: {}",
            unreachable(&e).message
        );
        let (node, request) = (Arc::downgrade(node), request.clone());
        let again = move || {
            while let Some(node) = node.upgrade() {
                match node.peers.call(home, &request) {
                    Ok(PeerReply::Failed(failure)) => return tracing::warn!("{}", failure.message),
                    Ok(_) => return,
                    Err(_) => drop(node),
                }
                thread::sleep(TELL_AGAIN_AFTER);
            }
        };
        if let Err(e) = thread::Builder::new().name("tell home".into()).spawn(again) {
            tracing::error!("no thread to tell a home of an end: {e}");
        }
    }
}
