//! Pseudo-terminals: making one in the nest, its settings as a move carries them.
//!
//! Owns the mapping between a terminal and [`TtyState`]. Refuses to know who uses it.

use super::port::read_all;
use dunlin_proto::control::WindowSize;
use dunlin_proto::stream::TtyState;
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, Winsize,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// c_cc in the kernel's order.
const CODES: [SpecialCodeIndex; 17] = [
    SpecialCodeIndex::VINTR,
    SpecialCodeIndex::VQUIT,
    SpecialCodeIndex::VERASE,
    SpecialCodeIndex::VKILL,
    SpecialCodeIndex::VEOF,
    SpecialCodeIndex::VTIME,
    SpecialCodeIndex::VMIN,
    SpecialCodeIndex::VSWTC,
    SpecialCodeIndex::VSTART,
    SpecialCodeIndex::VSTOP,
    SpecialCodeIndex::VSUSP,
    SpecialCodeIndex::VEOL,
    SpecialCodeIndex::VREPRINT,
    SpecialCodeIndex::VDISCARD,
    SpecialCodeIndex::VWERASE,
    SpecialCodeIndex::VLNEXT,
    SpecialCodeIndex::VEOL2,
];

/// A new terminal's master, in the devpts below `root`. Not through `/dev/ptmx`, which may be a link that leads out of it.
pub fn open_master(root: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::openat(root, "dev/pts/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    Ok(master)
}

/// The slave of a master, which becomes nobody's controlling terminal by this.
pub fn slave(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    Ok(rustix::pty::ioctl_tiocgptpeer(master, flags)?)
}

/// Sets the size; the foreground group is sent SIGWINCH if it changes.
pub fn resize(master: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}

/// The settings of the terminal behind a master. The foreground group is not asked for here: a master tells it in the
/// caller's PID numbering.
pub fn state(master: impl AsFd) -> io::Result<TtyState> {
    let t = rustix::termios::tcgetattr(&master)?;
    let size = rustix::termios::tcgetwinsize(&master)?;
    let mut codes = [0u8; 19];
    for (code, index) in codes.iter_mut().zip(CODES) {
        *code = t.special_codes[index];
    }
    Ok(TtyState {
        modes: [
            t.input_modes.bits(),
            t.output_modes.bits(),
            t.control_modes.bits(),
            t.local_modes.bits(),
        ],
        discipline: t.line_discipline,
        codes,
        speeds: [t.input_speed(), t.output_speed()],
        size: WindowSize {
            rows: size.ws_row,
            cols: size.ws_col,
        },
        foreground: None,
    })
}

/// Gives the terminal behind a master these settings. The foreground group is set by a process of its session.
pub fn set_state(master: impl AsFd, state: &TtyState) -> io::Result<()> {
    let mut t = rustix::termios::tcgetattr(&master)?;
    let [input, output, control, local] = state.modes;
    t.input_modes = InputModes::from_bits_retain(input);
    t.output_modes = OutputModes::from_bits_retain(output);
    t.control_modes = ControlModes::from_bits_retain(control);
    t.local_modes = LocalModes::from_bits_retain(local);
    t.line_discipline = state.discipline;
    for (code, index) in state.codes.iter().zip(CODES) {
        t.special_codes[index] = *code;
    }
    // Ordinary speeds are in c_cflag; only others are elsewhere. Setting an ordinary one would change c_cflag.
    if speeds_are_apart(control) {
        t.set_input_speed(state.speeds[0])?;
        t.set_output_speed(state.speeds[1])?;
    }
    rustix::termios::tcsetattr(&master, OptionalActions::Now, &t)?;
    resize(master, state.size)
}

/// BOTHER: the speeds are numbers of their own.
fn speeds_are_apart(control: u32) -> bool {
    const CBAUD: u32 = 0o010017;
    const BOTHER: u32 = 0o010000;
    control & CBAUD == BOTHER
}

/// Takes typed-ahead input out of the terminal. The line that is being edited comes too.
pub fn take_unread(master: BorrowedFd<'_>, into: &mut Vec<u8>) -> io::Result<()> {
    let slave = slave(master)?;
    rustix::fs::fcntl_setfl(&slave, OFlags::RDWR | OFlags::NONBLOCK)?;
    let settings = rustix::termios::tcgetattr(&slave)?;
    let mut raw: Termios = settings.clone();
    raw.local_modes.remove(LocalModes::ICANON);
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &raw)?;
    let read = read_all(slave.as_fd(), into);
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings)?;
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_carried_to_another_terminal() {
        let root = std::fs::File::open("/").unwrap();
        let (a, b) = (open_master(&root).unwrap(), open_master(&root).unwrap());
        let mut state_a = state(&a).unwrap();
        assert_eq!(
            state_a,
            TtyState {
                size: WindowSize { rows: 0, cols: 0 },
                ..state_a
            }
        );
        state_a.modes[3] &= !LocalModes::ECHO.bits();
        state_a.codes[0] = 7;
        state_a.size = WindowSize { rows: 30, cols: 90 };
        set_state(&a, &state_a).unwrap();
        assert_eq!(state(&a).unwrap(), state_a);
        assert_ne!(state(&b).unwrap(), state_a);
        set_state(&b, &state_a).unwrap();
        assert_eq!(state(&b).unwrap(), state_a);
    }

    #[test]
    fn what_was_typed_ahead_is_taken_out_whole() {
        let master = open_master(std::fs::File::open("/").unwrap()).unwrap();
        let _user = slave(master.as_fd()).unwrap();
        rustix::io::write(&master, b"one\ntwo").unwrap();
        let before = state(&master).unwrap();
        let mut unread = Vec::new();
        take_unread(master.as_fd(), &mut unread).unwrap();
        assert_eq!(unread, b"one\ntwo");
        assert_eq!(state(&master).unwrap(), before);
    }
}
