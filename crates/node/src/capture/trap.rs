//! SIGTRAP, where the program ignores it.
//!
//! A script ends with a breakpoint, and a step with a trap: the kernel forces SIGTRAP upon the thread, and where it is
//! ignored makes its action the default one first (`force_sig_info_to_task`), before any tracer sees the signal. Owns
//! looking before the first trap and putting back after the last. Invariant: between the two stands a [`Trap`].

use dunlin_sys::foothold::{Foothold, FootholdError, inject};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::status::Status;
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::Script;
use std::io;

const SYS_RT_SIGACTION: i64 = 13;
const SIGTRAP: u64 = 5;
const SIG_IGN: u64 = 1;

/// Whether a program ignores SIGTRAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trap {
    ignored: bool,
}

impl Trap {
    /// Looks at a process that is stopped and was not made to trap yet.
    pub fn look(dir: &ProcDir) -> io::Result<Trap> {
        Ok(Trap::seen(&dir.status()?))
    }

    /// The same, by what was read of it.
    pub fn seen(status: &Status) -> Trap {
        Trap {
            ignored: status.ignored & (1 << (SIGTRAP - 1)) != 0,
        }
    }

    /// The trap that a table of 64 actions asks for.
    pub fn of(actions: &[[u64; 4]]) -> Trap {
        Trap {
            ignored: actions.get(SIGTRAP as usize - 1).is_some_and(|a| a[0] == SIG_IGN),
        }
    }

    /// As a former daemon has seen it.
    pub fn known(ignored: bool) -> Trap {
        Trap { ignored }
    }

    /// Does the program ignore it?
    pub fn is_ignored(self) -> bool {
        self.ignored
    }

    /// Corrects a table of actions that was read after a trap.
    pub fn correct(self, actions: &mut [[u64; 4]]) {
        if let Some(action) = actions.get_mut(SIGTRAP as usize - 1)
            && self.ignored
        {
            action[0] = SIG_IGN;
        }
    }

    /// Puts the action back, after the last script and before the foothold goes. No trap may come after this.
    pub fn put_back(
        self,
        thread: Stopped,
        foothold: &Foothold,
        actions: &[[u64; 4]],
    ) -> Result<Stopped, FootholdError> {
        let Some(action) = actions.get(SIGTRAP as usize - 1).filter(|_| self.ignored) else {
            return Ok(thread);
        };
        let words = [SIG_IGN, action[1], action[2], action[3]];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let place = Script::new(&foothold.arena).bytes(&bytes);
        let arguments = [SIGTRAP, place.address, 0, 8, 0, 0];
        Ok(inject(thread, foothold.syscall_at, "rt_sigaction", SYS_RT_SIGACTION, arguments)?.0)
    }
}
