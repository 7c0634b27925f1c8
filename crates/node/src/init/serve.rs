//! The main thread of init: it answers the daemon, sends it what happened, and reaps.
//!
//! Owns the connection (one; a new daemon takes over from the old), the request handlers and the children. Refuses to
//! know why the daemon asks. Invariants: requests are answered in order; nothing here blocks on the daemon; when the
//! connection ends, steering is released, and notified calls that nobody has answered are told of again to the next one.

use super::outbox::Outbox;
use super::store::{Kept, Store};
use super::surrogates::Surrogates;
use super::{launch, steer::Steering};
use crate::nest::wire::{self, Answer, Event, FromInit, Request, ToInit};
use dunlin_proto::ids::Pid;
use dunlin_sys::seccomp::Listener;
use dunlin_sys::sigwait::SignalFd;
use dunlin_sys::socket::tcp;
use dunlin_sys::spawn;
use dunlin_sys::{fdpass, pidfd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::process::WaitOptions;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// At most so many requests are answered in one go.
const BATCH: usize = 64;
/// So many notified calls are remembered before the answered ones are weeded out.
const MANY_CALLS: usize = 256;

/// Everything the main thread has.
#[derive(Debug)]
pub struct Server {
    /// The nest's cookie.
    pub cookie: u64,
    /// The nest's modulus and slot.
    pub residue: (u16, u16),
    /// Where daemons connect.
    pub socket: OwnedFd,
    /// SIGCHLD.
    pub signals: SignalFd,
    /// What happened.
    pub outbox: Arc<Outbox>,
    /// Who gets which PID.
    pub steering: Arc<Steering>,
    /// The filter's listener, for the daemon and to see which calls are answered.
    pub listener: Listener,
    /// The surrogates' program.
    pub program: OwnedFd,
    /// The surrogates.
    pub surrogates: Surrogates,
    /// What children get that init has changed for itself.
    pub launch: launch::Defaults,
    /// The fd store.
    pub store: Store,
    /// The daemon, while there is one.
    pub daemon: Option<Daemon>,
    /// Notified calls that the daemon was told of and may not have answered.
    pub told: Vec<Event>,
}

/// A connection.
#[derive(Debug)]
pub struct Daemon {
    socket: OwnedFd,
    /// Not yet sent.
    out: VecDeque<Packet>,
}

#[derive(Debug)]
struct Packet {
    message: FromInit,
    fds: Vec<OwnedFd>,
    /// The task whose number the daemon wants to know.
    claim: Option<i32>,
}

/// What a request came to.
struct Outcome {
    answer: Answer,
    fds: Vec<OwnedFd>,
    claim: Option<i32>,
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Outcome {
            answer,
            fds: Vec::new(),
            claim: None,
        }
    }
}

fn failed(what: impl Into<String>, error: &io::Error) -> Answer {
    Answer::Failed {
        what: what.into(),
        errno: error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()),
    }
}

fn done(what: &str, result: io::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(e) => failed(what, &e),
    }
}

impl Server {
    /// Serves for ever.
    pub fn run(mut self) -> ! {
        let mut looked = Instant::now();
        loop {
            let ready = self.wait(looked);
            if ready.signal {
                self.signals.drain();
            }
            // Not only on SIGCHLD: one signal stands for many children, and the nudger may have taken its place.
            self.reap();
            if ready.outbox {
                self.outbox.seen();
            }
            if ready.socket {
                self.accept();
            }
            if self.surrogates.tick().is_some_and(|tick| looked.elapsed() >= tick) {
                for event in self.surrogates.look() {
                    self.outbox.push(event);
                }
                looked = Instant::now();
            }
            if ready.surrogates {
                self.hear();
            }
            if let Err(e) = self.converse(ready.daemon) {
                if e.kind() != io::ErrorKind::UnexpectedEof {
                    super::complain(format_args!("connection to the daemon: {e}"));
                }
                self.hang_up();
            }
        }
    }

