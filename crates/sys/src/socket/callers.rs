//! Connections that nobody has accepted yet: put into the queue of a listening socket.
//!
//! Owns the porter (bpf/porter.bpf.c), a program in the kernel which has the kernel take a segment of ours for the last one of a
//! handshake, and the segments: that one, which brings all that both sides agreed on, then what the peer had sent. Refuses to know
//! where connections come from; [`tcp::capture`] reads them. Invariants: whoever does not know the
//! porter's secret is not let in; putting in what is there already changes nothing.

use super::tcp::{self, Connection, State};
use super::wire::{self, Segment};
use super::{get_word, set_word};
use crate::bpf::{self, Instruction, Side};
use aya_obj::btf::{Btf, BtfKind};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/porter.bpf.o"));

/// What the kernel calls it: since Linux 6.9.
const ASSIGN: &str = "bpf_sk_assign_tcp_reqsk";
/// What bpf/porter.bpf.c has in place of its number, and of the secret.
const ASSIGN_PLACE: i32 = 0x7ffe;
const SECRET_PLACE: u64 = 0x5ec2_e75e_c2e7_5ec2;
/// The kind of option that the secret is in.
const KNOCK: u8 = 253;
/// What the peer had sent comes in pieces that every link takes, headers included.
const PIECE_BYTES: usize = 1200;
/// A new connection has room for this, whatever its buffers.
const SMALL_BYTES: usize = 1 << 10;
const WITHIN: Duration = Duration::from_secs(1);
const SOL: i32 = libc::SOL_SOCKET;

/// The program that lets connections in, loaded.
#[derive(Debug)]
pub struct Porter {
    program: OwnedFd,
    secret: u64,
}

/// Lets connections in, until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it sends the porter away"]
pub struct OnDuty {
    /// One for each device.
    _links: Vec<OwnedFd>,
}

/// A connection in the queue of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who calls.
    pub from: SocketAddr,
    /// Whom it has called.
    pub to: SocketAddr,
    /// As it was captured.
    pub connection: Connection,
    /// The peer has broken it off since.
    pub reset: bool,
}

impl Porter {
    /// Loads it. Errors: Unsupported before Linux 6.9, or where the kernel does not describe itself (CONFIG_DEBUG_INFO_BTF).
    pub fn load() -> io::Result<Porter> {
        let absent = |why: &dyn std::fmt::Display| {
            let what =
                format!("{ASSIGN} is not in this kernel (it is since Linux 6.9, with CONFIG_DEBUG_INFO_BTF): {why}");
            io::Error::new(io::ErrorKind::Unsupported, what)
        };
        let kernel = Btf::from_sys_fs().map_err(|e| absent(&e))?;
        let assign = kernel
            .id_by_type_name_kind(ASSIGN, BtfKind::Func)
            .map_err(|e| absent(&e))?;
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let secret = u64::from_ne_bytes(bytes);
        let program = bpf::load_classifier("porter", &instructions(assign, secret)?)?;
        Ok(Porter { program, secret })
    }

    /// Has it see what comes in by these devices, of the calling thread's network namespace.
    pub fn watch(&self, devices: &[u32]) -> io::Result<OnDuty> {
        let each = devices
            .iter()
            .map(|device| bpf::attach(self.program.as_fd(), *device, Side::Ingress));
        Ok(OnDuty {
            _links: each.collect::<io::Result<_>>()?,
        })
    }

    /// Has connections wait at a listening socket, in this order behind those which do already. `deliver` brings a packet that a
    /// peer might have sent to where the porter watches. Of several sockets that share a port (SO_REUSEPORT) the kernel chooses.
    ///
    /// Errors: InvalidInput for what no connection of nobody can be, before anything is done; else those before it are let in, and
    /// asking again is right.
    pub fn let_in(
        &self,
        listening: BorrowedFd<'_>,
        callers: &[Caller],
        deliver: &dyn Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if !callers.iter().all(Caller::is_sound) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // A new connection has the buffers of the listening socket, and theirs may have grown.
        let before = tcp::buffers(listening)?;
        let most = callers.iter().map(|caller| caller.connection.received.len()).max();
        let most = most.unwrap_or(0);
        if most > SMALL_BYTES {
            set_word(listening, SOL, libc::SO_RCVBUFFORCE, (most * 4) as u32)?;
            set_word(listening, SOL, tcp::SO_BUF_LOCK, before.locked & 3)?;
        }
        let shared = get_word(listening, SOL, libc::SO_REUSEPORT)? != 0;
        // The packets of two processors would overtake each other.
        let on_one = OneProcessor::stay();
        let done = callers.iter().try_for_each(|caller| {
            let there = tcp::info(listening)?.waiting;
            deliver(&caller.opening(&self.knock(&caller.connection))?)?;
            if !shared {
                await_one_more(listening, there, caller)?;
            }
            caller.say(deliver)
        });
        drop(on_one);
        if most > SMALL_BYTES {
            tcp::set_buffers(listening, before)?;
        }
        done
    }

    /// The same, where it has been begun before: so many of them as wait there need not be let in again.
    pub fn go_on(
        &self,
        listening: BorrowedFd<'_>,
        callers: &[Caller],
        deliver: &dyn Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let there = callers.len().min(tcp::info(listening)?.waiting as usize);
        let (there, rest) = callers.split_at(there);
        if let Some(last) = there.last() {
            last.say(deliver)?;
        }
        self.let_in(listening, rest, deliver)
    }

