//! One socket of a process that leaves: looked at again, put into repair, read.
//!
//! Owns what must be known of it from the stop until the move is decided. Refuses to know the others.

use super::leaving::{LeaveError, from_image, kernel, to_image};
use super::{is_tcp, look};
use crate::edge::Inside;
use crate::obstacle;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{self, FrozenSocket, Socket, SocketState};
use dunlin_sys::socket::tcp::{self, State};
use dunlin_sys::socket::{self, FAMILY_V6, udp};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A socket of a process that is parked.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) owner: (Pid, i32),
    /// Its process's number on this machine.
    pub(super) host: i32,
    pub(super) key: u64,
    pub(super) flags: u32,
    pub(super) fd: OwnedFd,
    pub(super) is: Is,
    /// If it is not what the plan says.
    pub(super) changed: Option<Socket>,
    pub(super) state: Option<State>,
    pub(super) reuse: bool,
    pub(super) in_repair: bool,
    /// What was last known of it, in repair.
    pub(super) info: Option<tcp::Info>,
    pub(super) segments: u32,
    pub(super) window: Option<[u32; 5]>,
}

/// What must be known of a socket to read it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Is {
    pub(super) tcp: bool,
    pub(super) v6: bool,
    pub(super) listening: bool,
    pub(super) port: u16,
}

impl Is {
    fn of(socket: &Socket) -> Is {
        Is {
            tcp: is_tcp(socket),
            v6: socket.family == FAMILY_V6,
            listening: socket.listening,
            port: socket.local.map_or(0, |local| local.port()),
        }
    }
}

/// What a look at a socket in the freeze came to.
pub(super) struct Look {
    pub(super) is: Is,
    pub(super) changed: Option<Socket>,
    pub(super) state: Option<State>,
    pub(super) reuse: bool,
}

impl Taken {
    pub(super) fn kernel(&self) -> impl Fn(io::Error) -> LeaveError + use<> {
        let (pid, number) = self.owner;
        move |source| LeaveError::Kernel { pid, number, source }
    }

    pub(super) fn enter_repair(&mut self) -> Result<(), LeaveError> {
        let kernel = self.kernel();
        if self.is.tcp && !self.is.listening {
            tcp::enter_repair(self.fd.as_fd()).map_err(&kernel)?;
            self.in_repair = true;
            let info = tcp::info(self.fd.as_fd()).map_err(&kernel)?;
            (self.state, self.segments) = (Some(info.state), info.segments_in);
            self.info = Some(info);
        }
        Ok(())
    }

    /// Has anything come in since it was captured?
    pub(super) fn has_heard(&mut self) -> Result<bool, LeaveError> {
        if !self.in_repair {
            return Ok(false);
        }
        let kernel = self.kernel();
        let info = tcp::info(self.fd.as_fd()).map_err(&kernel)?;
        let heard = info.segments_in != self.segments || Some(info.state) != self.state;
        self.info = Some(info);
        (self.state, self.segments) = (Some(info.state), info.segments_in);
        Ok(heard)
    }

    pub(super) fn capture(&mut self, before: Option<&FrozenSocket>) -> Result<FrozenSocket, LeaveError> {
        let kernel = self.kernel();
        let state = self.state(before).map_err(&kernel)?;
        let Some(state) = state else {
            return Err(LeaveError::Obstacles(vec![obstacle::descriptor(
                self.owner.0,
                self.owner.1,
                "a connection",
                "it has failed, or got an urgent byte, and the program does not know yet",
                "try again when it does",
            )]));
        };
        let tcp::Buffers { send, receive, locked } = tcp::buffers(self.fd.as_fd()).map_err(&kernel)?;
        Ok(FrozenSocket {
            key: self.key,
            flags: self.flags,
            buffers: [send, receive, locked],
            changed: self.changed.clone(),
            state,
        })
    }

    /// `None`: not now.
    fn state(&mut self, before: Option<&FrozenSocket>) -> io::Result<Option<SocketState>> {
        let fd = self.fd.as_fd();
        let Some(state) = self.state else {
            let waiting = udp::queue(fd, self.is.v6)?;
            let datagram = |udp::Waiting { from, to, bytes }| image::Datagram { from, to, bytes };
            return Ok(Some(SocketState::Datagrams(
                waiting.into_iter().map(datagram).collect(),
            )));
        };
        Ok(Some(match state {
            State::Listening => SocketState::Listening {
                backlog: tcp::info(fd)?.backlog,
                callers: Vec::new(),
            },
            State::SynSent => SocketState::Opening {
                first: tcp::first_sequence(fd)?,
            },
            State::Closed => {
                let ready = socket::readiness(fd)?;
                if ready & socket::FAILED != 0 {
                    return Ok(None);
                }
                match ready & socket::ENDED != 0 {
                    true => SocketState::Over {
                        received: tcp::unread(fd)?,
                    },
                    false => SocketState::Idle,
                }
            }
            _ => {
                let captured = match before.map(|before| &before.state) {
                    Some(SocketState::Connected(before)) => tcp::capture_again(fd, &from_image(before)?),
                    // Whoever has heard since asks again.
                    _ => match &self.info {
                        Some(info) => tcp::capture_as(fd, info),
                        None => tcp::capture(fd),
                    },
                };
                match captured {
                    Ok(connection) => {
                        self.window = Some(connection.window);
                        SocketState::Connected(Box::new(to_image(connection)))
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        }))
    }
}

pub(super) type Looked = Result<Look, Box<Obstacle>>;

pub(super) fn look_at(
    (pid, host): (Pid, i32),
    number: i32,
    fd: &OwnedFd,
    planned: Option<&Socket>,
    inside: Option<Inside>,
) -> Result<Looked, LeaveError> {
    let failed = kernel(pid, number);
    let looked = match planned {
        Some(planned) => look::look_again(host, fd.as_fd(), planned, inside),
        None => look::look(host, fd.as_fd(), inside),
    };
    let changed = match looked.map_err(&failed)? {
        Some(Ok(socket)) => Some(socket),
        Some(Err(reason)) => {
            let refused = obstacle::descriptor(pid, number, "socket", &reason.why, reason.hint);
            return Ok(Err(Box::new(refused)));
        }
        None => None,
    };
    let Some(now) = changed.as_ref().or(planned) else {
        return Err(failed(io::ErrorKind::InvalidData.into()));
    };
    let is = Is::of(now);
    let state = match is.tcp {
        true => Some(tcp::info(fd.as_fd()).map_err(&failed)?.state),
        false => None,
    };
    Ok(Ok(Look {
        is,
        reuse: tcp::reuses_address(fd.as_fd()).map_err(&failed)?,
        state,
        changed,
    }))
}
