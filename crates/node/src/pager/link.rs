//! The image store at the client: two connections to the holder of one image, made again as often as they break.
//!
//! Invariants: nothing is asked before both connections are past their hello; whatever was asked on a connection that
//! broke is handed back; attempts to connect have a bounded rate and never end, for the program can only wait.

use super::claims::Bell;
use super::lane::{Lane, Pool, Reply};
use super::store::{Arrival, Store, Urgency};
use super::{Connect, Connections};
use dunlin_cluster::page_map::Want;
use dunlin_proto::ids::ImageId;
use dunlin_proto::pages::{self, ClientId, Hello, WELCOME_BYTES, Welcome};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::sockopt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

/// Requests in flight on the bulk connection: at 256 KiB each enough for 10 Gbit/s over 3 ms, and for a holder or a pager
/// that has to wait for a CPU.
const WINDOW: usize = 16;
/// The same while a program faults: on a machine that is short of CPUs, holder or pager have the CPU until they have
/// dealt with all of it.
const NARROW_WINDOW: usize = 4;
/// A page behind so many bulk replies comes sooner if it is asked for again.
const SOON: usize = 2;
/// The first pause between attempts to connect, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// A holder that does not answer a hello in time is gone.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A holder that acknowledges nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(10);

/// The link to one image.
pub(super) struct Link {
    image: ImageId,
    client: ClientId,
    connect: Arc<Connect>,
    bell: Arc<Bell>,
    state: State,
    backoff: Duration,
    releasing: bool,
    /// To be asked as soon as the link is up.
    survey: Vec<(u64, u64)>,
}

enum State {
    /// A thread is connecting; its result comes here.
    Connecting(Receiver<io::Result<(TcpStream, TcpStream)>>),
    Up(Box<Lanes>),
    /// Until then.
    Pausing(Instant),
    /// It broke; to be reported.
    Broken {
        asked: Vec<Want>,
        why: String,
    },
    Released,
}

struct Lanes {
    faults: Lane,
    bulk: Lane,
    /// The bulk is asked for in batches: from when half of what was asked has come until the window is full. One write
    /// then carries many requests, and one wake serves them.
    filling: bool,
    window: usize,
}

impl Link {
    pub(super) fn new(image: ImageId, client: ClientId, connect: Arc<Connect>, bell: Arc<Bell>) -> Link {
        let mut link = Link {
            image,
            client,
            connect,
            bell,
            state: State::Released,
            backoff: BACKOFF.0,
            releasing: false,
            survey: Vec::new(),
        };
        link.start();
        link
    }

    fn start(&mut self) {
        let (send, receive) = channel();
        let (image, client, connect, bell) = (self.image, self.client, self.connect.clone(), self.bell.clone());
        let work = move || {
            // The family may have ended meanwhile: then nobody wants to know.
            let _ = send.send(introduce(image, client, &*connect));
            bell.ring();
        };
        self.state = match std::thread::Builder::new().name("dunlin-connect".into()).spawn(work) {
            Ok(_) => State::Connecting(receive),
            Err(e) => State::Broken {
                asked: Vec::new(),
                why: e.to_string(),
            },
        };
    }

    fn fail(&mut self, why: io::Error, pool: &mut Pool) {
        let asked = match std::mem::replace(&mut self.state, State::Released) {
            State::Up(lanes) => {
                let mut asked = lanes.faults.unanswered(pool);
                asked.extend(lanes.bulk.unanswered(pool));
                asked
            }
            State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released => Vec::new(),
        };
        self.state = State::Broken {
            asked,
            why: why.to_string(),
        };
    }

    fn lane(&mut self, urgency: Urgency) -> Option<&mut Lane> {
        match (&mut self.state, urgency) {
            (State::Up(lanes), Urgency::Now) => Some(&mut lanes.faults),
            (State::Up(lanes), Urgency::Later) => Some(&mut lanes.bulk),
            (State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released, _) => None,
        }
    }

