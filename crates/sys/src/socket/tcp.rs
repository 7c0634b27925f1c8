//! TCP sockets: captured and made again by the kernel's repair mode.
//!
//! Owns the order of the many small steps, and what each costs if it is left out. Refuses to know where packets go: whoever
//! captures has seen to it that none arrives, and that none of what the copy sends is wrong. Invariants: a captured
//! socket stays in repair, where closing it tells nobody, until [`leave_repair`]; a rebuilt one likewise until
//! [`finish`]. See tcp(7), and net/ipv4/tcp.c for what tcp(7) leaves out.

mod rebuild;

pub use rebuild::{Finish, connect_again, finish, listen, prepare, rebuild};

use super::{Numbers, ask, get_numbers, get_word, readiness, receive, set_numbers, set_word};
use crate::Errno;
use std::io;
use std::os::fd::BorrowedFd;

const TCP: i32 = libc::IPPROTO_TCP;
const SOL: i32 = libc::SOL_SOCKET;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const REPAIR_ON: u32 = 1;
const REPAIR_OFF: u32 = 0;
const REPAIR_OFF_NO_PROBE: u32 = -1i32 as u32;
const NO_QUEUE: u32 = 0;
const RECEIVE_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;
const SIOCINQ: libc::Ioctl = 0x541b;
const SIOCOUTQ: libc::Ioctl = 0x5411;
const SIOCOUTQNSD: libc::Ioctl = 0x894b;
pub(super) const SO_BUF_LOCK: i32 = 72;
/// Bits of tcpi_options.
const HAS_TIMESTAMPS: u8 = 1;
const HAS_SACK: u8 = 2;
const HAS_SCALES: u8 = 4;
/// A queue longer than this is no queue of ours: the largest buffer the kernel would give.
pub const MAX_QUEUE_BYTES: usize = 64 << 20;

/// Where a connection is in its life: the kernel's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Both ways are open.
    Established = 1,
    /// connect(2) has begun.
    SynSent = 2,
    /// Not yet known to any program.
    SynReceived = 3,
    /// We have ended our side; the peer does not know it yet.
    FinWait1 = 4,
    /// We have ended our side, and the peer knows.
    FinWait2 = 5,
    /// No socket of a program is in this state.
    TimeWait = 6,
    /// Not connected, or not any more.
    Closed = 7,
    /// The peer has ended its side.
    CloseWait = 8,
    /// The peer has ended its side, then we ours, and it does not know it yet.
    LastAck = 9,
    /// It takes connections.
    Listening = 10,
    /// Both have ended at the same time.
    Closing = 11,
}

impl State {
    /// By the kernel's number.
    pub fn of(number: u8) -> Option<State> {
        use State::*;
        const ALL: [State; 11] = [
            Established,
            SynSent,
            SynReceived,
            FinWait1,
            FinWait2,
            TimeWait,
            Closed,
            CloseWait,
            LastAck,
            Listening,
            Closing,
        ];
        ALL.into_iter().find(|state| *state as u8 == number)
    }

    /// The peer has ended its side.
    pub fn fin_received(self) -> bool {
        matches!(self, State::CloseWait | State::LastAck | State::Closing)
    }

    /// We have ended our side.
    pub fn fin_sent(self) -> bool {
        matches!(
            self,
            State::FinWait1 | State::FinWait2 | State::LastAck | State::Closing
        )
    }

    /// It can be captured as a [`Connection`].
    pub fn is_connected(self) -> bool {
        self == State::Established || self.fin_received() || self.fin_sent()
    }
}

/// What tcp_info tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Where it is.
    pub state: State,
    options: u8,
    scales: u8,
    /// Of a listener: the connections that wait to be accepted.
    pub waiting: u32,
    /// Of a listener: how many may.
    pub backlog: u32,
    /// How many segments have come in.
    pub segments_in: u32,
}

/// The leading part of `struct tcp_info`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawInfo {
    bytes: [u8; 8],
    words: [u32; 34],
}

