//! How a TCP socket becomes what another was.
//!
//! Owns the order in which that is done. Refuses to know when: the caller has [`finish`] called when packets may come.

use super::super::options::{self, SocketOption};
use super::super::{ask, get_word, send, set, set_numbers, set_word, wire};
use super::{
    Buffers, Connection, MAX_QUEUE_BYTES, NO_QUEUE, RECEIVE_QUEUE, REPAIR_OFF, REPAIR_OFF_NO_PROBE, SEND_QUEUE,
    SIOCOUTQ, SOL, State, TCP, TCP_QUEUE_SEQ, TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_REPAIR_WINDOW, TCP_TIMESTAMP, Window,
    enter_repair, info, push, set_buffers, shut,
};
use crate::Errno;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

const TCP_REPAIR_OPTIONS: i32 = 22;
/// Codes of the options that TCP_REPAIR_OPTIONS takes.
const OPTION_MSS: u32 = 2;
const OPTION_WINDOW: u32 = 3;
const OPTION_SACK: u32 = 4;
const OPTION_TIMESTAMP: u32 = 8;
/// What is given to the kernel at once: few enough pages for one packet buffer.
const CHUNK: usize = 32 << 10;

/// Does with a new TCP socket what can be done before its connection is known: it is in repair then and has its address.
/// Repair binds to any port, whoever else has it.
pub fn prepare(socket: BorrowedFd<'_>, local: SocketAddr) -> io::Result<()> {
    enter_repair(socket)?;
    Ok(rustix::net::bind(socket, &local)?)
}