    /// The option that the porter knows: the secret, and what the kernel must know of the connection (in the form of its
    /// `struct bpf_tcp_req_attrs`).
    fn knock(&self, connection: &Connection) -> [u8; 32] {
        let (for_ours, for_theirs) = connection.scales.unwrap_or_default();
        let mut option = [0; 32];
        option[..4].copy_from_slice(&[KNOCK, 32, 0, 0]);
        option[4..12].copy_from_slice(&self.secret.to_ne_bytes());
        // Of the peer's clock nothing is known; the kernel takes none for that.
        option[16..20].copy_from_slice(&connection.clock_ahead().unwrap_or_default().to_ne_bytes());
        option[20..22].copy_from_slice(&(connection.mss.min(u32::from(u16::MAX)) as u16).to_ne_bytes());
        option[22..29].copy_from_slice(&[
            for_theirs,
            for_ours,
            0,
            u8::from(connection.scales.is_some()),
            u8::from(connection.sack),
            u8::from(connection.timestamp.is_some()),
            0,
        ]);
        option
    }
}

impl Caller {
    /// Is it what a connection can be that nobody has accepted?
    fn is_sound(&self) -> bool {
        let Connection {
            state, sending, deaf, ..
        } = &self.connection;
        matches!(state, State::Established | State::CloseWait) && sending.is_empty() && !deaf
    }

    /// The last segment of its handshake.
    fn opening(&self, knock: &[u8; 32]) -> io::Result<Vec<u8>> {
        self.segment(0, wire::ACK, &[]).packet_with(knock)
    }

    /// Says again what its peer has said.
    fn say(&self, deliver: &dyn Fn(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut at = 0;
        for piece in self.connection.received.chunks(PIECE_BYTES) {
            deliver(&self.segment(at, wire::ACK | wire::PSH, piece).packet()?)?;
            at += piece.len() as u32;
        }
        if self.connection.state.fin_received() {
            deliver(&self.segment(at, wire::ACK | wire::FIN, &[]).packet()?)?;
            at += 1;
        }
        if self.reset {
            deliver(&self.segment(at, wire::ACK | wire::RST, &[]).packet()?)?;
        }
        Ok(())
    }

    /// What the peer might have sent, so many bytes after the first of those that were not read.
    fn segment<'a>(&self, after: u32, flags: u8, bytes: &'a [u8]) -> Segment<'a> {
        let Connection { window, scales, .. } = &self.connection;
        let scale = scales.map_or(0, |(for_ours, _)| for_ours);
        Segment {
            from: self.from,
            to: self.to,
            sequence: self.connection.receive_from.wrapping_add(after),
            acknowledges: self.connection.send_from,
            flags,
            window: window[1].checked_shr(scale.into()).unwrap_or(0).min(u16::MAX.into()) as u16,
            bytes,
        }
    }
}

/// What was sent may still be on its way to the kernel's other half.
fn await_one_more(listening: BorrowedFd<'_>, than: u32, caller: &Caller) -> io::Result<()> {
    let until = Instant::now() + WITHIN;
    while tcp::info(listening)?.waiting <= than {
        if Instant::now() > until {
            let what = format!("the kernel did not let {} wait at {}", caller.from, caller.to);
            return Err(io::Error::other(what));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Has the calling thread stay where it is, until it is dropped.
struct OneProcessor(Option<CpuSet>);

impl OneProcessor {
    fn stay() -> OneProcessor {
        let before = sched_getaffinity(None).ok();
        let mut here = CpuSet::new();
        here.set(rustix::thread::sched_getcpu());
        // Where it cannot be had, order is likely all the same.
        OneProcessor(before.filter(|_| sched_setaffinity(None, &here).is_ok()))
    }
}

impl Drop for OneProcessor {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = sched_setaffinity(None, before);
        }
    }
}

/// The program, with what only this kernel and this daemon know in its place.
fn instructions(assign: u32, secret: u64) -> io::Result<Vec<Instruction>> {
    const CALL: u8 = 0x85;
    const LOAD_DOUBLE: u8 = 0x18;
    const PSEUDO_KERNEL_FUNCTION: u8 = 2;
    let object = aya_obj::Object::parse(OBJECT).map_err(io::Error::other)?;
    let function = object.functions.values().next().expect("the object has one");
    let mut all: Vec<Instruction> = function
        .instructions
        .iter()
        .map(|i| Instruction {
            code: i.code,
            registers: i.dst_reg() | i.src_reg() << 4,
            offset: i.off,
            immediate: i.imm,
        })
        .collect();
    let mut placed = (0, 0);
    for at in 0..all.len() {
        if all[at].code == CALL && all[at].immediate == ASSIGN_PLACE {
            all[at].registers = PSEUDO_KERNEL_FUNCTION << 4;
            all[at].immediate = assign as i32;
            placed.0 += 1;
        }
        if all[at].code == LOAD_DOUBLE && at + 1 < all.len() {
            let value = all[at].immediate as u32 as u64 | (all[at + 1].immediate as u32 as u64) << 32;
            if value == SECRET_PLACE {
                all[at].immediate = secret as u32 as i32;
                all[at + 1].immediate = (secret >> 32) as u32 as i32;
                placed.1 += 1;
            }
        }
    }
    assert_eq!(placed, (1, 1), "the porter has another form");
    Ok(all)
}
