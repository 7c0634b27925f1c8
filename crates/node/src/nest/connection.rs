//! The daemon's end of `init.sock`.
//!
//! Owns the numbers of requests and the thread that reads. Refuses to know what requests mean. When the connection ends
//! every waiting request fails, later ones fail at once, and the last event is sent.

use super::NestEvent;
use super::wire::{self, Answer, Event, FromInit, Request};
use dunlin_sys::fdpass;
use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A request's answer.
#[derive(Debug)]
pub struct Reply {
    /// What init says.
    pub answer: Answer,
    /// The descriptors with it.
    pub fds: Vec<OwnedFd>,
    /// The PID that came with it, as this machine numbers it.
    pub pid: Option<i32>,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: Arc<OwnedFd>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// No answer will come any more.
    gone: bool,
    /// It is we who leave.
    left: bool,
    replies: HashMap<u64, SyncSender<Reply>>,
}

impl Connection {
    /// Takes a connected socket and starts to read it.
    pub fn new(socket: OwnedFd) -> io::Result<(Connection, Receiver<NestEvent>)> {
        // The PIDs of HostPid come as credentials.
        rustix::net::sockopt::set_socket_passcred(&socket, true)?;
        let socket = Arc::new(socket);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (events, receiver) = mpsc::channel();
        let (reader, replies) = (socket.clone(), waiting.clone());
        std::thread::Builder::new()
            .name("nest".into())
            .spawn(move || read(&reader, &replies, &events))?;
        Ok((Connection { socket, waiting }, receiver))
    }

    /// Sends a request and waits for its answer.
    pub fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<Reply> {
        self.begin(request, fds)?.recv().map_err(|_| gone())
    }

    /// Hands a request over without waiting for its answer: once this returns, it is init's, whatever becomes of us.
    pub fn tell(&self, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.begin(request, fds).map(|_| ())
    }

    fn begin(&self, request: Request, fds: &[BorrowedFd<'_>]) -> io::Result<Receiver<Reply>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let number = {
            let mut waiting = lock(&self.waiting);
            if waiting.gone {
                return Err(gone());
            }
            waiting.next += 1;
            let number = waiting.next;
            waiting.replies.insert(number, sender);
            number
        };
        dunlin_sys::fuse::step();
        let sent =
            wire::encode(&(number, request)).and_then(|bytes| fdpass::send(&*self.socket, &bytes, fds, None, true));
        if let Err(e) = sent {
            lock(&self.waiting).replies.remove(&number);
            return Err(e);
        }
        Ok(receiver)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.waiting).left = true;
        // The reader has the socket too; this ends it.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }
}

fn read(socket: &OwnedFd, waiting: &Mutex<Waiting>, events: &Sender<NestEvent>) {
    loop {
        let received = match fdpass::receive(socket, true) {
            Ok(received) => received,
            Err(e) => {
                if e.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!("connection to init: {e}");
                }
                break;
            }
        };
        match wire::decode::<FromInit>(&received.bytes) {
            Ok(FromInit::Answer(number, answer)) => {
                if let Some(sender) = lock(waiting).replies.remove(&number) {
                    let _ = sender.send(Reply {
                        answer,
                        fds: received.fds,
                        pid: received.pid,
                    });
                }
            }
            Ok(FromInit::Event(event)) => match event_of(event) {
                // A daemon that has dropped the receiver does not care.
                Some(event) => drop(events.send(event)),
                None => tracing::warn!("init sent a siginfo of a strange size"),
            },
            Err(e) => {
                tracing::warn!("init sent what is no message: {e}");
                break;
            }
        }
    }
    let mut waiting = lock(waiting);
    waiting.gone = true;
    waiting.replies.clear();
    let left = waiting.left;
    drop(waiting);
    if !left {
        let _ = events.send(NestEvent::InitGone);
    }
}

fn event_of(event: Event) -> Option<NestEvent> {
    Some(match event {
        Event::Reaped { pid, status } => NestEvent::Reaped { pid, status },
        Event::Notification { id, tid, nr, args } => NestEvent::Notification { id, pid: tid, nr, args },
        Event::SurrogateSignal { pid, info } => NestEvent::SurrogateSignal {
            pid,
            siginfo: info.try_into().ok()?,
        },
        Event::SurrogateChild { parent, info } => NestEvent::SurrogateChild {
            parent,
            siginfo: info.try_into().ok()?,
        },
        Event::SurrogateStopped(pid) => NestEvent::SurrogateStopped { pid },
        Event::SurrogateContinued(pid) => NestEvent::SurrogateContinued { pid },
        Event::SurrogateGone(pid) => NestEvent::SurrogateGone { pid },
    })
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        "init is gone, and the nest with it; hint: see init.log in the state directory",
    )
}
