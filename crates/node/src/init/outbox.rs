//! Events on their way from init's threads to the daemon.
//!
//! Owns a bounded queue and the descriptor that wakes the thread which empties it. Refuses to know whether a daemon is
//! connected: while none is, events wait here. When the queue is full, the oldest event that is not a notified call is
//! lost (a notified call has a program waiting for its answer).

use crate::nest::wire::Event;
use dunlin_proto::ids::Pid;
use rustix::event::EventfdFlags;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// At most so many events wait.
pub const CAPACITY: usize = 32 << 10;

/// The queue.
#[derive(Debug)]
pub struct Outbox {
    events: Mutex<VecDeque<Event>>,
    wake: OwnedFd,
}

impl Outbox {
    /// An empty queue.
    pub fn new() -> io::Result<Outbox> {
        Ok(Outbox {
            events: Mutex::default(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Appends an event and wakes the sender.
    pub fn push(&self, event: Event) {
        let mut events = self.events();
        if events.len() >= CAPACITY {
            let victim = events.iter().position(|e| !matches!(e, Event::Notification { .. }));
            let lost = events.remove(victim.unwrap_or(0));
            super::complain(format_args!("no daemon takes events; lost {lost:?}"));
        }
        events.push_back(event);
        drop(events);
        // Cannot fail but by overflow, and then the reader is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// A child of init has ended.
    pub fn reaped(&self, pid: Pid, status: i32) {
        self.push(Event::Reaped { pid, status });
    }

    /// The oldest event.
    pub fn pop(&self) -> Option<Event> {
        self.events().pop_front()
    }

    /// Gives events back that were not delivered, the oldest first.
    pub fn give_back(&self, undelivered: Vec<Event>) {
        let mut events = self.events();
        for event in undelivered.into_iter().rev() {
            events.push_front(event);
        }
    }

    /// Half full: those who can wait should.
    pub fn is_busy(&self) -> bool {
        self.events().len() >= CAPACITY / 2
    }

    /// The wake-up has been seen.
    pub fn seen(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }

    fn events(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_loses_the_oldest_that_nobody_waits_for() {
        let outbox = Outbox::new().unwrap();
        let call = Event::Notification {
            id: 7,
            tid: Pid(1),
            nr: 62,
            args: [0; 6],
        };
        outbox.push(call);
        for i in 0..CAPACITY {
            outbox.reaped(Pid(i as i32), 0);
        }
        assert!(matches!(outbox.pop(), Some(Event::Notification { id: 7, .. })));
        assert!(matches!(outbox.pop(), Some(Event::Reaped { pid: Pid(1), .. })));
    }
}