// SAFETY: 144 bytes of numbers, no padding.
unsafe impl Numbers for RawInfo {}

/// Asks a TCP socket what it is doing.
pub fn info(socket: BorrowedFd<'_>) -> io::Result<Info> {
    let raw: RawInfo = get_numbers(socket, TCP, libc::TCP_INFO)?;
    let state = State::of(raw.bytes[0]).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Info {
        state,
        options: raw.bytes[5],
        scales: raw.bytes[6],
        waiting: raw.words[4],
        backlog: raw.words[5],
        // tcpi_segs_in is at byte 140.
        segments_in: raw.words[33],
    })
}

/// Sizes of a socket's buffers, and whether the program has fixed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffers {
    /// SO_SNDBUF, as it is read.
    pub send: u32,
    /// SO_RCVBUF, as it is read.
    pub receive: u32,
    /// SO_BUF_LOCK: 1 the sending one, 2 the receiving one.
    pub locked: u32,
}

/// Reads the sizes of the buffers.
pub fn buffers(socket: BorrowedFd<'_>) -> io::Result<Buffers> {
    Ok(Buffers {
        send: get_word(socket, SOL, libc::SO_SNDBUF)?,
        receive: get_word(socket, SOL, libc::SO_RCVBUF)?,
        locked: get_word(socket, SOL, SO_BUF_LOCK).unwrap_or(0),
    })
}

/// Gives the sending buffer room for so many bytes more than are in it, whatever the limit. It grows by itself no more until
/// [`set_buffers`] puts it back.
pub fn make_send_room(socket: BorrowedFd<'_>, more: u32) -> io::Result<()> {
    let queued = ask(socket, SIOCOUTQ)?;
    // What holds the bytes counts, too; and the kernel doubles what it is told.
    let room = get_word(socket, SOL, libc::SO_SNDBUF)?.saturating_add(queued.saturating_add(more).saturating_mul(2));
    Ok(set_word(
        socket,
        SOL,
        libc::SO_SNDBUFFORCE,
        room.min(i32::MAX as u32 / 2),
    )?)
}

/// Makes the buffers as they were; whatever grows by itself goes on doing so.
pub fn set_buffers(socket: BorrowedFd<'_>, wanted: Buffers) -> io::Result<()> {
    let now = buffers(socket)?;
    // The kernel doubles what it is told.
    if now.send != wanted.send {
        set_word(socket, SOL, libc::SO_SNDBUFFORCE, wanted.send / 2)?;
    }
    if now.receive != wanted.receive {
        set_word(socket, SOL, libc::SO_RCVBUFFORCE, wanted.receive / 2)?;
    }
    let forced = now.send != wanted.send || now.receive != wanted.receive;
    if forced || now.locked != wanted.locked & 3 {
        set_word(socket, SOL, SO_BUF_LOCK, wanted.locked & 3)?;
    }
    Ok(())
}

/// A connection, as it travels. Sequence numbers and lengths are those of the bytes: a FIN is in the state alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Where it is in its life.
    pub state: State,
    /// The sequence number of the first byte of `received`.
    pub receive_from: u32,
    /// What has come and was not read.
    pub received: Vec<u8>,
    /// The sequence number of the first byte of `sending`.
    pub send_from: u32,
    /// What was written and is not acknowledged.
    pub sending: Vec<u8>,
    /// How much of it, at its end, was never sent.
    pub unsent: u32,
    /// Our FIN was not sent either.
    pub fin_unsent: bool,
    /// snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// The largest segment that the peer takes.
    pub mss: u32,
    /// Selective acknowledgements are spoken.
    pub sack: bool,
    /// How both sides scale their windows: ours for what we send, theirs.
    pub scales: Option<(u8, u8)>,
    /// The clock of the timestamps, if they are spoken.
    pub timestamp: Option<u32>,
    /// shutdown(SHUT_RD), which the peer does not see.
    pub deaf: bool,
}