/// Makes a prepared socket the connection that was captured. It stays in repair.
///
/// `deliver` brings a packet that the peer once sent to the network namespace of the socket.
pub fn rebuild(
    socket: BorrowedFd<'_>,
    local: SocketAddr,
    remote: SocketAddr,
    connection: &Connection,
    deliver: &dyn Fn(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let queue = |queue| set_word(socket, TCP, TCP_REPAIR_QUEUE, queue);
    queue(SEND_QUEUE)?;
    set_word(socket, TCP, TCP_QUEUE_SEQ, connection.send_from)?;
    queue(RECEIVE_QUEUE)?;
    set_word(socket, TCP, TCP_QUEUE_SEQ, connection.receive_from)?;
    queue(NO_QUEUE)?;
    rustix::net::connect(socket, &remote)?;
    set_spoken(socket, connection)?;
    if !connection.received.is_empty() {
        queue(RECEIVE_QUEUE)?;
        fill(socket, &connection.received, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)?;
    }
    let unsent = (connection.unsent as usize).min(connection.sending.len());
    let (sent, unsent) = connection.sending.split_at(connection.sending.len() - unsent);
    queue(SEND_QUEUE)?;
    if !sent.is_empty() {
        fill(socket, sent, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE)?;
    }
    let data_end = connection.receive_from.wrapping_add(connection.received.len() as u32);
    let mut window = connection.window;
    if connection.state.fin_received() && window[4] == data_end.wrapping_add(1) {
        // The FIN is still to come, and must be welcome.
        window[4] = data_end;
        window[3] += 1;
    }
    let set_window = || set_numbers(socket, TCP, TCP_REPAIR_WINDOW, &Window(window));
    set_window()?;
    let fins = Fins {
        local,
        remote,
        connection,
        data_end,
    };
    // Who ended first makes another state.
    if connection.state == State::LastAck {
        fins.deliver(deliver)?;
    }
    let all_sent = unsent.is_empty() && !connection.fin_unsent;
    if connection.state.fin_sent() && all_sent {
        rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?;
    }
    if !all_sent {
        queue_unsent(socket, unsent, connection.fin_unsent, window)?;
        set_window()?;
    }
    queue(NO_QUEUE)?;
    if connection.state != State::LastAck {
        fins.deliver(deliver)?;
    }
    if connection.deaf {
        rustix::net::shutdown(socket, rustix::net::Shutdown::Read)?;
    }
    let state = info(socket)?.state;
    if state != connection.state {
        let what = format!("a connection came to be {state:?} where it was {:?}", connection.state);
        return Err(io::Error::other(what));
    }
    Ok(())
}

/// What both sides agreed on when they met.
fn set_spoken(socket: BorrowedFd<'_>, connection: &Connection) -> io::Result<()> {
    let mut options = vec![[OPTION_MSS, connection.mss]];
    if connection.sack {
        options.push([OPTION_SACK, 0]);
    }
    if let Some((ours, theirs)) = connection.scales {
        options.push([OPTION_WINDOW, u32::from(ours) | u32::from(theirs) << 16]);
    }
    if connection.timestamp.is_some() {
        options.push([OPTION_TIMESTAMP, 0]);
    }
    let bytes: Vec<u8> = options.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect();
    set(socket, TCP, TCP_REPAIR_OPTIONS, &bytes)?;
    if let Some(timestamp) = connection.clock_ahead() {
        set_word(socket, TCP, TCP_TIMESTAMP, timestamp)?;
    }
    Ok(())
}

/// Puts bytes into the chosen queue, making room where it is needed.
fn fill(socket: BorrowedFd<'_>, bytes: &[u8], size: i32, force: i32) -> io::Result<()> {
    let mut left = bytes;
    let mut room = get_word(socket, SOL, size)? as usize;
    if room < bytes.len().saturating_mul(2) {
        room = bytes.len() * 2;
        set_word(socket, SOL, force, room as u32)?;
    }
    while !left.is_empty() {
        match send(socket, &left[..left.len().min(CHUNK)], libc::MSG_DONTWAIT) {
            Ok(sent) => left = &left[sent..],
            Err(Errno(libc::EAGAIN | libc::ENOMEM)) if room < 16 * MAX_QUEUE_BYTES => {
                room *= 2;
                set_word(socket, SOL, force, room as u32)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Bytes that were never sent must stay so: what is queued in repair counts as sent. Out of repair, against a window that
/// is shut, the kernel only queues them.
fn queue_unsent(socket: BorrowedFd<'_>, unsent: &[u8], fin: bool, window: [u32; 5]) -> io::Result<()> {
    set_numbers(socket, TCP, TCP_REPAIR_WINDOW, &Window(shut(window)))?;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    set_word(socket, TCP, TCP_REPAIR, REPAIR_OFF_NO_PROBE)?;
    let queued = fill(socket, unsent, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE);
    let ended = match fin {
        true => rustix::net::shutdown(socket, rustix::net::Shutdown::Write).map_err(io::Error::from),
        false => Ok(()),
    };
    enter_repair(socket)?;
    queued.and(ended)
}

/// The packets by which the kernel learns of a FIN of the peer, or that the peer has ours.
struct Fins<'a> {
    local: SocketAddr,
    remote: SocketAddr,
    connection: &'a Connection,
    data_end: u32,
}

impl Fins<'_> {
    fn deliver(&self, deliver: &dyn Fn(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let Connection { state, sending, .. } = self.connection;
        let all_sent = self.connection.send_from.wrapping_add(sending.len() as u32);
        let segment = |flags, acknowledges| {
            let scale = self.connection.scales.map_or(0, |(ours, _)| ours);
            let segment = wire::Segment {
                from: self.remote,
                to: self.local,
                sequence: self.data_end,
                acknowledges,
                flags,
                window: (self.connection.window[1] >> scale).min(u32::from(u16::MAX)) as u16,
                bytes: &[],
            };
            segment.packet()
        };
        if *state == State::FinWait2 {
            deliver(&segment(wire::ACK, all_sent.wrapping_add(1))?)?;
        }
        if state.fin_received() {
            deliver(&segment(wire::ACK | wire::FIN, self.connection.send_from)?)?;
        }
        Ok(())
    }
}

/// What is left to do when a rebuilt socket may speak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// The buffers as they were.
    pub buffers: Buffers,
    /// Of these, the late ones are set now.
    pub options: Vec<SocketOption>,
}

/// Has a rebuilt connection speak. If bytes are under way, or wait, the peer is asked at once what it has.
pub fn finish(socket: BorrowedFd<'_>, finish: &Finish) -> io::Result<()> {
    let waits = ask(socket, SIOCOUTQ)? > 0;
    set_word(
        socket,
        TCP,
        TCP_REPAIR,
        if waits { REPAIR_OFF } else { REPAIR_OFF_NO_PROBE },
    )?;
    set_buffers(socket, finish.buffers)?;
    options::set_late(socket, &finish.options)?;
    if waits { push(socket) } else { Ok(()) }
}

/// Begins again a connection that was being opened, with the first sequence number that it had: whoever has seen the first
/// packet takes the second for the same. The socket must not block. See connect(2).
pub fn connect_again(socket: BorrowedFd<'_>, remote: SocketAddr, first: u32, finish: &Finish) -> io::Result<()> {
    set_word(socket, TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    set_word(socket, TCP, TCP_QUEUE_SEQ, first)?;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    set_word(socket, TCP, TCP_REPAIR, REPAIR_OFF_NO_PROBE)?;
    set_buffers(socket, finish.buffers)?;
    options::set_late(socket, &finish.options)?;
    match rustix::net::connect(socket, &remote) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes a prepared socket a listening one, as free with its port as a program may be: two that listen do conflict.
pub fn listen(socket: BorrowedFd<'_>, backlog: u32, finish: &Finish) -> io::Result<()> {
    set_word(socket, TCP, TCP_REPAIR, REPAIR_OFF_NO_PROBE)?;
    set_word(socket, SOL, libc::SO_REUSEADDR, 1)?;
    rustix::net::listen(socket, backlog.min(i32::MAX as u32) as i32)?;
    set_buffers(socket, finish.buffers)?;
    options::set_late(socket, &finish.options)
}
