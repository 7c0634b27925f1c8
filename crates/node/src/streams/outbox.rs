//! A run's output on its way out of the daemon, in one order.
//!
//! Owns the queue and the thread that empties it into a [`Drain`]: the caller's connection, or a log. Refuses to know
//! where output comes from. Invariants: whoever puts something in never waits for the drain (who wants to be polite
//! asks [`Outbox::wait_for_room`] before); nothing goes out before [`Outbox::release`]; after [`Outbox::finish`] everything put in before has been passed on, and
//! then the last reply; after [`Outbox::close`], or a failure of the drain, nothing is.

use dunlin_proto::control::Reply;
use dunlin_proto::stream::{StreamKind, WINDOW_BYTES};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// Where the output goes.
pub trait Drain: Send {
    /// Passes one reply on; may wait. After an error it is not called again.
    fn put(&mut self, reply: Reply) -> io::Result<()>;
}

/// Told that so many bytes of what it put in were passed on.
pub type Credit = Arc<dyn Fn(usize) + Send + Sync>;

enum Item {
    Say(Reply),
    Output {
        stream: u8,
        bytes: Vec<u8>,
        credit: Option<Credit>,
    },
    InputTaken(u32),
}

enum Phase {
    Open,
    /// Nothing more comes in; the last reply, if there is one.
    Finishing(Option<Reply>),
    Closed,
}

struct State {
    queue: VecDeque<Item>,
    bytes: u64,
    /// The run has not started: nothing goes out yet.
    held: bool,
    input_taken: u64,
    phase: Phase,
}

/// The queue.
pub struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outbox {
    /// Starts the thread. `broken` is called from it if the drain fails.
    pub fn start(drain: Box<dyn Drain>, broken: impl FnOnce() + Send + 'static) -> io::Result<Arc<Outbox>> {
        let state = State {
            queue: VecDeque::new(),
            bytes: 0,
            held: true,
            input_taken: 0,
            phase: Phase::Open,
        };
        let outbox = Arc::new(Outbox {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let emptied = outbox.clone();
        thread::Builder::new().name("run output".into()).spawn(move || {
            if let Err(e) = emptied.empty(drain) {
                tracing::debug!("a run's output is not wanted any more: {e}");
                emptied.close();
                broken();
            }
        })?;
        Ok(outbox)
    }

    /// Lets the output go, after this reply.
    pub fn release(&self, first: Option<Reply>) {
        let mut state = self.lock();
        state.held = false;
        if let Some(first) = first {
            state.queue.push_front(Item::Say(first));
        }
        self.changed.notify_all();
    }

    /// How much input the caller has been told, or will be, to have been taken, in all.
    pub fn total_input_taken(&self) -> u64 {
        self.lock().input_taken
    }

    /// Waits until less than a window is queued; `false`: it is closed.
    pub fn wait_for_room(&self) -> bool {
        let mut state = self.lock();
        while state.bytes >= WINDOW_BYTES && matches!(state.phase, Phase::Open) {
            state = self.wait(state);
        }
        !matches!(state.phase, Phase::Closed)
    }

    /// Puts output in.
    pub fn put(&self, stream: StreamKind, bytes: &[u8], credit: Option<Credit>) {
        let stream = if stream == StreamKind::Stderr { 2 } else { 1 };
        let mut state = self.lock();
        if matches!(state.phase, Phase::Open) {
            state.bytes += bytes.len() as u64;
            state.queue.push_back(Item::Output {
                stream,
                bytes: bytes.to_vec(),
                credit,
            });
            self.changed.notify_all();
        } else {
            drop(state);
            // Nobody reads it: it is gone, which for the writer is as good as read.
            if let Some(credit) = credit {
                credit(bytes.len());
            }
        }
    }

    /// Tells the caller that it may send more input.
    pub fn input_taken(&self, bytes: usize) {
        let mut state = self.lock();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if bytes == 0 || !matches!(state.phase, Phase::Open) {
            return;
        }
        state.input_taken += u64::from(bytes);
        match state.queue.back_mut() {
            Some(Item::InputTaken(more)) => *more = more.saturating_add(bytes),
            Some(Item::Output { .. } | Item::Say(_)) | None => state.queue.push_back(Item::InputTaken(bytes)),
        }
        self.changed.notify_all();
    }

    /// Nothing comes any more; after what is queued, this.
    pub fn finish(&self, last: Option<Reply>) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Open) {
            state.phase = Phase::Finishing(last);
        }
        self.changed.notify_all();
    }

    /// Forgets everything.
    pub fn close(&self) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        state.bytes = 0;
        let forgotten = std::mem::take(&mut state.queue);
        self.changed.notify_all();
        drop(state);
        for item in forgotten {
            if let Item::Output {
                bytes,
                credit: Some(credit),
                ..
            } = item
            {
                credit(bytes.len());
            }
        }
    }

    /// Waits until the thread has nothing left to do, for so long; says whether it is so.
    pub fn wait_closed(&self, within: Duration) -> bool {
        let open = |s: &mut State| !matches!(s.phase, Phase::Closed);
        let waited = self.changed.wait_timeout_while(self.lock(), within, open);
        !waited.unwrap_or_else(|e| e.into_inner()).1.timed_out()
    }

    fn empty(&self, mut drain: Box<dyn Drain>) -> io::Result<()> {
        loop {
            let mut state = self.lock();
            let item = loop {
                // A program may have ended before its start was told: that is told first all the same.
                if state.held && matches!(state.phase, Phase::Open | Phase::Finishing(Some(_))) {
                    state = self.wait(state);
                    continue;
                }
                if let Some(item) = state.queue.pop_front() {
                    break item;
                }
                match std::mem::replace(&mut state.phase, Phase::Closed) {
                    Phase::Open => state.phase = Phase::Open,
                    Phase::Finishing(last) => {
                        drop(state);
                        let done = last.map_or(Ok(()), |last| drain.put(last));
                        self.changed.notify_all();
                        return done;
                    }
                    Phase::Closed => return Ok(()),
                }
                state = self.wait(state);
            };
            drop(state);
            match item {
                Item::Say(reply) => drain.put(reply)?,
                Item::InputTaken(bytes) => drain.put(Reply::InputTaken { bytes })?,
                Item::Output { stream, bytes, credit } => {
                    let length = bytes.len();
                    let put = drain.put(Reply::Output { stream, bytes });
                    if let Some(credit) = credit {
                        credit(length);
                    }
                    let mut state = self.lock();
                    state.bytes = state.bytes.saturating_sub(length as u64);
                    drop(state);
                    self.changed.notify_all();
                    put?;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }
}