/// How far, in milliseconds, the clock of a rebuilt connection is ahead of what was captured. Until it is closed the old
/// socket's timers may send once more (an acknowledgement, what nobody has acknowledged), with timestamps that are as much newer
/// than the captured one as the capture is ago. A peer drops whatever is older than the newest that it has seen. What is too
/// much only makes the first measured round trip longer, by less than the second that the kernel assumes without any.
const AHEAD: u32 = 250;

impl Connection {
    /// The clock of its timestamps, as it is to go on elsewhere.
    pub(super) fn clock_ahead(&self) -> Option<u32> {
        self.timestamp.map(|timestamp| timestamp.wrapping_add(AHEAD))
    }
}

/// Puts a socket into repair: from now on closing it tells nobody, and what is done to its queues is not sent.
/// Errors: EPERM for a listening socket, or without CAP_NET_ADMIN; ENOPROTOOPT for a multipath one.
pub fn enter_repair(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(set_word(socket, TCP, TCP_REPAIR, REPAIR_ON)?)
}

/// Is it in repair?
pub fn in_repair(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(get_word(socket, TCP, TCP_REPAIR)? == 1)
}

/// A socket that was captured, or was about to be, goes on where it is. Repair has taken its SO_REUSEADDR, which is put
/// back. `window` is the [`Connection`]'s, if it is known; if not, the peer is asked for its own.
pub fn leave_repair(socket: BorrowedFd<'_>, reuse_address: bool, window: Option<[u32; 5]>) -> io::Result<()> {
    set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let how = match window {
        Some(window) => {
            set_numbers(socket, TCP, TCP_REPAIR_WINDOW, &Window(window))?;
            REPAIR_OFF_NO_PROBE
        }
        None => REPAIR_OFF,
    };
    set_word(socket, TCP, TCP_REPAIR, how)?;
    set_word(socket, SOL, libc::SO_REUSEADDR, u32::from(reuse_address))?;
    push(socket)
}

/// SO_REUSEADDR, as the program set it: to be read before [`enter_repair`].
pub fn reuses_address(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(get_word(socket, SOL, libc::SO_REUSEADDR)? != 0)
}

/// Captures a connection that is in repair. No packet must come in from before this on.
///
/// The kernel would go on sending by its timers what it counts as not sent: it finds the peer's window shut from here on.
///
/// Errors: InvalidInput for one that is not connected; WouldBlock for one whose urgent byte was not read.
pub fn capture(socket: BorrowedFd<'_>) -> io::Result<Connection> {
    capture_as(socket, &info(socket)?)
}

/// The same of a connection of which this was known when it was in repair already. Has a segment come in since then, it must be
/// captured once more.
pub fn capture_as(socket: BorrowedFd<'_>, info: &Info) -> io::Result<Connection> {
    let state = info.state;
    if !state.is_connected() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut urgent = [0];
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // What is pending, or announced and not yet here. EINVAL: nothing.
    let asked = receive(socket, &mut urgent, flags);
    if asked.is_ok_and(|got| got > 0) || asked == Err(Errno(libc::EAGAIN)) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let window: Window = get_numbers(socket, TCP, TCP_REPAIR_WINDOW)?;
    let outstanding = ask(socket, SIOCOUTQ)?;
    // Nobody writes to it: it has nothing to send, and will not have.
    let is_silent = outstanding == 0;
    if !is_silent {
        set_numbers(socket, TCP, TCP_REPAIR_WINDOW, &Window(shut(window.0)))?;
    }
    let deaf = !state.fin_received() && readiness(socket)? & libc::POLLRDHUP != 0;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let fin_in_queue = state.fin_sent() && state != State::FinWait2;
    let written = get_word(socket, TCP, TCP_QUEUE_SEQ)?;
    let not_sent = match is_silent {
        true => 0,
        false => ask(socket, SIOCOUTQNSD)?,
    };
    let fin_unsent = fin_in_queue && not_sent > 0;
    let send_bytes = outstanding - u32::from(fin_in_queue && outstanding > 0);
    let sending = peek(socket, send_bytes as usize)?;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    let arrived = get_word(socket, TCP, TCP_QUEUE_SEQ)?;
    let received = peek(socket, ask(socket, SIOCINQ)? as usize)?;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let fin_received = u32::from(state.fin_received());
    Ok(Connection {
        state,
        receive_from: arrived.wrapping_sub(fin_received + received.len() as u32),
        received,
        // In FIN-WAIT-2 the peer has acknowledged the FIN, which is one number.
        send_from: written.wrapping_sub(outstanding + u32::from(state == State::FinWait2)),
        sending,
        unsent: not_sent - u32::from(fin_unsent),
        fin_unsent,
        window: window.0,
        mss: get_word(socket, TCP, libc::TCP_MAXSEG)?,
        sack: info.options & HAS_SACK != 0,
        scales: (info.options & HAS_SCALES != 0).then_some((info.scales & 15, info.scales >> 4)),
        timestamp: match info.options & HAS_TIMESTAMPS != 0 {
            true => Some(get_word(socket, TCP, TCP_TIMESTAMP)?),
            false => None,
        },
        deaf,
    })
}