    fn came_up(&mut self, (faults, bulk): (TcpStream, TcpStream), pool: &mut Pool) -> bool {
        let bulk = match Lane::read_aside(bulk, self.bell.clone(), pool) {
            Ok(bulk) => bulk,
            Err(error) => {
                self.fail(error, pool);
                return false;
            }
        };
        let mut lanes = Lanes {
            faults: Lane::new(faults, pool),
            bulk,
            filling: true,
            window: WINDOW,
        };
        for (start, pages) in &self.survey {
            lanes.bulk.ask_scan(*start, *pages);
        }
        if self.releasing {
            lanes.bulk.ask_release();
        }
        self.state = State::Up(Box::new(lanes));
        true
    }

    fn known(&mut self, from: u64, to: u64, last: bool) {
        // What has been answered need not be asked again after the next break.
        self.survey.retain_mut(|(start, pages)| {
            let end = *start + *pages * pages::PAGE_BYTES as u64;
            if *start == from {
                *start = to;
                *pages = (end - to) / pages::PAGE_BYTES as u64;
                return !last && *pages > 0;
            }
            true
        });
    }
}

impl Store for Link {
    fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_)) && !self.releasing
    }

    fn has_room(&self) -> bool {
        match &self.state {
            State::Up(lanes) => lanes.filling && !self.releasing,
            State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released => false,
        }
    }

    fn narrow(&mut self, narrow: bool) {
        if let State::Up(lanes) = &mut self.state {
            lanes.window = if narrow { NARROW_WINDOW } else { WINDOW };
        }
    }

    fn wanted(&mut self, want: Want, urgency: Urgency) {
        if let Some(lane) = self.lane(urgency) {
            lane.ask_pages(want);
        }
        if let State::Up(lanes) = &mut self.state {
            lanes.filling &= lanes.bulk.outstanding() < lanes.window;
        }
    }

    fn is_idle(&self) -> bool {
        match &self.state {
            State::Up(lanes) => lanes.faults.outstanding() == 0 && lanes.bulk.outstanding() == 0,
            State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released => false,
        }
    }

    fn is_urgent(&self) -> bool {
        match &self.state {
            State::Up(lanes) => lanes.faults.outstanding() > 0,
            State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released => false,
        }
    }

    fn comes_soon(&self, source: u64) -> bool {
        match &self.state {
            State::Up(lanes) => {
                lanes.faults.position_of(source).is_some() || lanes.bulk.position_of(source).is_some_and(|n| n < SOON)
            }
            State::Connecting(_) | State::Pausing(_) | State::Broken { .. } | State::Released => false,
        }
    }

    fn survey(&mut self, ranges: Vec<(u64, u64)>) {
        if let Some(lane) = self.lane(Urgency::Later) {
            ranges.iter().for_each(|(start, pages)| lane.ask_scan(*start, *pages));
        }
        self.survey.extend(ranges);
    }

    fn release(&mut self) {
        if !self.releasing {
            self.releasing = true;
            if let Some(lane) = self.lane(Urgency::Later) {
                lane.ask_release();
            }
        }
    }

    fn flush(&mut self) {
        if let State::Up(lanes) = &mut self.state {
            // What is broken says so when it is read.
            let _ = lanes.faults.flush().and_then(|()| lanes.bulk.flush());
        }
    }

    fn poll_set<'a>(&'a self, add: &mut dyn FnMut(BorrowedFd<'a>, PollFlags)) {
        if let State::Up(lanes) = &self.state {
            // Who reads the bulk rings.
            for (lane, read) in [(&lanes.faults, true), (&lanes.bulk, false)] {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, read);
                flags.set(PollFlags::OUT, lane.wants_to_write());
                if !flags.is_empty() {
                    add(lane.as_fd(), flags);
                }
            }
        }
    }

    fn is_ready(&self, bulk: bool) -> bool {
        match &self.state {
            State::Up(lanes) => lanes.faults.has_surplus() || bulk && lanes.bulk.has_surplus(),
            State::Broken { .. } => true,
            State::Connecting(_) | State::Pausing(_) | State::Released => false,
        }
    }

    fn next_tick(&self) -> Option<Duration> {
        match &self.state {
            State::Pausing(until) => Some(until.saturating_duration_since(Instant::now())),
            State::Connecting(_) | State::Up(_) | State::Broken { .. } | State::Released => None,
        }
    }

    fn tick(&mut self, now: Instant) {
        if matches!(&self.state, State::Pausing(until) if *until <= now) {
            self.start();
        }
    }

    fn take(&mut self, urgency: Urgency, pool: &mut Pool) -> Option<Arrival> {
        match &mut self.state {
            State::Connecting(result) => match result.try_recv() {
                Ok(Ok(streams)) => {
                    if self.came_up(streams, pool) {
                        return Some(Arrival::Up);
                    }
                }
                // It has released us and the answer got lost.
                Ok(Err(e)) if self.releasing && e.kind() == io::ErrorKind::NotFound => {
                    self.state = State::Released;
                    return Some(Arrival::Released);
                }
                Ok(Err(e)) => self.fail(e, pool),
                Err(TryRecvError::Disconnected) => self.fail(io::ErrorKind::Other.into(), pool),
                Err(TryRecvError::Empty) => return None,
            },
            State::Up(lanes) => {
                let lane = match urgency {
                    Urgency::Now => &mut lanes.faults,
                    Urgency::Later => &mut lanes.bulk,
                };
                let received = lane.flush().and_then(|()| lane.receive(pool));
                // Whatever came: as long as nothing is under way, there has to be room.
                lanes.filling |= lanes.bulk.outstanding() <= lanes.window / 2;
                match received {
                    Ok(None) => return None,
                    Ok(Some(Reply::Pages { want, present, data })) => {
                        // Not earlier: a holder that accepts and breaks is not to be asked at full speed.
                        self.backoff = BACKOFF.0;
                        return Some(Arrival::Pages { want, present, data });
                    }
                    Ok(Some(Reply::Scan {
                        from,
                        to,
                        present,
                        last,
                    })) => {
                        self.known(from, to, last);
                        return Some(Arrival::Known { from, to, present });
                    }
                    Ok(Some(Reply::Released)) => {
                        self.state = State::Released;
                        return Some(Arrival::Released);
                    }
                    Err(e) => self.fail(e, pool),
                }
            }
            State::Pausing(_) | State::Released => return None,
            State::Broken { .. } => {}
        }
        if let State::Broken { asked, why } = &mut self.state {
            let arrival = Arrival::Down {
                asked: std::mem::take(asked),
                why: std::mem::take(why),
            };
            self.state = State::Pausing(Instant::now() + self.backoff);
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
            return Some(arrival);
        }
        None
    }
}

