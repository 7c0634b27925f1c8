//! A standard stream of a run, carried between the node where a process uses it and the run's origin.
//!
//! A *relay* is the local pipe or terminal that a moved process was given, with the connection that carries its bytes.
//! The relay's node opens the connection; the origin speaks first, with [`StreamFrame::Resume`]. Both directions are bounded by
//! credit: never more than [`WINDOW_BYTES`] sent and not yet [`StreamFrame::Taken`], but for what
//! [`StreamFrame::Flush`] forces out of a pipe whose writers are frozen. A side that loses the connection may open it
//! anew and sends again what the other has not received: offsets count bytes from the relay's first.
//!
//! Owns these types. Refuses to know pipes and terminals.

use crate::control::WindowSize;
use crate::ids::{Pid, RunId, Slot};
use serde::{Deserialize, Serialize};

/// Bytes under way in one direction of one stream.
pub const WINDOW_BYTES: u64 = 256 << 10;

/// Which of a run's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StreamKind {
    /// Standard input, a pipe.
    Stdin,
    /// Standard output, a pipe; of a detached run both outputs.
    Stdout,
    /// Standard error, a pipe.
    Stderr,
    /// All three, a pseudo-terminal.
    Tty,
}

impl StreamKind {
    /// 0, 1 and 2 as descriptors are; 3 for the terminal.
    pub fn number(self) -> u8 {
        match self {
            StreamKind::Stdin => 0,
            StreamKind::Stdout => 1,
            StreamKind::Stderr => 2,
            StreamKind::Tty => 3,
        }
    }

    /// From [`StreamKind::number`].
    pub fn from_number(number: u8) -> Option<StreamKind> {
        let all = [
            StreamKind::Stdin,
            StreamKind::Stdout,
            StreamKind::Stderr,
            StreamKind::Tty,
        ];
        all.into_iter().find(|stream| stream.number() == number)
    }

    /// Bytes flow from the origin to the process.
    pub fn takes_input(self) -> bool {
        match self {
            StreamKind::Stdin | StreamKind::Tty => true,
            StreamKind::Stdout | StreamKind::Stderr => false,
        }
    }

    /// Bytes flow from the process to the origin.
    pub fn gives_output(self) -> bool {
        match self {
            StreamKind::Stdout | StreamKind::Stderr | StreamKind::Tty => true,
            StreamKind::Stdin => false,
        }
    }
}

/// One stream of one run: the same name on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamRef {
    /// The run.
    pub run: RunId,
    /// Which of its streams.
    pub stream: StreamKind,
}

/// What a stream's connection is opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOpen {
    /// The stream.
    pub stream: StreamRef,
    /// The relay, drawn at random by its node: a connection opened anew carries the same.
    pub relay: u64,
    /// Input bytes that the relay has received so far.
    pub received: u64,
    /// Output bytes of it that an origin has passed on so far, for an origin whose daemon has been restarted.
    pub acked: u64,
}

/// One frame of a stream's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StreamFrame {
    /// From the origin, once, first: how many output bytes of this relay it has.
    Resume {
        /// Bytes since the relay's first.
        received: u64,
        /// The run's top process: the one that the input follows.
        top: Option<Pid>,
    },
    /// Bytes of the stream; at most 64 KiB.
    Data(Vec<u8>),
    /// The sum of the bytes that the receiver has passed on.
    Taken(u64),
    /// From the relay: everything written so far was sent; say so when it is in its place in the run's output.
    Flush(u64),
    /// From the origin, answering the flush of that number.
    Flushed(u64),
    /// From the origin: the input has ended.
    End,
    /// From the relay: its process leaves it; stop sending input.
    Leave,
    /// From the origin: no input follows this.
    Left,
    /// From the relay, after `Left`: where the run's top process is, and the input that was received and not read.
    Unread {
        /// Where the input goes from now on.
        to: Slot,
        /// What goes there first.
        bytes: Vec<u8>,
    },
    /// From the origin: the terminal's size changed.
    Resize(WindowSize),
    /// From the origin: nobody reads or writes the run's streams any more.
    Close,
}

/// A terminal's settings, as a move of a run's top process carries them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtyState {
    /// c_iflag, c_oflag, c_cflag, c_lflag.
    pub modes: [u32; 4],
    /// c_line.
    pub discipline: u8,
    /// c_cc.
    pub codes: [u8; 19],
    /// Input and output speed, baud.
    pub speeds: [u32; 2],
    /// Its size.
    pub size: WindowSize,
    /// Its foreground process group, if it has one.
    pub foreground: Option<i32>,
}