/// Opens the window again that [`capture`] has shut. The socket is in repair.
pub fn set_window(socket: BorrowedFd<'_>, window: [u32; 5]) -> io::Result<()> {
    Ok(set_numbers(socket, TCP, TCP_REPAIR_WINDOW, &Window(window))?)
}

/// Captures a connection once more, because packets have come in during the first time.
pub fn capture_again(socket: BorrowedFd<'_>, before: &Connection) -> io::Result<Connection> {
    let mut now = capture(socket)?;
    if now.window[1] == 0 {
        // We shut it.
        now.window[1] = before.window[1];
        now.window[2] = now.window[2].max(before.window[2]);
    }
    Ok(now)
}

/// What has come and was not read, of a connection that is over.
pub fn unread(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let repaired = in_repair(socket)?;
    if repaired {
        set_word(socket, TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    }
    let bytes = peek(socket, ask(socket, SIOCINQ)? as usize);
    if repaired {
        set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    }
    bytes
}

/// The protocol above TCP that the kernel speaks itself on this socket ("tls", …), if any.
pub fn upper_protocol(socket: BorrowedFd<'_>) -> Option<String> {
    const TCP_ULP: i32 = 31;
    let mut name = [0; 16];
    let length = super::get(socket, TCP, TCP_ULP, &mut name).unwrap_or(0);
    let name = name[..length].split(|byte| *byte == 0).next().unwrap_or_default();
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Window([u32; 5]);

// SAFETY: five numbers, no padding.
unsafe impl Numbers for Window {}

fn shut(mut window: [u32; 5]) -> [u32; 5] {
    window[1] = 0;
    window
}

/// Reads a queue of a socket in repair, without taking it out.
fn peek(socket: BorrowedFd<'_>, length: usize) -> io::Result<Vec<u8>> {
    if length == 0 {
        return Ok(Vec::new());
    }
    if length > MAX_QUEUE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    let got = receive(socket, &mut bytes, libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
    if got == length {
        Ok(bytes)
    } else {
        Err(io::Error::other("a queue holds less than it says"))
    }
}

/// The first sequence number of a connection that is being opened. The socket is in repair.
pub fn first_sequence(socket: BorrowedFd<'_>) -> io::Result<u32> {
    set_word(socket, TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let next = get_word(socket, TCP, TCP_QUEUE_SEQ)?;
    set_word(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    Ok(next.wrapping_sub(1))
}

/// Has the kernel send what it may, whatever it was waiting for. A corked socket stays so.
fn push(socket: BorrowedFd<'_>) -> io::Result<()> {
    // Setting it sends; what it was is put back.
    let before = get_word(socket, TCP, libc::TCP_NODELAY)?;
    set_word(socket, TCP, libc::TCP_NODELAY, 1)?;
    if before == 0 {
        set_word(socket, TCP, libc::TCP_NODELAY, 0)?;
    }
    Ok(())
}
