//! From the caller to the program: standard input, signals, the terminal's size.
//!
//! Owns two threads that end with the process, and the terminal while it is raw. Invariant: no more input is under way
//! than the daemon takes in at once, so a signal is never stuck behind input that the program does not read.

use crate::exit::{FAILED, Failed};
use crate::terminal::{self, Raw};
use dunlin_lab::control::Connection;
use dunlin_proto::control::{INPUT_WINDOW_BYTES, RunInput};
use dunlin_proto::frame;
use dunlin_sys::foreground::Caught;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// At most this much standard input in one message, as the protocol bounds it.
const INPUT_BYTES: usize = 64 << 10;

/// What the caller passes on while the program runs.
pub struct Relay {
    line: Arc<Line>,
}

/// The way to the program.
struct Line {
    input: Mutex<UnixStream>,
    window: Window,
    terminal: Mutex<Option<Raw>>,
}

impl Relay {
    /// Starts passing on. From now on signals do not happen to this process.
    pub fn start(connection: &Connection, on_terminal: bool) -> Result<Relay, Failed> {
        let failed = |what: &str, e: &dyn std::fmt::Display| Failed::new(FAILED, format!("{what}: {e}"));
        let signals = [
            Signal::HUP,
            Signal::INT,
            Signal::QUIT,
            Signal::USR1,
            Signal::USR2,
            Signal::TERM,
            Signal::TSTP,
            Signal::CONT,
            Signal::WINCH,
        ];
        let caught = Caught::new(&signals.map(Signal::as_raw)).map_err(|e| failed("catching signals", &e))?;
        let raw = if on_terminal {
            Some(Raw::enter().map_err(|e| failed("the terminal", &e))?)
        } else {
            None
        };
        let line = Arc::new(Line {
            input: Mutex::new(connection.input().map_err(|e| failed("the connection", &e))?),
            window: Window::new(),
            terminal: Mutex::new(raw),
        });
        let relay = Relay { line };
        let (signals, input) = (Arc::clone(&relay.line), Arc::clone(&relay.line));
        std::thread::spawn(move || {
            while let Ok(signal) = caught.next() {
                signals.received(signal);
            }
        });
        std::thread::spawn(move || input.pump());
        Ok(relay)
    }

    /// Passes a signal on.
    pub fn signal(&self, signal: i32) {
        self.line.signal(signal);
    }

    /// So many more bytes of input may be sent.
    pub fn input_taken(&self, bytes: u32) {
        self.line.window.taken(bytes);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The threads hold the line until the process ends, but the terminal is given back now.
        drop(lock(&self.line.terminal).take());
    }
}

impl Line {
    fn received(&self, signal: i32) {
        if signal == Signal::WINCH.as_raw() {
            if lock(&self.terminal).is_some()
                && let Some(size) = terminal::size(io::stdout())
            {
                self.send(&RunInput::Resize(size));
            }
        } else if signal == Signal::TSTP.as_raw() {
            self.stop();
        } else {
            self.signal(signal);
        }
    }

    /// Stops the program, then ourselves; what wakes us, SIGCONT, comes as the next signal and is passed on.
    fn stop(&self) {
        // Not TSTP: no shell watches over the program's group where it runs, and the kernel does not let TSTP stop
        // such an orphaned group.
        self.signal(Signal::STOP.as_raw());
        let raw = lock(&self.terminal);
        if let Some(raw) = &*raw {
            raw.suspend();
        }
        let _ = kill_process(getpid(), Signal::STOP);
        // Woken in the background (`bg`), we leave the terminal to the shell.
        if let Some(raw) = &*raw
            && !terminal::taken_by_others()
        {
            let _ = raw.resume();
        }
    }

    fn signal(&self, signal: i32) {
        self.send(&RunInput::Signal(signal));
    }

    /// Sends a message. It is never delayed by a program that does not read: see [`Window`].
    fn send(&self, message: &RunInput) -> bool {
        // If the daemon has closed its end, the reader of replies will learn why.
        frame::write(&mut *lock(&self.input), message).is_ok()
    }

    /// Passes standard input on until it ends.
    fn pump(&self) {
        let mut buffer = vec![0; INPUT_BYTES];
        // Reading a terminal that another job uses would stop us, and the program's output with us.
        while !terminal::taken_by_others() {
            let room = self.window.room().min(INPUT_BYTES);
            let read = match rustix::io::read(io::stdin(), &mut buffer[..room]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    let _ = poll(&mut [PollFd::new(&io::stdin(), PollFlags::IN)], None);
                    continue;
                }
                // No terminal any more, or never an input: that is an end too.
                Err(_) => break,
            };
            self.window.sent(read);
            if !self.send(&RunInput::Stdin(buffer[..read].to_vec())) {
                return;
            }
        }
        self.send(&RunInput::StdinEnd);
    }
}

/// How much input may be under way: so little that the daemon always takes it in, and signals behind it.
struct Window {
    room: Mutex<u64>,
    opened: Condvar,
}

impl Window {
    fn new() -> Window {
        Window {
            room: Mutex::new(INPUT_WINDOW_BYTES),
            opened: Condvar::new(),
        }
    }

    /// Waits until something may be sent, and says how much.
    fn room(&self) -> usize {
        let shut = |room: &mut u64| *room == 0;
        let room = self
            .opened
            .wait_while(lock(&self.room), shut)
            .unwrap_or_else(PoisonError::into_inner);
        usize::try_from(*room).unwrap_or(usize::MAX)
    }

    fn sent(&self, bytes: usize) {
        let mut room = lock(&self.room);
        *room = room.saturating_sub(bytes as u64);
    }

    fn taken(&self, bytes: u32) {
        let mut room = lock(&self.room);
        // A daemon that takes more than was sent is not believed.
        *room = (*room + u64::from(bytes)).min(INPUT_WINDOW_BYTES);
        self.opened.notify_all();
    }
}

/// A thread that panicked with the lock left nothing half done that another could trip over.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
