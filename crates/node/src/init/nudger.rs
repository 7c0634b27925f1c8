//! The thread that makes others leave a system call, for [`super::steer`].
//!
//! Owns every ptrace call of init (they must come from one thread). Refuses to know why. Each request gets one outcome;
//! a thread that cannot be stopped now (it waits for its vfork child) is let go whenever it does stop.

use super::outbox::Outbox;
use dunlin_proto::ids::Pid;
use dunlin_sys::nudge::{Nudge, Progress};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

/// How often a thread that is to stop is looked at.
const LOOK: Duration = Duration::from_micros(300);

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing yet.
    Waiting,
    /// The thread has been outside of any system call since it was asked, or is no more.
    WasOutside,
    /// Somebody else traces it.
    Refused,
}

/// A request under way.
#[derive(Debug, Clone)]
pub struct Request(Arc<AtomicU8>);

impl Request {
    /// What became of it.
    pub fn outcome(&self) -> Outcome {
        match self.0.load(Ordering::Acquire) {
            0 => Outcome::Waiting,
            1 => Outcome::WasOutside,
            _ => Outcome::Refused,
        }
    }

    fn decide(&self, outcome: u8) {
        self.0.store(outcome, Ordering::Release);
    }
}

/// The way to the thread.
#[derive(Debug)]
pub struct Nudger(Sender<(i32, Request)>);

impl Nudger {
    /// The way, and what the thread needs to [`run`].
    pub fn new() -> (Nudger, Receiver<(i32, Request)>) {
        let (sender, receiver) = channel();
        (Nudger(sender), receiver)
    }

    /// Asks for a thread to be nudged.
    pub fn nudge(&self, tid: i32) -> Request {
        let request = Request(Arc::new(AtomicU8::new(0)));
        if self.0.send((tid, request.clone())).is_err() {
            request.decide(2);
        }
        request
    }
}

/// The thread's life.
pub fn run(requests: &Receiver<(i32, Request)>, outbox: &Outbox) {
    let mut under_way: Vec<(Nudge, Request)> = Vec::new();
    loop {
        let next = if under_way.is_empty() {
            requests.recv().map_err(|_| TryRecvError::Disconnected)
        } else {
            std::thread::sleep(LOOK);
            requests.try_recv()
        };
        match next {
            Ok((tid, request)) => match Nudge::start(tid) {
                Ok(nudge) => under_way.push((nudge, request)),
                // Gone, or traced by somebody else; who asks finds out which in /proc.
                Err(_) => request.decide(2),
            },
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
        under_way.retain_mut(|(nudge, request)| match nudge.poll() {
            Progress::Waiting => true,
            Progress::LetGo => {
                request.decide(1);
                false
            }
            Progress::Gone(status) => {
                if let Some(status) = status {
                    outbox.reaped(Pid(nudge.tid()), status);
                }
                request.decide(1);
                false
            }
        });
    }
}
