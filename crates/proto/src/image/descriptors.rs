//! A process's descriptors, as they travel.
//!
//! Owns the portable form of an open file description of each kind. Refuses to know how one is looked at or made again.
//! Descriptions that refer to each other do so by their keys.

use super::{FileRef, Socket};
use crate::ids::{Pid, RunId};
use serde::{Deserialize, Serialize};

/// A process's descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Files {
    /// The open file descriptions; shared ones stand once.
    pub descriptions: Vec<Description>,
    /// The table, ascending.
    pub table: Vec<Descriptor>,
}

impl Files {
    /// Of each description, the first number that stands for it.
    pub fn numbers(&self) -> Vec<Option<i32>> {
        let mut numbers = vec![None; self.descriptions.len()];
        for descriptor in &self.table {
            if let Some(number) = numbers.get_mut(descriptor.description as usize) {
                number.get_or_insert(descriptor.number);
            }
        }
        numbers
    }

    /// The standard streams of runs among them.
    pub fn streams(&self) -> Vec<(RunId, u8)> {
        let stream = |description: &Description| match description.kind {
            DescriptionKind::Stream { run, stream } => Some((run, stream)),
            _ => None,
        };
        self.descriptions.iter().filter_map(stream).collect()
    }

    /// Does each descriptor have a description, and one number?
    pub fn is_sound(&self) -> bool {
        let listed = |d: &Descriptor| d.number >= 0 && (d.description as usize) < self.descriptions.len();
        self.table.iter().all(listed) && self.table.is_sorted_by(|a, b| a.number < b.number)
    }

    /// The description behind a number.
    pub fn at(&self, number: i32) -> Option<&Description> {
        let at = self.table.binary_search_by_key(&number, |d| d.number).ok()?;
        self.descriptions.get(self.table[at].description as usize)
    }
}

/// One descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// Which of [`Files::descriptions`].
    pub description: u32,
    /// FD_CLOEXEC.
    pub close_on_exec: bool,
}

/// One open file description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The same in every process of a tree that shares it.
    pub key: u64,
    /// What it is.
    pub kind: DescriptionKind,
    /// Open flags without O_CLOEXEC.
    pub flags: u32,
    /// Its offset.
    pub position: u64,
    /// Of one with O_ASYNC: who is signalled (F_GETOWN_EX: kind and number) and by which signal (F_GETSIG).
    pub owner: Option<(i32, Pid, i32)>,
    /// The locks that the process has made through it.
    pub locks: Vec<FileLock>,
}

/// A lock of a file, or of a part of it. See fcntl(2) and flock(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// Whose it is.
    pub kind: LockKind,
    /// Exclusive, or shared with other readers.
    pub write: bool,
    /// Its first byte.
    pub start: u64,
    /// How many bytes; 0 up to the end of the file, wherever that comes to be.
    pub length: u64,
}

/// Whose a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// The process's (F_SETLK).
    Process,
    /// The open file description's (F_OFD_SETLK).
    Description,
    /// The open file description's, and of the whole file (flock).
    Whole,
}

/// What an open file description is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DescriptionKind {
    /// A regular file, found at the same path.
    File(FileRef),
    /// A regular file without a name: its bytes travel.
    Deleted {
        /// Where it was.
        path: Vec<u8>,
        /// Its permissions.
        mode: u32,
        /// Its bytes.
        #[serde(with = "crate::bytes")]
        bytes: Vec<u8>,
    },
    /// A directory.
    Directory(FileRef),
    /// A file of the kernel's own, in /proc or /sys: found by its path, with nothing to compare.
    Kernel(FileRef),
    /// Any file, open as a path only (O_PATH).
    Path(FileRef),
    /// A character device that is the same everywhere: null, zero, full, random, urandom.
    Device(FileRef),
    /// A standard stream of a run.
    Stream {
        /// Which run.
        run: RunId,
        /// 0, 1, 2, or 3 for the terminal.
        stream: u8,
    },
    /// One end of a pipe whose ends all move together.
    Pipe {
        /// Which pipe, among those of the tree.
        pipe: u64,
        /// The writing end.
        write: bool,
        /// F_GETPIPE_SZ.
        capacity: u32,
        /// The bytes in it (with its first reading end only).
        #[serde(with = "crate::bytes")]
        bytes: Vec<u8>,
    },
    /// A socket of the Internet families: what is in it travels apart, once in a whole move.
    Socket(Box<Socket>),
    /// An event counter.
    Event {
        /// Its count.
        count: u64,
        /// EFD_SEMAPHORE.
        semaphore: bool,
    },
    /// An epoll set.
    Epoll {
        /// What it watches.
        watches: Vec<Watch>,
    },
    /// A timer.
    Timer(TimerFd),
    /// Signals to be read: signal N is bit N − 1.
    Signals(u64),
    /// A socket of the unix family.
    Unix(Box<UnixSocket>),
    /// Memory with a descriptor (memfd_create) that nobody has mapped: its bytes travel.
    Memory {
        /// Which of those of the move: its inode at the source.
        inode: u64,
        /// Its name.
        name: Vec<u8>,
        /// Its permissions.
        mode: u32,
        /// F_GET_SEALS.
        seals: u32,
        /// Its bytes.
        #[serde(with = "crate::bytes")]
        bytes: Vec<u8>,
    },
    /// A process (pidfd_open).
    Process(Pid),
}

/// A socket of the unix family, all of whose relations move together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Its number among those of the move: its inode at the source.
    pub inode: u64,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// What it is to others.
    pub state: UnixState,
    /// RCV_SHUTDOWN 1, SEND_SHUTDOWN 2.
    pub shutdown: u8,
    /// Level, number and bytes of each option, in the order in which they are set.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// SO_PASSCRED and SO_PASSSEC.
    pub passes: [bool; 2],
    /// SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK.
    pub buffers: [u32; 3],
    /// User, group and mode of the inode.
    pub owner: (u32, u32, u32),
    /// User and group whom SO_PEERCRED names.
    pub peer_credentials: (u32, u32),
    /// What waits in it, oldest first; inside the freeze only.
    pub queue: Vec<UnixMessage>,
}

/// What a unix socket is to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixState {
    /// It is not connected.
    Idle,
    /// It is connected with the socket of this number.
    Connected(u64),
    /// It was connected, and the other end is closed.
    Alone,
}

/// What waits in a unix socket: a message, or a stretch of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// Its bytes.
    #[serde(with = "crate::bytes")]
    pub bytes: Vec<u8>,
    /// The [keys](Description::key) of descriptions in flight (SCM_RIGHTS).
    pub descriptors: Vec<u64>,
    /// Who sent it, user and group, where that was noted (SCM_CREDENTIALS).
    pub credentials: Option<(Pid, u32, u32)>,
}

/// What an epoll set watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Watch {
    /// The number under which it was added.
    pub number: i32,
    /// The [key](Description::key) of what is watched.
    pub target: u64,
    /// Events and flags as epoll_ctl(2) has them; a watch with EPOLLONESHOT that has fired asks for none.
    pub events: u32,
    /// What comes with each event.
    pub data: u64,
}

/// A timerfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// Its clock.
    pub clock: i32,
    /// TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET, as it was set last.
    pub flags: u32,
    /// When it expires next, nanoseconds: by the process's own clock, which for a timer of CLOCK_REALTIME that was set
    /// without TFD_TIMER_ABSTIME is CLOCK_MONOTONIC. `None`: it is not armed.
    pub expires_ns: Option<i64>,
    /// From then on, nanoseconds; 0: never again.
    pub interval_ns: u64,
    /// Expirations that nobody has read.
    pub ticks: u64,
}
