//! One stream's pipe or terminal on this node, from the daemon's side.
//!
//! Owns the *far* end, the thread that reads it and the thread that writes it. The *near* end belongs to programs; the
//! daemon can make more of it ([`Port::near`]). Refuses to know what is on the other side of the daemon ([`Side`]
//! does).
//!
//! Invariants: bytes are read and passed on under one lock, so that who holds it ([`Port::drain`]) knows that what was
//! written before is passed on; the far end of a pipe has an open file description of its own, so that
//! making it non-blocking is not seen by programs.

use super::{PIECE_BYTES, Side, terminal};
use dunlin_proto::stream::StreamKind;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// How often it is looked whether an input pipe still has a reader.
const LOOKS_FOR_READERS: Duration = Duration::from_millis(200);
/// `drain` reads no more: more than a pipe holds was written meanwhile.
const MAX_DRAIN_BYTES: usize = 2 << 20;

/// What a file descriptor of a program is recognised by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// Device and inode, either end.
    Pipe(u64, u64),
    /// Device of the devpts, and the terminal's own number in it.
    Terminal(u64, u64),
}

impl Identity {
    /// Of any descriptor; `None` for what is neither.
    pub fn of(fd: impl AsFd) -> io::Result<Option<Identity>> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::Fifo => Some(Identity::Pipe(stat.st_dev, stat.st_ino)),
            rustix::fs::FileType::CharacterDevice => Some(Identity::Terminal(stat.st_dev, stat.st_rdev)),
            _ => None,
        })
    }
}

/// Whether the far end alone keeps the stream open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It goes on without users: they may come back. (At a run's origin.)
    WithoutUsers,
    /// Without users it ends. (At a relay; but for a terminal, which its users may leave before the daemon has taken out
    /// what they have not read.)
    WhileUsed,
}

/// Does anything follow the queue?
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// Nothing does.
    Asked,
    /// Nothing does, and readers of the pipe can see it.
    Shown,
}

#[derive(Default)]
struct Input {
    queue: VecDeque<u8>,
    end: End,
    /// The program is leaving: what is here stays where it is.
    held: bool,
}

/// What was received for a program and not read by it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// All of it, in order.
    pub bytes: Vec<u8>,
    /// How many of them, from the front, had been reported as taken.
    pub taken: usize,
}

/// A stream on this node.
pub struct Port {
    stream: StreamKind,
    /// Gone when the input of a pipe has ended, or the port is closed.
    far: Mutex<Option<Arc<OwnedFd>>>,
    /// Names a pipe without being one of its ends.
    anchor: Option<OwnedFd>,
    /// Keeps the pipe or terminal open ([`Hold`]).
    kept: Mutex<Option<OwnedFd>>,
    identity: Identity,
    hold: Hold,
    wake: OwnedFd,
    reading: Mutex<()>,
    input: Mutex<Input>,
    input_changed: Condvar,
    closed: AtomicBool,
    side: Arc<dyn Side>,
}

impl Port {
    /// Makes a pipe; also returns its near end.
    pub fn pipe(stream: StreamKind, hold: Hold, side: Arc<dyn Side>) -> io::Result<(Arc<Port>, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (far, near) = if stream.takes_input() {
            (write, read)
        } else {
            (read, write)
        };
        Ok((Port::adopt(stream, far, hold, side)?, near))
    }

    /// Takes up a far end: a new one, or one that was kept while the daemon was away. `far` of a terminal is its master.
    pub fn adopt(stream: StreamKind, far: OwnedFd, hold: Hold, side: Arc<dyn Side>) -> io::Result<Arc<Port>> {
        let flags = rustix::fs::fcntl_getfl(&far)?;
        rustix::fs::fcntl_setfl(&far, flags | OFlags::NONBLOCK)?;
        let (anchor, near) = match stream {
            StreamKind::Tty => (None, terminal::slave(far.as_fd())?),
            StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr => {
                let anchor = reopen(far.as_fd(), OFlags::PATH)?;
                let near = near_end_of_pipe(stream, anchor.as_fd())?;
                (Some(anchor), near)
            }
        };
        let identity = Identity::of(&near)?.ok_or_else(|| io::Error::from(Errno::NOTTY))?;
        let port = Arc::new(Port {
            stream,
            far: Mutex::new(Some(Arc::new(far))),
            anchor,
            kept: Mutex::new((hold == Hold::WithoutUsers || stream == StreamKind::Tty).then_some(near)),
            identity,
            hold,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            reading: Mutex::new(()),
            input: Mutex::default(),
            input_changed: Condvar::new(),
            closed: AtomicBool::new(false),
            side,
        });
        Ok(port)
    }