    fn hear(&mut self) {
        match self.surrogates.receive() {
            Ok(events) => events.into_iter().for_each(|e| self.outbox.push(e)),
            Err(e) => super::complain(format_args!("surrogates' socket: {e}")),
        }
    }

    fn wait(&self, looked: Instant) -> Ready {
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&*self.outbox, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::IN),
        ];
        if let Some(daemon) = &self.daemon {
            // A daemon that does not take answers gets no more of them.
            let full = !daemon.out.is_empty();
            let interest = if full { PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::new(&daemon.socket, interest));
            // While no daemon takes them, reports stay in the socket, and the surrogates that send more wait.
            if !self.outbox.is_busy() {
                fds.push(PollFd::new(&self.surrogates, PollFlags::IN));
            }
        }
        let timeout = self.surrogates.tick().map(|tick| {
            let left = tick.saturating_sub(looked.elapsed());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        let at = |i: usize| fds.get(i).is_some_and(|f| !f.revents().is_empty());
        Ready {
            signal: at(0),
            outbox: at(1),
            socket: at(2),
            daemon: at(3),
            surrogates: at(4),
        }
    }

    fn reap(&self) {
        // Of this thread's children only: those traced by the nudger are its to wait for. WNOTHREAD, WALL.
        let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(0x2000_0000 | 0x4000_0000);
        while let Ok(Some((pid, status))) = rustix::process::wait(options) {
            if !status.stopped() {
                self.outbox.reaped(Pid(pid.as_raw_nonzero().get()), status.as_raw());
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(socket) = rustix::net::accept_with(&self.socket, flags) {
            self.hang_up();
            self.daemon = Some(Daemon {
                socket,
                out: VecDeque::new(),
            });
            let told = std::mem::take(&mut self.told);
            let unanswered = told.into_iter().filter(|e| is_waiting(&self.listener, e)).collect();
            self.outbox.give_back(unanswered);
        }
    }

    fn hang_up(&mut self) {
        let Some(daemon) = self.daemon.take() else {
            return;
        };
        self.hear_out(&daemon);
        let _ = self.steering.end();
        let undelivered = daemon.out.into_iter().filter_map(|packet| match packet.message {
            // Those that wait for an answer are among the told.
            FromInit::Event(Event::Notification { .. }) | FromInit::Answer(..) => None,
            FromInit::Event(event) => Some(event),
        });
        self.outbox.give_back(undelivered.collect());
    }

    /// What a daemon has handed over without waiting counts, however soon it died and whoever came first: it relied on that
    /// when it went on.
    fn hear_out(&mut self, daemon: &Daemon) {
        loop {
            let received = match fdpass::receive(&daemon.socket, false) {
                Ok(received) => received,
                // Said once if it died with answers unread; what it has said comes after that.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(_) => return,
            };
            let Ok((_, request)) = wire::decode::<ToInit>(&received.bytes) else {
                return;
            };
            if let Request::Store { .. } | Request::Drop { .. } | Request::Reserve(_) | Request::Release(_) = request {
                self.answer(request, received.fds);
            }
        }
    }

    /// Sends what is to be sent and answers what is asked.
    fn converse(&mut self, readable: bool) -> io::Result<()> {
        self.send()?;
        for _ in 0..BATCH {
            let Some(daemon) = &self.daemon else {
                return Ok(());
            };
            if !readable || !daemon.out.is_empty() {
                break;
            }
            let received = match fdpass::receive(&daemon.socket, false) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            let (number, request) = wire::decode::<ToInit>(&received.bytes)?;
            let outcome = self.answer(request, received.fds);
            if let Some(daemon) = &mut self.daemon {
                daemon.out.push_back(Packet {
                    message: FromInit::Answer(number, outcome.answer),
                    fds: outcome.fds,
                    claim: outcome.claim,
                });
            }
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let Some(daemon) = &mut self.daemon else {
            return Ok(());
        };
        loop {
            if daemon.out.is_empty() {
                let Some(event) = self.outbox.pop() else {
                    return Ok(());
                };
                if let Event::Notification { .. } = event {
                    if self.told.len() >= MANY_CALLS {
                        self.told.retain(|e| is_waiting(&self.listener, e));
                    }
                    self.told.push(event.clone());
                }
                daemon.out.push_back(Packet {
                    message: FromInit::Event(event),
                    fds: Vec::new(),
                    claim: None,
                });
            }
            while let Some(packet) = daemon.out.front_mut() {
                match packet.send(&daemon.socket) {
                    Ok(()) => daemon.out.pop_front(),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(e) => return Err(e),
                };
            }
        }
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Outcome {
        match request {
            Request::Hello { version } => self.welcome(version),
            Request::Spawn(spec) => launch::program(&spec, &fds, &self.steering, self.cookie, &self.launch).into(),
            Request::MakeSurrogate(spec) => {
                let answer = launch::surrogate(&spec, &self.program, &self.steering, self.cookie, &self.launch);
                if let Answer::Done = answer {
                    self.surrogates.register(spec.pid);
                }
                answer.into()
            }
            Request::RegisterSurrogate(pid) => {
                self.surrogates.register(pid);
                Answer::Done.into()
            }
            Request::UnregisterSurrogate(pid) => {
                // What it has said until now counts.
                self.hear();
                self.surrogates.unregister(pid);
                Answer::Done.into()
            }
            Request::Pidfd { pid, thread } => match spawn::pidfd_open(pid.0, thread, self.cookie) {
                Ok(fd) => Outcome {
                    fds: vec![fd],
                    ..Answer::Done.into()
                },
                Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Answer::Absent.into(),
                Err(e) => failed(format!("pidfd_open({pid})"), &e).into(),
            },
            Request::Signal { pid, signal, info } => self.signal(pid, signal, &info).into(),
            Request::HostPid(pid) => Outcome {
                claim: Some(pid.0),
                ..Answer::Done.into()
            },
            Request::SteerBegin(pid) => self.taken(self.steering.begin(pid)),
            Request::SteerEnd => self.taken(self.steering.end()),
            Request::Reserve(pids) => {
                self.steering.reserve(pids);
                Answer::Done.into()
            }
            Request::Release(pids) => {
                self.steering.release(pids);
                Answer::Done.into()
            }
            Request::Occupy(pids) => {
                self.steering.occupy(pids);
                Answer::Done.into()
            }
            Request::Store { label, blob } => {
                let result = self.store.put(label, Kept { fds, blob });
                done("keeping descriptors", result.map_err(io::Error::from)).into()
            }
            Request::Fetch { label } => self.fetch(&label),
            Request::Drop { label } => match self.store.remove(&label) {
                true => Answer::Done.into(),
                false => Answer::Absent.into(),
            },
            Request::List => Answer::Labels(self.store.labels()).into(),
            Request::Accept { label, blob } => self.accept_callers(label, blob, fds),
        }
    }

    fn signal(&self, pid: Pid, signal: i32, info: &[u8]) -> Answer {
        let Ok(info) = <&[u8; 128]>::try_from(info) else {
            return failed("a signal with half a siginfo", &Errno::INVAL.into());
        };
        let sent = spawn::pidfd_open(pid.0, false, self.cookie).and_then(|fd| pidfd::send(fd, signal, Some(info)));
        match sent {
            Ok(()) => Answer::Done,
            Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Answer::Absent,
            Err(e) => failed(format!("sending signal {signal} to {pid}"), &e),
        }
    }

    fn welcome(&self, version: u32) -> Outcome {
        if version != wire::VERSION {
            // The daemon reads our version and gives up.
            super::complain(format_args!(
                "a daemon of protocol {version} came; this nest speaks {}",
                wire::VERSION
            ));
        }
        let fds = [self.listener.as_fd(), self.program.as_fd()]
            .map(|fd| fd.try_clone_to_owned())
            .into_iter()
            .collect::<io::Result<Vec<_>>>();
        match fds {
            Ok(fds) => Outcome {
                fds,
                ..Answer::Welcome {
                    version: wire::VERSION,
                    cookie: self.cookie,
                    modulus: self.residue.0,
                    slot: self.residue.1,
                }
                .into()
            },
            Err(e) => failed("copying descriptors", &e).into(),
        }
    }

    fn taken(&self, result: io::Result<bool>) -> Outcome {
        match result {
            Ok(taken) => Answer::Taken(taken).into(),
            Err(e) => failed("steering", &e).into(),
        }
    }

    fn accept_callers(&mut self, label: String, mut blob: Vec<u8>, fds: Vec<OwnedFd>) -> Outcome {
        let what = "accepting who waits";
        let accepted = fds
            .first()
            .ok_or(io::ErrorKind::InvalidInput.into())
            .and_then(accept_all);
        let (fds, names): (Vec<OwnedFd>, Vec<SocketAddr>) = match accepted {
            Ok(accepted) if accepted.is_empty() => return Answer::Absent.into(),
            Ok(accepted) => accepted.into_iter().unzip(),
            Err(e) => return failed(what, &e).into(),
        };
        match postcard::to_stdvec(&names) {
            Ok(names) => blob.extend(names),
            Err(e) => return failed(what, &io::Error::other(e)).into(),
        }
        match self.store.put(label.clone(), Kept { fds, blob }) {
            Ok(()) => self.fetch(&label),
            Err(e) => failed(what, &e.into()).into(),
        }
    }

    fn fetch(&self, label: &str) -> Outcome {
        let Some(kept) = self.store.get(label) else {
            return Answer::Absent.into();
        };
        let fds = kept.fds.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
        match fds {
            Ok(fds) => Outcome {
                fds,
                ..Answer::Kept(kept.blob.clone()).into()
            },
            Err(e) => failed("copying descriptors", &e).into(),
        }
    }
}

/// Those who wait at a listening socket, as many as fit into one message. The socket may be one that blocks: all who could take
/// them before us are parked.
fn accept_all(listening: &OwnedFd) -> io::Result<Vec<(OwnedFd, SocketAddr)>> {
    let mut all = Vec::new();
    while all.len() < fdpass::MAX_FDS && tcp::info(listening.as_fd())?.waiting > 0 {
        let (fd, from) = rustix::net::acceptfrom_with(listening, SocketFlags::CLOEXEC)?;
        let from = from.and_then(|any| SocketAddr::try_from(any).ok());
        all.push((fd, from.ok_or(io::ErrorKind::NotConnected)?));
    }
    Ok(all)
}

struct Ready {
    signal: bool,
    outbox: bool,
    socket: bool,
    daemon: bool,
    surrogates: bool,
}

impl Packet {
    fn send(&mut self, socket: &OwnedFd) -> io::Result<()> {
        loop {
            let bytes = wire::encode(&self.message)?;
            let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
            match (fdpass::send(socket, &bytes, &fds, self.claim, false), &self.message) {
                // The task whose number was asked for is no more.
                (Err(e), FromInit::Answer(number, _))
                    if self.claim.is_some() && e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) =>
                {
                    self.message = FromInit::Answer(*number, Answer::Absent);
                    self.claim = None;
                }
                (result, _) => return result,
            }
        }
    }
}

fn is_waiting(listener: &Listener, event: &Event) -> bool {
    match event {
        Event::Notification { id, .. } => listener.is_waiting(*id),
        Event::Reaped { .. }
        | Event::SurrogateSignal { .. }
        | Event::SurrogateChild { .. }
        | Event::SurrogateStopped(_)
        | Event::SurrogateContinued(_)
        | Event::SurrogateGone(_) => false,
    }
}
