//! What a daemon and the init of its nest say to each other, over `init.sock` (a packet socket).
//!
//! Owns the message types. Refuses to know what they do. One packet is one message in postcard form; descriptors travel
//! beside it and a message says how many it means. Requests are answered in order; events come in between.
//! [`VERSION`] is raised by every change: a daemon never talks to an init of another version, whose nest must end first.

use dunlin_proto::ids::Pid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io;

/// Both ends must have this one.
pub const VERSION: u32 = 3;

/// The file in a node's state directory.
pub const SOCKET_NAME: &str = "init.sock";

/// What init needs to build a nest; the first message on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Blueprint {
    /// The sender's [`VERSION`].
    pub version: u32,
    /// The cluster's name: the hostname, and part of the cgroup's path.
    pub cluster: String,
    /// The node's name.
    pub node: String,
    /// The node's slot.
    pub slot: u16,
    /// The cluster's modulus.
    pub modulus: u16,
    /// The first PID that is never given out.
    pub pid_limit: Option<i32>,
    /// Added to the monotonic clocks.
    pub clock_offset_seconds: i64,
    /// Its ports are the cluster's, so that the daemon must know of them.
    pub network: bool,
    /// Where `init.sock` goes; absolute.
    pub state_dir: Vec<u8>,
}

/// What comes of a blueprint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Built {
    /// The nest stands and `init.sock` listens.
    Ready,
    /// It does not.
    Failed {
        /// The step that failed.
        step: String,
        /// Why.
        why: String,
    },
}

/// What the daemon asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// First of all. Answers `Welcome` with two descriptors: the seccomp listener, the surrogate program.
    Hello {
        /// The sender's [`VERSION`].
        version: u32,
    },
    /// Start a program; descriptors 0, 1 and 2 come along. Answers `Started`.
    Spawn(Spawn),
    /// Make a surrogate as a child of init. Answers `Done`.
    MakeSurrogate(MakeSurrogate),
    /// Believe the reports of this process. Answers `Done`.
    RegisterSurrogate(Pid),
    /// Believe them no longer. Answers `Done`.
    UnregisterSurrogate(Pid),
    /// A pidfd, which comes with the `Done`, or `Absent`.
    Pidfd {
        /// Of which process or thread.
        pid: Pid,
        /// A thread may be meant.
        thread: bool,
    },
    /// The number that the daemon knows this task by: comes as the sender's PID of the `Done`; or `Absent`.
    HostPid(Pid),
    /// Send this process a signal with this payload, whose sender it keeps, as the kernel lets nobody outside the nest do.
    /// Answers `Done` or `Absent`.
    Signal {
        /// To which process.
        pid: Pid,
        /// Its number.
        signal: i32,
        /// The 128 bytes of its siginfo.
        info: Vec<u8>,
    },
    /// Nobody makes a task from here on, and the next one gets this number. Again while steering: aim anew, answering
    /// for the number before. Answers `Taken`.
    SteerBegin(Pid),
    /// Was the number taken (`Taken`)? Everybody may make tasks again.
    SteerEnd,
    /// Do not give out these. Answers `Done`.
    Reserve(Vec<Pid>),
    /// They may be given out again. Answers `Done`.
    Release(Vec<Pid>),
    /// They are in use without having been given out here. Answers `Done`.
    Occupy(Vec<Pid>),
    /// Keep these descriptors and bytes until dropped, in place of what had this label. Answers `Done`.
    Store {
        /// Their name.
        label: String,
        /// The bytes.
        blob: Vec<u8>,
    },
    /// Copies of what is kept (`Kept`), or `Absent`.
    Fetch {
        /// Its name.
        label: String,
    },
    /// Keep it no longer. Answers `Done`, or `Absent`.
    Drop {
        /// Its name.
        label: String,
    },
    /// What is kept (`Labels`).
    List,
    /// Accept those who wait at the listening socket that comes along, as many as one label holds, and keep them: so that they
    /// are not lost with a daemon. What is kept (`Kept`) has the bytes and after them who each one is, or `Absent`: nobody waits.
    Accept {
        /// Their name.
        label: String,
        /// The bytes.
        blob: Vec<u8>,
    },
}

/// A program to be started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spawn {
    /// Its name and arguments.
    pub argv: Vec<Vec<u8>>,
    /// Its whole environment.
    pub env: Vec<Vec<u8>>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// Its umask.
    pub umask: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
    /// Descriptor 0 becomes its controlling terminal.
    pub controlling_tty: bool,
}

/// A surrogate to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MakeSurrogate {
    /// Its PID.
    pub pid: Pid,
    /// Its name.
    pub comm: Vec<u8>,
    /// It leads a session.
    pub session: bool,
    /// Its process group (its own PID or that of a group that exists in its session); without, that of its parent.
    pub group: Option<Pid>,
    /// Its user and group; root without.
    pub owner: Option<(u32, u32)>,
}

/// What init answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// To `Hello`.
    Welcome {
        /// The answerer's [`VERSION`].
        version: u32,
        /// The nest's cookie.
        cookie: u64,
        /// The modulus the nest was built with.
        modulus: u16,
        /// The slot the nest was built with.
        slot: u16,
    },
    /// It is so.
    Done,
    /// There is no such thing.
    Absent,
    /// A process was started.
    Started(Pid),
    /// The number was taken.
    Taken(bool),
    /// What was stored.
    Kept(Vec<u8>),
    /// The names of what is stored.
    Labels(Vec<String>),
    /// There was a process, but it could not execute its program.
    NotExecuted {
        /// The program.
        program: String,
        /// The kernel's reason.
        errno: i32,
    },
    /// It could not be done.
    Failed {
        /// What was tried.
        what: String,
        /// The kernel's reason.
        errno: i32,
    },
}

/// What happens in the nest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Event {
    /// A child of init ended.
    Reaped {
        /// Which.
        pid: Pid,
        /// As wait(2) tells it.
        status: i32,
    },
    /// A call that the filter notified and that is not of the clone family.
    Notification {
        /// Names it until it is answered.
        id: u64,
        /// The calling thread.
        tid: Pid,
        /// Its 64-bit number.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// A surrogate took a signal.
    SurrogateSignal {
        /// Which surrogate.
        pid: Pid,
        /// The siginfo.
        info: Vec<u8>,
    },
    /// A child of a surrogate ended, stopped or continued.
    SurrogateChild {
        /// Which surrogate.
        parent: Pid,
        /// The siginfo.
        info: Vec<u8>,
    },
    /// A surrogate was stopped by SIGSTOP.
    SurrogateStopped(Pid),
    /// It was continued.
    SurrogateContinued(Pid),
    /// A registered surrogate is no more (somebody sent it SIGKILL).
    SurrogateGone(Pid),
}

/// A packet from init.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FromInit {
    /// To the request of this number.
    Answer(u64, Answer),
    /// Unasked.
    Event(Event),
}

/// A packet to init: its number, the request.
pub type ToInit = (u64, Request);

/// A message's bytes.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    postcard::to_allocvec(message).map_err(invalid)
}

/// Bytes as a message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(invalid)
}

fn invalid(why: postcard::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}