    /// Starts the threads. Separate from making the port, so that the near end can be in its place before a missing
    /// user means anything.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        if self.stream.gives_output() {
            let port = self.clone();
            thread::Builder::new()
                .name("stream out".into())
                .spawn(move || port.read_on())?;
        }
        if self.stream.takes_input() {
            let port = self.clone();
            thread::Builder::new()
                .name("stream in".into())
                .spawn(move || port.write_on())?;
        }
        Ok(())
    }

    /// What descriptors of this stream are recognised by.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Which stream it is.
    pub fn stream(&self) -> StreamKind {
        self.stream
    }

    /// Another near end, for a program; an open file description of its own, blocking.
    pub fn near(&self) -> io::Result<OwnedFd> {
        match (&self.anchor, self.far()) {
            _ if self.closed.load(Ordering::Acquire) => Err(Errno::PIPE.into()),
            (Some(anchor), _) => near_end_of_pipe(self.stream, anchor.as_fd()),
            (None, Some(master)) => terminal::slave(master.as_fd()),
            (None, None) => Err(Errno::PIPE.into()),
        }
    }

    /// The far end; gone when input has ended or the port is closed.
    pub fn far(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.far).clone()
    }

    /// Passes on everything that was written. Nobody may be writing, or not for ever.
    pub fn drain(&self) {
        let _reading = lock(&self.reading);
        let mut drained = 0;
        while let (Some(far), true) = (self.far(), drained < MAX_DRAIN_BYTES && self.stream.gives_output()) {
            match self.read_piece(&far) {
                Ok(Some(bytes)) => drained += bytes,
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Queues input.
    pub fn input(&self, bytes: &[u8]) {
        lock(&self.input).queue.extend(bytes);
        self.input_changed.notify_all();
    }

    /// Nothing follows the input queued so far. A program sees the end of a pipe; a terminal has no such thing.
    pub fn end_input(&self) {
        let mut input = lock(&self.input);
        if input.end == End::Open {
            input.end = End::Asked;
        }
        drop(input);
        self.input_changed.notify_all();
    }

    /// Takes back what was not read, and the end if that was given, and holds what may yet come, until
    /// [`Port::release_input`].
    pub fn take_unread(&self) -> io::Result<Unread> {
        let mut input = lock(&self.input);
        input.held = true;
        let mut bytes = Vec::new();
        if let Some(anchor) = &self.anchor {
            let reader = reopen(anchor.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK)?;
            read_all(reader.as_fd(), &mut bytes)?;
        } else if let Some(far) = self.far() {
            terminal::take_unread(far.as_fd(), &mut bytes)?;
        }
        let taken = bytes.len();
        bytes.extend(input.queue.drain(..));
        if let (End::Shown, Some(anchor)) = (input.end, &self.anchor) {
            // Without a reader there is no way, nor need, to write again.
            *lock(&self.far) = reopen(anchor.as_fd(), OFlags::WRONLY | OFlags::NONBLOCK)
                .ok()
                .map(Arc::new);
        }
        input.end = End::Open;
        Ok(Unread { bytes, taken })
    }

    /// Waits until nobody has the near end of an input pipe open; `false`: it has ended otherwise.
    pub fn await_no_readers(&self) -> bool {
        loop {
            // Looked at, not held: a copy of the writing end would keep the end of the input from being seen.
            thread::sleep(LOOKS_FOR_READERS);
            let Some(far) = self.far() else { return false };
            let mut polled = [PollFd::new(&*far, PollFlags::empty())];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut polled, Some(&now)).is_ok_and(|_| polled[0].revents().contains(PollFlags::ERR)) {
                return true;
            }
        }
    }

    /// Input goes to the program here (again).
    pub fn release_input(&self) {
        lock(&self.input).held = false;
        self.input_changed.notify_all();
    }

    /// Closes the far end: who writes is told so by SIGPIPE, who reads by the end, who has the terminal by SIGHUP.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        *lock(&self.kept) = None;
        *lock(&self.far) = None;
        let input = lock(&self.input);
        // The counter of an eventfd stays up: it wakes both threads, now or later.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        drop(input);
        self.input_changed.notify_all();
    }

    fn read_on(&self) {
        while self.side.wait_for_room() {
            let Some(far) = self.far() else { return };
            if self.await_ready(far.as_fd(), PollFlags::IN) {
                return;
            }
            let _reading = lock(&self.reading);
            match self.read_piece(&far) {
                Ok(_) => {}
                Err(Errno::PIPE) => break,
                Err(e) => {
                    tracing::warn!("{:?} of a run: {e}", self.stream);
                    break;
                }
            }
        }
        if !self.closed.load(Ordering::Acquire) && self.hold == Hold::WhileUsed {
            self.side.unused();
        }
    }

    /// Reads and passes on one piece. `None`: there is nothing just now. EPIPE: there never will be.
    fn read_piece(&self, far: &OwnedFd) -> Result<Option<usize>, Errno> {
        let mut buffer = vec![0u8; PIECE_BYTES];
        match rustix::io::read(far, &mut buffer) {
            // A master without slaves says EIO.
            Ok(0) | Err(Errno::IO) => Err(Errno::PIPE),
            Ok(read) => {
                self.side.output(self.stream, &buffer[..read]);
                Ok(Some(read))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn write_on(&self) {
        loop {
            let mut input = lock(&self.input);
            let idle = |i: &Input| i.held || (i.queue.is_empty() && i.end != End::Asked);
            while !self.closed.load(Ordering::Acquire) && idle(&input) {
                input = self.input_changed.wait(input).unwrap_or_else(|e| e.into_inner());
            }
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            if input.queue.is_empty() {
                input.end = End::Shown;
                if self.stream == StreamKind::Stdin {
                    // What is kept of the pipe is a reader: its readers see the end.
                    *lock(&self.far) = None;
                    drop(input);
                    self.side.input_ended();
                }
                continue;
            }
            drop(input);
            match self.far() {
                Some(far) if !self.await_ready(far.as_fd(), PollFlags::OUT) => self.write_piece(&far),
                Some(_) => return,
                // Shown to have ended, and not to be had back.
                None => lock(&self.input).held = true,
            }
        }
    }

    fn write_piece(&self, far: &OwnedFd) {
        let mut input = lock(&self.input);
        if input.held {
            return;
        }
        let piece: Vec<u8> = input.queue.iter().take(PIECE_BYTES).copied().collect();
        let taken = match rustix::io::write(far, &piece) {
            Ok(written) => written,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // There are no readers. Perhaps they have left and are about to ask for it elsewhere.
            Err(_) => {
                input.held = true;
                0
            }
        };
        input.queue.drain(..taken);
        drop(input);
        if taken > 0 {
            self.side.taken(taken);
        }
    }

    /// Waits; says whether the port was closed meanwhile.
    fn await_ready(&self, fd: BorrowedFd<'_>, what: PollFlags) -> bool {
        let mut polled = [
            PollFd::from_borrowed_fd(fd, what),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => self.closed.load(Ordering::Acquire),
            Err(e) => {
                tracing::error!("waiting for a stream: {e}");
                true
            }
        }
    }
}

fn near_end_of_pipe(stream: StreamKind, anchor: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    reopen(
        anchor,
        if stream.takes_input() {
            OFlags::RDONLY
        } else {
            OFlags::WRONLY
        },
    )
}

/// Opens a pipe anew. Neither end waits for the other: a reader must not, and the reader that a writer needs is the far end.
fn reopen(end: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    if flags == OFlags::PATH {
        return Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?);
    }
    let fd = rustix::fs::open(path, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags)?;
    }
    Ok(fd)
}

/// Reads what is there.
pub(super) fn read_all(fd: BorrowedFd<'_>, into: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = vec![0u8; PIECE_BYTES];
    loop {
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) | Err(Errno::AGAIN) => return Ok(()),
            Ok(read) => into.extend(&buffer[..read]),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
