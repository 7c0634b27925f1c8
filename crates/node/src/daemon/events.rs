//! What happens in the nest, and what the daemon does about it.
//!
//! Owns the thread that takes the nest's events, and the workers for what may have to wait for a peer. Refuses to wait
//! itself. Invariant: events about one process are acted upon in their order.

use super::Node;
use crate::nest::NestEvent;
use crate::ports;
use crate::processes::exits::{self, Ended};
use crate::runs::Run;
use crate::signals;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::Pid;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;

/// Events about one process all go to the same worker.
const WORKERS: usize = 4;

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
            NestEvent::Notification { id, pid, nr, args } => {
                if ports::notified::is_taken(nr) {
                    ports::notified::take(&node, id, pid, nr, args);
                } else if !node.mover.notified(id, pid, nr, &args) {
                    signals::notified::take(&node, id, pid, nr, args);
                }
            }
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
    // In this order: a run whose start is not finished looks for its end after it is known as one.
    node.exits.reaped(pid, status);
    if let Some(run) = node.runs.of(pid) {
        run_ended(node, &run, pid, status);
    }
}

/// The top process of a run has ended. Once more does no harm.
pub fn run_ended(node: &Node, run: &Run, pid: Pid, status: ExitStatus) {
    node.exits.record(pid, status, run.owner().uid);
    node.runs.ended(pid, status);
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
    if node.residents.get(pid).is_some() {
        // What it wrote comes before its end.
        node.runs.settle_relays();
        node.mover.ended(pid, ended.status);
    }
}
