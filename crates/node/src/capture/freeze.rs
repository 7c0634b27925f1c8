//! The freeze: all threads stopped.
//!
//! Owns the time between the stop of the first thread and the parking of the last; what is read then is in [`essence`], what
//! is left behind in [`leave`]. Refuses to decide whether the
//! process goes on here or there. Invariants: until [`Frozen::park`] the death of this daemon lets the program run on;
//! from then on it waits for a decision; [`Frozen::thaw`] puts back every register and mask.

mod children;
mod essence;
mod leave;

pub(super) use essence::own_filters;
pub use leave::LeftBehind;
pub(crate) use leave::add_take;
pub(super) use leave::leave_image;

use super::threads::{self, FrozenThread};
use super::{
    CaptureError, Memory, SCRIPT_MASK, Source, Trap, await_stop, ended, finish_write, held, parked, sleep, waker,
    writes,
};
use crate::steps;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Essence, MappingKind};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::status::Status;
use dunlin_sys::ptrace::{Options, Registers, Running, Stop, Stopped};
use dunlin_sys::refuge::Others;
use dunlin_sys::script::Held;
use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

/// A process all of whose threads are stopped.
pub struct Frozen {
    /// What was prepared.
    pub source: Source,
    /// When the first thread was asked to stop.
    pub since: Instant,
    threads: Vec<FrozenThread>,
    stopped_by: Option<i32>,
    trap: Trap,
    status: Status,
    /// The signals that the essence says are pending for the process or for its first thread.
    pending: Vec<i32>,
    _claim: waker::Claim,
}

/// What [`Source::stop_all`] has found.
struct Still {
    threads: Vec<FrozenThread>,
    stopped_by: Option<i32>,
    since: Instant,
    trap: Trap,
    status: Status,
}

impl Source {
    /// Stops all threads. If one does not stop, all run on and the reason comes back with the source.
    pub fn freeze(mut self) -> Result<Frozen, (Box<Source>, CaptureError)> {
        let claim = waker::claim(self.host);
        match self.stop_all() {
            Ok(still) => Ok(Frozen {
                _claim: claim,
                source: self,
                since: still.since,
                threads: still.threads,
                stopped_by: still.stopped_by,
                trap: still.trap,
                status: still.status,
                pending: Vec::new(),
            }),
            Err(error) => Err((Box::new(self), error)),
        }
    }

    fn stop_all(&mut self) -> Result<Still, CaptureError> {
        let mut seen = BTreeSet::new();
        let mut running = Vec::new();
        self.seize_new(&mut seen, &mut running)?;
        self.foothold.arena.warm(256 << 10);
        self.sleeps.prepare();
        let since = Instant::now();
        steps::begin(since);
        let mut stopped = Vec::new();
        let mut by = None;
        while !running.is_empty() {
            for thread in &running {
                // One that has just ended is found out by the wait.
                let _ = thread.interrupt();
            }
            for thread in running.drain(..) {
                match await_stop(self.pid, thread) {
                    Ok((thread, stop)) => {
                        if let Stop::Group(signal) = stop {
                            by = Some(signal);
                        }
                        stopped.push(thread);
                    }
                    Err(CaptureError::Gone) => {}
                    Err(error) => {
                        for thread in stopped {
                            self.let_on(thread);
                        }
                        return Err(error);
                    }
                }
            }
            // A thread may have been made between the look and the stop of its maker.
            self.seize_new(&mut seen, &mut running)?;
        }
        if !self.foothold.is_planted(self.host) {
            // What it is in is a call of the new program's, in the new program's memory.
            self.memory = std::fs::File::open(self.dir.path("mem"))?;
            for thread in stopped {
                self.let_on(thread);
            }
            return Err(CaptureError::Kernel {
                what: "freezing",
                source: "it has executed another program meanwhile".into(),
            });
        }
        steps::mark("stopping");
        let status = self.dir.status()?;
        let trap = Trap::seen(&status);
        steps::mark("status");
        let mut frozen: Vec<FrozenThread> = Vec::with_capacity(stopped.len());
        let mut stopped = stopped.into_iter();
        held::Note::source(trap, &self.plan.image.signals.actions).leave(&self.foothold);
        let mut slot = 0;
        while let Some(thread) = stopped.next() {
            let found = Held {
                tid: thread.tid(),
                mask: thread.signal_mask()?,
                registers: thread.registers()?,
            };
            let settled = self.settle(slot, thread, &found);
            slot += 1;
            match settled {
                Ok(thread) => frozen.push(thread),
                // Killed; the whole process is, or it was a thread that nobody will miss.
                Err(CaptureError::Gone) => {}
                Err(error) => {
                    let settled = frozen.iter().map(|t| (t.thread.tid(), &t.registers, t.mask));
                    for (tid, registers, mask) in settled.chain([(found.tid, &found.registers, found.mask)]) {
                        let thread = Stopped::assume(tid);
                        let _ = thread.set_registers(registers);
                        let _ = thread.set_signal_mask(mask);
                        let _ = thread.detach(0);
                    }
                    for thread in stopped {
                        self.let_on(thread);
                    }
                    return Err(error);
                }
            }
        }
        steps::mark("settling");
        frozen.sort_by_key(|t| (t.tid != self.pid, t.tid));
        if frozen.first().is_none_or(|t| t.tid != self.pid) {
            return Err(CaptureError::Gone);
        }
        Ok(Still {
            threads: frozen,
            stopped_by: by,
            since,
            trap,
            status,
        })
    }