/// Connects and says hello on both; runs on a thread of its own, for it may take long.
fn introduce(image: ImageId, client: ClientId, connect: &Connect) -> io::Result<(TcpStream, TcpStream)> {
    let Connections { mut faults, mut bulk } = connect(image)?;
    for (stream, lane) in [(&mut faults, pages::Lane::Faults), (&mut bulk, pages::Lane::Bulk)] {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        sockopt::set_socket_keepalive(&*stream, true)?;
        sockopt::set_tcp_keepidle(&*stream, SILENCE / 2)?;
        sockopt::set_tcp_keepintvl(&*stream, Duration::from_secs(1))?;
        sockopt::set_tcp_keepcnt(&*stream, 5)?;
        sockopt::set_tcp_user_timeout(&*stream, SILENCE.as_millis() as u32)?;
        stream.write_all(&Hello { image, client, lane }.encode())?;
        let mut welcome = [0; WELCOME_BYTES];
        stream.read_exact(&mut welcome)?;
        match Welcome::decode(&welcome).map_err(io::Error::from)? {
            Welcome::Come => {}
            Welcome::UnknownImage => {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "the holder does not know the image",
                ));
            }
        }
        stream.set_read_timeout(None)?;
    }
    // The bulk is read by a thread that has nothing else to do.
    faults.set_nonblocking(true)?;
    Ok((faults, bulk))
}
