//! A fuse: this process ends, as if by `kill -9`, at the N-th of its steps.
//!
//! For tests of what is left behind then. Owns the count. A step is what may change something outside of this process: a
//! request of ptrace, a message to init or to a peer. Refuses to know what the steps are for. Invariants: a fuse that was
//! never [lit](light) costs one load a step; one that has burnt down lets no thread past the step.

use rustix::process::{Signal, getpid, kill_process};
use std::sync::atomic::{AtomicU64, Ordering};

const NEVER: u64 = u64::MAX;
static LEFT: AtomicU64 = AtomicU64::new(NEVER);

/// Lights it: so many steps are made, and not one more.
pub fn light(steps: u64) {
    LEFT.store(steps.min(NEVER - 1), Ordering::Relaxed);
}

/// A step is about to be made.
pub fn step() {
    if LEFT.load(Ordering::Relaxed) != NEVER {
        burn();
    }
}

#[cold]
fn burn() {
    let before = LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        Some(left.saturating_sub(1))
    });
    while before == Ok(0) {
        // Nothing can be done about a kernel that refuses; then no step is made either.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