    /// Lets a thread run on that was only stopped.
    fn let_on(&mut self, thread: Stopped) {
        let tid = thread.tid();
        if let (Ok(mut registers), Ok(mask)) = (thread.registers(), thread.signal_mask()) {
            if let Err(error) = finish_write(thread, self.host, &mut registers, mask, &self.memory) {
                tracing::warn!(tid, %error, "a write that a stop has cut short stays short");
                let thread = Stopped::assume(tid);
                let _ = thread.set_registers(&registers);
                let _ = thread.set_signal_mask(mask);
            }
            if let Some(again) = self.sleeps.again(self.host, tid, &registers)
                && !ended::is_signalled(self.host, tid, mask, 0)
            {
                let asleep = self.sleeps.find_ended(self.host, tid, &again, &self.memory);
                let _ = Stopped::assume(tid).set_registers(&again);
                if asleep.is_some() {
                    sleep::let_go(self.host, tid);
                }
            }
        }
        let _ = Stopped::assume(tid).detach(0);
    }

    fn seize_new(&mut self, seen: &mut BTreeSet<i32>, running: &mut Vec<Running>) -> Result<(), CaptureError> {
        for tid in self.dir.threads()? {
            if seen.insert(tid) {
                self.sleeps.look(self.host, tid);
                match Running::seize(tid, Options::default()).map_err(CaptureError::from) {
                    Ok(thread) => running.push(thread),
                    Err(CaptureError::Gone) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Brings a stopped thread, which was found so, to a place where it can be captured, and notes what it was doing.
    fn settle(&mut self, slot: usize, thread: Stopped, found: &Held) -> Result<FrozenThread, CaptureError> {
        let (host_tid, mask) = (found.tid, found.mask);
        let tid = self.number_of(host_tid)?;
        // From here on this daemon's death must not change what it is.
        self.foothold.arena.hold(slot, found);
        thread.set_signal_mask(SCRIPT_MASK)?;
        let (thread, mut registers) = self.leave_vdso(thread, found.registers)?;
        let again = self.sleeps.again(self.host, host_tid, &registers);
        registers = again.unwrap_or(registers);
        let at = self.foothold.syscall_at;
        let thread = writes::complete(thread, self.host, at, &mut registers, &self.memory)?;
        if let Some(abort) = threads::rseq_abort(&thread, &self.memory, registers.rip)? {
            registers.rip = abort;
        }
        let settled = Held {
            tid: host_tid,
            mask,
            registers,
        };
        self.foothold.arena.hold(slot, &settled);
        let sleep = match &again {
            Some(again) => self.sleeps.find_ended(self.host, host_tid, again, &self.memory),
            None => self.sleeps.find(self.host, host_tid, &registers, &self.memory),
        };
        Ok(FrozenThread {
            thread,
            tid,
            registers,
            mask,
            sleep,
            settled_ns: sleep::monotonic_ns(),
            is_ended: again.is_some(),
        })
    }

    fn number_of(&mut self, host_tid: i32) -> Result<Pid, CaptureError> {
        if let Some(tid) = self.tids.get(&host_tid) {
            return Ok(*tid);
        }
        let status = ProcDir::thread(self.host, host_tid).status()?;
        let tid = Pid(status.ns_pids.last().copied().ok_or(CaptureError::Gone)?);
        self.tids.insert(host_tid, tid);
        Ok(tid)
    }

    /// The vDSO reads clock data of this machine's kernel: half of such a reading must not meet the other machine's.
    fn leave_vdso(&self, mut thread: Stopped, mut registers: Registers) -> Result<(Stopped, Registers), CaptureError> {
        const MAX_STEPS: u32 = 4000;
        let kernel_code = self
            .plan
            .image
            .space
            .mappings
            .iter()
            .find(|m| m.kind == MappingKind::Kernel(dunlin_proto::image::KernelMapping::Vdso));
        let Some(vdso) = kernel_code else {
            return Ok((thread, registers));
        };
        for _ in 0..MAX_STEPS {
            let inside = registers.rip >= vdso.start && registers.rip < vdso.end;
            // In a system call it has no half-read clock.
            if !inside || registers.orig_rax as i64 >= 0 {
                break;
            }
            thread = thread.step()?;
            registers = thread.registers()?;
        }
        Ok((thread, registers))
    }
}

impl Frozen {
    /// Points every thread at a pause: from here on a dead daemon means waiting.
    pub fn park(&mut self) -> Result<(), CaptureError> {
        for thread in &self.threads {
            thread
                .thread
                .set_registers(&parked(&self.source.foothold, &thread.registers))?;
            thread.thread.set_signal_mask(u64::MAX)?;
        }
        Ok(())
    }

    /// Lets the process run on where it was.
    pub fn thaw(mut self) -> Result<(), CaptureError> {
        let host = self.source.host;
        let leader_mask = self.threads.first().map_or(0, |leader| leader.mask);
        for thread in &mut self.threads {
            if thread.is_ended && ended::is_signalled(host, thread.thread.tid(), thread.mask, leader_mask) {
                thread.registers = ended::interrupted(&thread.registers);
                thread.is_ended = false;
            }
        }
        let Frozen {
            source,
            threads,
            trap,
            _claim,
            ..
        } = self;
        let leader = Stopped::assume(source.host);
        // The loop goes when none but the first is in it: this daemon may be killed at any moment.
        let put_back = |thread: &FrozenThread| {
            thread.thread.set_registers(&thread.registers)?;
            thread.thread.set_signal_mask(thread.mask)
        };
        threads[1..].iter().try_for_each(put_back)?;
        leader.set_signal_mask(SCRIPT_MASK)?;
        let mut trodden = None;
        if let (Some(refuge), Some(first)) = (&source.refuge, threads.first()) {
            let held = Held {
                tid: source.host,
                mask: first.mask,
                registers: first.registers,
            };
            trodden = refuge.enter(&leader, source.host, &held, Others::Stopped)?;
        }
        let leader = trap.put_back(leader, &source.foothold, &source.plan.image.signals.actions)?;
        let leader = source.foothold.uproot(leader)?;
        // The registers come last: until they are set it is in the refuge.
        if let Some(first) = threads.first() {
            leader.set_signal_mask(first.mask)?;
            leader.set_registers(&first.registers)?;
        }
        if let Some(trodden) = trodden {
            trodden.smooth(source.host);
        }
        for thread in threads {
            if thread.is_ended && thread.sleep.is_some() {
                sleep::let_go(host, thread.thread.tid());
            }
            thread.thread.detach(0)?;
        }
        Ok(())
    }

    /// Hashes of all its private pages.
    pub fn digest(&self, essence: &Essence) -> io::Result<crate::verify::Digest> {
        let areas = crate::verify::kernel_areas(&essence.threads);
        let mappings = &self.source.plan.image.space.mappings;
        crate::verify::digest(&self.source.memory, &self.source.pagemap, mappings, &areas)
    }

    /// The signals that travel with it, and must not be taken here.
    pub fn pending(&self) -> &[i32] {
        &self.pending
    }

    /// The files through which the pages can be read.
    pub fn memory(&self) -> io::Result<Memory> {
        self.source.memory()
    }

    /// Is it stopped by a signal, apart from this?
    pub fn is_stopped(&self) -> bool {
        self.stopped_by.is_some()
    }

    /// The threads' numbers.
    pub fn tids(&self) -> Vec<Pid> {
        self.threads.iter().map(|t| t.tid).collect()
    }
}
