//! The thread that receives every notified call of the nest.
//!
//! Owns the order in which calls that make a task are let go: as they came, each when the one before has its number.
//! Everything else it hands on to the daemon at once. Refuses to know numbers ([`super::steer`]). It has no filter
//! itself, so nothing it does can wait for itself.
//!
//! Until a call is received here, a signal to its caller breaks it off, and the program sees EINTR of a fork(2), which natively
//! there is not. So this thread has real-time priority: it receives as soon as the caller waits.
//!
//! In the common case a call finds the one before it settled: receive, serve, receive. Only when it does not, calls are
//! queued here and the thread looks again, first by giving the processor away (where it has no such priority), then with
//! growing naps which any new call ends. Queuing further calls early matters: a caller that comes again has provably left its call before.

use super::outbox::Outbox;
use super::steer::{Served, Steering, is_steered};
use crate::nest::wire::Event;
use dunlin_proto::ids::Pid;
use dunlin_sys::inspect;
use dunlin_sys::seccomp::{self, Listener, Notification};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::VecDeque;

/// SCHED_FIFO, at the lowest priority, for this thread alone (SCHED_FLAG_RESET_ON_FORK).
const FIRST_IN: [i64; 4] = [1, 1, 0, 1];
/// So many looks are made by giving the processor away.
const YIELDS: u32 = 30;
/// The first nap; each is twice as long as the one before.
const FIRST_NAP_NS: i64 = 20_000;
/// The longest nap.
const LAST_NAP_NS: i64 = 1_000_000;

/// The thread's life; it ends when the listener does.
pub fn run(listener: &Listener, steering: &Steering, outbox: &Outbox) {
    // A nap is meant to be as short as it says.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    // Giving the processor away gives it to nobody of lower priority.
    let yields = match inspect::set_schedule(0, FIRST_IN) {
        Ok(()) => 0,
        Err(_) => YIELDS,
    };
    let mut waiting: VecDeque<Notification> = VecDeque::with_capacity(1024);
    let mut looks = 0;
    loop {
        if waiting.is_empty() || has_call(listener, steering, if looks > yields { nap(looks - yields) } else { 0 }) {
            match listener.receive() {
                Ok(Some(call)) if !is_steered(&call) => outbox.push(event(&call)),
                Ok(Some(call)) => {
                    if waiting.is_empty() {
                        if steering.serve(&call, listener) == Served::Yes {
                            continue;
                        }
                        looks = 0;
                    }
                    steering.is_back(call.tid as i32);
                    waiting.push_back(call);
                }
                Ok(None) => {}
                Err(e) => {
                    super::complain(format_args!("the seccomp listener is gone: {e}"));
                    return;
                }
            }
        }
        while let Some(call) = waiting.front() {
            if steering.serve(call, listener) == Served::NotYet {
                break;
            }
            waiting.pop_front();
            looks = 0;
        }
        if !waiting.is_empty() {
            looks += 1;
            if looks <= yields {
                rustix::thread::sched_yield();
            }
        }
    }
}

fn nap(looks: u32) -> i64 {
    (FIRST_NAP_NS << (looks - 1).min(10)).min(LAST_NAP_NS)
}

/// Is there a call to receive? Waits at most so long, or until steering is released.
fn has_call(listener: &Listener, steering: &Steering, nanoseconds: i64) -> bool {
    let mut fds = [
        PollFd::new(listener, PollFlags::IN),
        PollFd::from_borrowed_fd(steering.released(), PollFlags::IN),
    ];
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: nanoseconds,
    };
    let _ = rustix::event::poll(&mut fds, Some(&timeout));
    if fds[1].revents().contains(PollFlags::IN) {
        steering.seen();
    }
    fds[0].revents().contains(PollFlags::IN)
}

fn event(call: &Notification) -> Event {
    Event::Notification {
        id: call.id,
        tid: Pid(call.tid as i32),
        nr: seccomp::wide_number(call.arch, call.nr),
        args: call.args,
    }
}
