//! The freeze: all threads stopped, and what is read then.
//!
//! Owns the time between the stop of the first thread and the parking of the last. Refuses to decide whether the
//! process goes on here or there. Invariants: until [`Frozen::park`] the death of this daemon lets the program run on;
//! from then on it waits for a decision; [`Frozen::thaw`] puts back every register and mask.

use super::held;
use super::questions::{ProcessQuestions, ThreadQuestions};
use super::threads::{self, FrozenThread, ThreadManner};
use super::{
    CaptureError, Memory, PAGE, SCRIPT_MASK, Source, await_stop, descriptors, ended, parked, read_traits, reading,
    shared, sleep, space, waker, writes,
};
use crate::capture::Surroundings;
use crate::capture::{Met, Trap};
use crate::steps;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Child, ChildStop, Essence, Files, MappingKind, Pages, ThreadImage};
use dunlin_sys::batch::Batch;
use dunlin_sys::foothold::Foothold;
use dunlin_sys::pagemap::{self, Query};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::parse_timers;
use dunlin_sys::procfs::maps;
use dunlin_sys::procfs::status::Status;
use dunlin_sys::ptrace::{Options, Registers, Running, Stop, Stopped};
use dunlin_sys::refuge::Others;
use dunlin_sys::script::{Call, Held, Script};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// A process with no more memory than this has its mappings listed in the freeze with their flags, if they have changed:
/// that takes a few milliseconds at most.
const LISTED_AGAIN: u64 = 256 << 20;
const SIGCONT: i32 = 18;
/// The largest of what is read there; it may lie across two pages.
const TIMESPEC: u64 = 16;
/// ECHILD.
const NO_CHILD: i64 = -10;

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
            for thread in stopped {
                thread.detach(0)?;
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
        if let (Ok(registers), Ok(mask)) = (thread.registers(), thread.signal_mask())
            && let Some(again) = self.sleeps.again(self.host, thread.tid(), &registers)
            && !ended::is_signalled(self.host, thread.tid(), mask, 0)
        {
            let asleep = self.sleeps.find_ended(self.host, thread.tid(), &again, &self.memory);
            let _ = thread.set_registers(&again);
            if asleep.is_some() {
                sleep::let_go(self.host, thread.tid());
            }
        }
        let _ = thread.detach(0);
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
    /// Reads everything that travels inside the freeze. `along`: the other processes of the move, and which of them are
    /// stopped; children are read before their parents, as they may stop until then.
    pub fn essence(
        &mut self,
        around: &Surroundings<'_>,
        met: &mut Met,
        along: &BTreeMap<Pid, bool>,
    ) -> Result<Essence, CaptureError> {
        let timers = parse_timers(&self.source.dir.text("timers")?).map_err(io::Error::from)?;
        let all_cpus = dunlin_sys::inspect::affinity(0).unwrap_or_default();
        steps::mark("list of timers");
        let mut images = Vec::with_capacity(self.threads.len());
        let host = self.source.host;
        // The first thread for itself: what is left of timers is counted from when it answers.
        let first = self.threads.first().ok_or(CaptureError::Gone)?;
        let mut script = Script::new(&self.source.foothold.arena);
        let questions = ThreadQuestions::ask(&mut script);
        let more = ProcessQuestions::ask(&mut script, &timers);
        let of_children = self.ask_for_children(&mut script);
        let (_, answers) = script.run(Stopped::assume(first.thread.tid()))?;
        let (clocks_ns, asked_ns) = (super::clocks(&self.source.dir), sleep::monotonic_ns());
        // Of the last that ran: a SIGSTOP may take effect in any of them.
        let mut stopped_by = answers.stopped_by();
        let mut process = more.read(&answers);
        let childless = of_children.is_some_and(|asked| answers.of(asked) == NO_CHILD);
        let manner = threads::manner(host, first.thread.tid(), &all_cpus)?;
        images.push(threads::image(first, manner, questions.read(&answers))?);
        steps::mark("questions to the first thread");
        while images.len() < self.threads.len() {
            let mut batch = Batch::new(&self.source.foothold.arena);
            let mut asked = Vec::new();
            for frozen in &self.threads[images.len()..] {
                if !batch.has_room() {
                    break;
                }
                asked.push(ThreadQuestions::ask(batch.lane(frozen.thread.tid())));
            }
            let some = &self.threads[images.len()..][..asked.len()];
            let manners = || -> io::Result<Vec<ThreadManner>> {
                some.iter()
                    .map(|t| threads::manner(host, t.thread.tid(), &all_cpus))
                    .collect()
            };
            let (answers, manners) = batch.run_beside(manners);
            let (answers, manners) = (answers?, manners?);
            stopped_by = answers.stopped_by();
            steps::mark("questions to threads");
            for ((frozen, manner), questions) in some.iter().zip(manners).zip(asked) {
                images.push(threads::image(frozen, manner, questions.read(&answers))?);
            }
            steps::mark("threads from outside");
        }
        self.tell_interrupted(&mut images);
        for (thread, image) in self.threads.iter().zip(&mut images) {
            if let Some(sleep) = &mut image.sleep {
                sleep.remaining_ns = sleep.remaining_ns.saturating_sub(asked_ns - thread.settled_ns);
            }
        }
        self.trap.correct(&mut process.signals.actions);
        self.source
            .plan
            .image
            .signals
            .actions
            .clone_from(&process.signals.actions);
        let leader = Stopped::assume(self.source.host);
        let mut lineage = self.source.plan.image.lineage.clone();
        lineage.children = match childless {
            true => Vec::new(),
            false => children(&self.source.dir, along)?,
        };
        if let Some(now) = self.ask_of_children(&mut lineage.children)? {
            stopped_by = now;
        }
        steps::mark("children");
        let mut signals = process.signals.clone();
        signals.pending = leader.pending_signals(true)?.into_iter().map(|s| s.to_vec()).collect();
        for (timer, host) in signals.timers.iter_mut().zip(&process.timer_threads) {
            timer.thread = self.source.tids.get(host).copied();
        }
        let leaders = images.first().map_or(&[][..], |image| &image.pending);
        let number = |info: &Vec<u8>| info.first_chunk::<4>().map(|word| i32::from_le_bytes(*word));
        self.pending = leaders.iter().chain(&signals.pending).filter_map(number).collect();
        // One that is pending has taken effect: the process goes on when it may run.
        self.stopped_by = stopped_by.filter(|_| !self.pending.contains(&SIGCONT));
        steps::mark("signals");
        let mut obstacles = Vec::new();
        let space = self.space_now(process.brk, &mut obstacles)?;
        shared::look(
            self.source.pid,
            space.as_ref().unwrap_or(&self.source.plan.image.space),
            around,
            &mut obstacles,
        );
        steps::mark("mappings");
        let files = self.files_now(around, met, &mut obstacles)?;
        steps::mark("descriptors");
        if !obstacles.is_empty() {
            return Err(CaptureError::Obstacles(obstacles));
        }
        if let Some(space) = &space {
            self.source.plan.image.space = space.clone();
        }
        let (file_pages, file_pages_dropped) = self.file_pages_now()?;
        steps::mark("pages of file mappings");
        let traits = read_traits(&self.source.dir, &self.status, &process)?;
        steps::mark("traits");
        let hot_pages = self.hot_pages(&images);
        steps::mark("hot pages");
        let shared = shared::read(&self.source.dir, &self.source.plan.image.space, met)?;
        steps::mark("shared memory");
        Ok(Essence {
            lineage,
            traits,
            space,
            files,
            signals,
            seccomp: own_filters(&leader, self.status.seccomp_filters, self.source.nest_filters)?,
            stopped_by: self.stopped_by,
            file_pages,
            file_pages_dropped,
            hot_pages,
            shared,
            threads: images,
            clocks_ns,
        })
    }

    /// Makes its children known: those that it forked since anybody looked stay here, with what they hold.
    pub fn introduce(&self, around: &Surroundings<'_>) -> io::Result<()> {
        child_hosts(&self.source.dir)?
            .into_iter()
            .for_each(|child| around.meet(child));
        Ok(())
    }

    /// A call that is made again has ended with EINTR all the same if a signal for its thread has come meanwhile.
    fn tell_interrupted(&mut self, images: &mut [ThreadImage]) {
        let host = self.source.host;
        let leader_mask = self.threads.first().map_or(0, |leader| leader.mask);
        for (thread, image) in self.threads.iter_mut().zip(images) {
            if thread.is_ended && ended::is_signalled(host, thread.thread.tid(), thread.mask, leader_mask) {
                thread.registers = ended::interrupted(&thread.registers);
                (thread.sleep, thread.is_ended, image.sleep) = (None, false, None);
                image.registers = threads::to_words(&thread.registers);
            }
        }
    }

    /// Has it children at all? A program with filters of its own is not asked: they may not know the call.
    fn ask_for_children(&self, script: &mut Script<'_>) -> Option<Call> {
        const SYS_WAITID: i64 = 247;
        const P_ALL: u64 = 0;
        /// WEXITED, WNOHANG, WNOWAIT, __WALL.
        const ANY: u64 = 4 | 1 | 0x0100_0000 | 0x4000_0000;
        let may = self.source.plan.image.seccomp.is_empty();
        may.then(|| script.attempt("waitid", SYS_WAITID, &[P_ALL, 0, 0, ANY, 0]))
    }

    /// What has the process not waited for yet, of the stops and continuations of its children? If it was asked: what stops
    /// the process by now.
    fn ask_of_children(&self, children: &mut [Child]) -> Result<Option<Option<i32>>, CaptureError> {
        const SYS_WAITID: i64 = 247;
        const P_PID: u64 = 1;
        /// WSTOPPED, WCONTINUED, WNOHANG, WNOWAIT.
        const WHICH: u64 = 2 | 8 | 1 | 0x0100_0000;
        const CLD_STOPPED: i32 = 5;
        const CLD_CONTINUED: i32 = 6;
        let mut script = Script::new(&self.source.foothold.arena);
        let mut asked = Vec::new();
        for child in children.iter_mut().filter(|child| child.ended.is_none()) {
            // As many as there is room for: more than a shell has jobs.
            if asked.len() >= 64 {
                break;
            }
            let pid = child.pid.0 as u64;
            let info = script.bytes(&[0; 128]);
            script.attempt("waitid", SYS_WAITID, &[P_PID, pid, info.address, WHICH, 0]);
            asked.push((child, info));
        }
        if asked.is_empty() {
            return Ok(None);
        }
        let (_, answers) = script.run(Stopped::assume(self.source.host))?;
        for (child, info) in asked {
            // si_code; 0 where there is nothing to wait for.
            let news = answers.bytes(info)[8..12].to_vec();
            match &mut child.stop {
                Some(stop) => stop.waitable = news == CLD_STOPPED.to_le_bytes(),
                None => child.continued = news == CLD_CONTINUED.to_le_bytes(),
            }
        }
        Ok(Some(answers.stopped_by()))
    }

    fn space_now(
        &mut self,
        brk: u64,
        obstacles: &mut Vec<dunlin_proto::control::Obstacle>,
    ) -> Result<Option<dunlin_proto::image::Space>, CaptureError> {
        let source = &mut self.source;
        let now = maps::parse(&source.dir.bytes("maps")?).map_err(io::Error::from)?;
        // With what the plan was made of, not with a text read beside it: the program was running in between.
        let same = now.iter().eq(source.listing.iter().map(|(mapping, _)| mapping));
        if same && !source.looked_again && brk == source.plan.image.space.layout[5] {
            return Ok(None);
        }
        // Only smaps tells the flags of a new mapping, and it walks all page tables: of a large process those that were there
        // at its place are taken for its own.
        let listing = if !same && source.plan.resident_bytes <= LISTED_AGAIN {
            space::listing(&source.dir)?
        } else {
            space::relisting(now, &source.listing)
        };
        let layout = source.dir.stat()?.layout;
        let space = space::read(
            source.pid,
            &source.dir,
            source.foothold.range(),
            layout,
            brk,
            &listing,
            obstacles,
        )?;
        source.listing = listing;
        Ok(Some(space))
    }

    fn files_now(
        &mut self,
        around: &Surroundings<'_>,
        met: &mut Met,
        obstacles: &mut Vec<dunlin_proto::control::Obstacle>,
    ) -> Result<Option<Files>, CaptureError> {
        let source = &mut self.source;
        let glimpses = descriptors::glimpse(&source.dir)?;
        obstacles.extend(reading::look(source.pid, source.host, &glimpses));
        let owner = descriptors::Owner {
            pid: source.pid,
            host: source.host,
            around,
        };
        let planned = &source.plan.image.files;
        let same = glimpses == source.glimpses;
        if same && !descriptors::is_volatile(planned) {
            descriptors::shared_since(&owner, &glimpses, planned, obstacles)?;
            return Ok(None);
        }
        let mut files = if same {
            planned.clone()
        } else {
            let before = Some((source.glimpses.as_slice(), planned));
            descriptors::read(&owner, &glimpses, before, met, obstacles)?
        };
        descriptors::refresh(&owner, &glimpses, &mut files, met, obstacles)?;
        descriptors::shared_since(&owner, &glimpses, &files, obstacles)?;
        source.glimpses = glimpses;
        if files == source.plan.image.files {
            return Ok(None);
        }
        source.plan.image.files = files.clone();
        Ok(Some(files))
    }

    fn file_pages_now(&mut self) -> Result<(Vec<Pages>, Vec<u64>), CaptureError> {
        let now = self.source.read_file_pages()?;
        let mut before = std::mem::take(&mut self.source.file_pages);
        let mut changed = Vec::new();
        let mut kept = BTreeMap::new();
        for run in &now {
            for (i, bytes) in run.bytes.chunks(PAGE as usize).enumerate() {
                let address = run.address + i as u64 * PAGE;
                if before.remove(&address).is_none_or(|old| old != bytes) {
                    changed.push(Pages {
                        address,
                        bytes: bytes.to_vec(),
                    });
                }
                kept.insert(address, bytes.to_vec());
            }
        }
        self.source.file_pages = kept;
        Ok((changed, before.into_keys().collect()))
    }

    /// The pages that are certain to be touched at once: around the stack pointers, thread-local storage, rseq areas,
    /// robust lists and the words that the kernel clears when a thread ends.
    fn hot_pages(&self, threads: &[ThreadImage]) -> Vec<Pages> {
        let mut wanted = BTreeSet::new();
        for thread in threads {
            let Some(registers) = threads::from_words(&thread.registers) else {
                continue;
            };
            let mut add = |address: u64| {
                wanted.insert(address & !(PAGE - 1));
            };
            let few = threads.len() <= 16;
            // Of many threads that wait in a call, few are woken at once.
            if few || (registers.orig_rax as i64) < 0 {
                add(registers.rsp);
                add(registers.rsp.wrapping_sub(128));
            }
            if few {
                add(registers.rsp + PAGE);
                for word in [
                    registers.rdi,
                    registers.rsi,
                    registers.rdx,
                    registers.rbx,
                    registers.rbp,
                    registers.r12,
                ] {
                    add(word);
                }
            }
            add(registers.fs_base);
            add(thread.clear_tid);
            add(thread.robust_list[0]);
            if let Some([pointer, length, _]) = thread.rseq {
                add(pointer);
                add(pointer + length.saturating_sub(1));
            }
            // The destination makes the call again inside the freeze: what it reads must not be elsewhere then.
            if let Some(sleep) = &thread.sleep {
                for address in super::sleep::reads(sleep) {
                    add(address);
                    add(address.saturating_add(TIMESPEC - 1));
                }
            }
        }
        let anonymous = |address: u64| {
            let mappings = &self.source.plan.image.space.mappings;
            let at = mappings.partition_point(|m| m.end <= address);
            mappings
                .get(at)
                .is_some_and(|m| m.start <= address && m.kind == MappingKind::Anonymous)
        };
        let mut pages = Vec::new();
        for address in wanted.into_iter().filter(|a| anonymous(*a)) {
            let mut bytes = vec![0u8; PAGE as usize];
            // A page that was never touched is left to the pager.
            let present =
                pagemap::scan(&self.source.pagemap, address, address + PAGE, Query::CONTENT).any(|range| range.is_ok());
            if present && self.source.memory.read_exact_at(&mut bytes, address).is_ok() {
                pages.push(Pages { address, bytes });
            }
        }
        pages
    }

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

    /// After the commit, before any descriptor of the move is closed: that must signal nobody (O_ASYNC), as the signal would
    /// follow the process.
    pub fn hush(&self) -> Result<(), CaptureError> {
        const SYS_FCNTL: i64 = 72;
        const F_SETFL: u64 = 4;
        const O_ASYNC: u32 = 0o20_000;
        let files = &self.source.plan.image.files;
        let mut script = Script::new(&self.source.foothold.arena);
        for descriptor in &files.table {
            let description = &files.descriptions[descriptor.description as usize];
            if description.owner.is_some() {
                let flags = u64::from(description.flags & !O_ASYNC);
                script.attempt("fcntl", SYS_FCNTL, &[descriptor.number as u64, F_SETFL, flags]);
            }
        }
        if script.is_empty() {
            return Ok(());
        }
        let leader = Stopped::assume(self.source.host);
        leader.set_signal_mask(SCRIPT_MASK)?;
        let (leader, _) = script.run(leader)?;
        Ok(leader.set_signal_mask(u64::MAX)?)
    }

    /// After the commit: leaves the address space to a keeper and hands back the emptied first thread, still parked.
    ///
    /// The kernel must not write to the image when the threads go, hence the cleared tid addresses and robust lists.
    pub fn into_image(self) -> Result<LeftBehind, CaptureError> {
        let Frozen {
            source,
            threads,
            pending,
            ..
        } = self;
        let threads = threads.into_iter().map(|thread| thread.thread).collect();
        // A filter of its own might end the keeper for a call that the program never made.
        let status = ProcDir::process(source.host).status()?;
        let lends = status
            .seccomp_filters
            .is_none_or(|count| count as usize <= source.nest_filters);
        leave_image(source.foothold, source.host, threads, pending, lends)
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

/// Leaves the address space of a parked process to a keeper; its first thread comes first. A keeper that `lends` has
/// descriptors of its own for it, in the order that `sys::lending` wants.
pub(super) fn leave_image(
    foothold: Foothold,
    host: i32,
    threads: Vec<Stopped>,
    pending: Vec<i32>,
    lends: bool,
) -> Result<LeftBehind, CaptureError> {
    const SYS_SOCKETPAIR: i64 = 53;
    const AF_UNIX: u64 = 1;
    const SOCK_SEQPACKET: u64 = 5;
    const SYS_PIPE2: i64 = 293;
    const SYS_SET_TID_ADDRESS: i64 = 218;
    const SYS_SET_ROBUST_LIST: i64 = 273;
    const SYS_CLOSE_RANGE: i64 = 436;
    const SYS_CLONE: i64 = 56;
    const CLONE_VM: u64 = 0x100;
    const SYS_SETITIMER: i64 = 38;
    /// SIGALRM, SIGVTALRM, SIGPROF.
    const ITIMER_SIGNALS: [i32; 3] = [14, 26, 27];
    const SI_KERNEL: i32 = 0x80;
    const AT_ONCE: usize = 1024;
    for some in threads.chunks(AT_ONCE) {
        let mut batch = Batch::new(&foothold.arena);
        for thread in some {
            let script = batch.lane(thread.tid());
            script.attempt("set_tid_address", SYS_SET_TID_ADDRESS, &[0]);
            script.attempt("set_robust_list", SYS_SET_ROBUST_LIST, &[0, 24]);
            thread.set_signal_mask(SCRIPT_MASK)?;
        }
        batch.run()?;
        for thread in some {
            thread.set_signal_mask(u64::MAX)?;
        }
    }
    for thread in threads.into_iter().skip(1) {
        thread.detach(0)?;
    }
    let leader = Stopped::assume(host);
    leader.set_signal_mask(SCRIPT_MASK)?;
    let mut script = Script::new(&foothold.arena);
    // Its timers tick on: exec keeps those of setitimer(2), and a surrogate passes on every signal it gets.
    let off = script.bytes(&[0; 32]);
    for which in 0..3 {
        script.attempt("setitimer", SYS_SETITIMER, &[which, off.address, 0]);
    }
    for signal in pending {
        add_take(&mut script, signal);
    }
    let (leader, _) = script.run(leader)?;
    let mut script = Script::new(&foothold.arena);
    for info in leader.pending_signals(true)? {
        let [signal, code] = [0, 8].map(|at| i32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]));
        if ITIMER_SIGNALS.contains(&signal) && code == SI_KERNEL {
            add_take(&mut script, signal);
        }
    }
    script.attempt("close_range", SYS_CLOSE_RANGE, &[0, u64::from(u32::MAX), 0]);
    // With no signal at its end: should the process come home first, its wait(2) does not see the keeper.
    let clone = [CLONE_VM, 0, 0, 0, 0];
    let keeper = if lends {
        // Nothing is open: these become 0 and 1, 2 and 3. Where they are refused, the keeper only keeps.
        let ends = [script.space(8), script.space(8)].map(|space| space.address);
        script.attempt("socketpair", SYS_SOCKETPAIR, &[AF_UNIX, SOCK_SEQPACKET, 0, ends[0]]);
        script.attempt("pipe2", SYS_PIPE2, &[ends[1], 0]);
        let keeper = script.child_lends("clone", SYS_CLONE, &clone);
        script.attempt("close_range", SYS_CLOSE_RANGE, &[0, u64::from(u32::MAX), 0]);
        keeper
    } else {
        script.child_parks("clone", SYS_CLONE, &clone)
    };
    let (leader, answers) = script.run(leader)?;
    let keeper = Pid(answers.of(keeper) as i32);
    leader.set_signal_mask(u64::MAX)?;
    Ok(LeftBehind {
        keeper,
        leader,
        foothold,
    })
}

/// What a process leaves behind once it runs elsewhere.
pub struct LeftBehind {
    /// The process that keeps the address space.
    pub keeper: Pid,
    /// The emptied first thread, stopped.
    pub leader: Stopped,
    pub(super) foothold: Foothold,
}

impl LeftBehind {
    /// Ends the emptied process: nothing of it stays but the image.
    pub fn exit(self) -> Result<(), CaptureError> {
        const SYS_EXIT_GROUP: i64 = 231;
        match self.leader.inject(self.foothold.syscall_at, SYS_EXIT_GROUP, [0; 6]) {
            Err(dunlin_sys::ptrace::TraceError::Gone { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The emptied process, which may execute the surrogate program: its thread, where calls can be injected, and memory
    /// to write to.
    pub fn into_parts(self) -> (Stopped, u64, u64) {
        (self.leader, self.foothold.syscall_at, self.foothold.arena.base() + PAGE)
    }
}

pub(super) fn own_filters(leader: &Stopped, count: Option<u32>, nest: usize) -> Result<Vec<Vec<u8>>, CaptureError> {
    let count = count.unwrap_or(0) as usize;
    let mut filters = Vec::with_capacity(count.saturating_sub(nest));
    // The nest's come first: the oldest has number 0.
    for index in nest..count {
        filters.extend(leader.seccomp_filter(index)?);
    }
    Ok(filters)
}

/// Takes the oldest pending signal of a number, without waiting: it runs elsewhere with the process.
pub(crate) fn add_take(script: &mut Script<'_>, signal: i32) {
    const SYS_RT_SIGTIMEDWAIT: i64 = 128;
    if !(1..=64).contains(&signal) {
        return;
    }
    let set = script.bytes(&(1u64 << (signal - 1)).to_le_bytes());
    let no_time = script.bytes(&[0; 16]);
    script.attempt(
        "rt_sigtimedwait",
        SYS_RT_SIGTIMEDWAIT,
        &[set.address, 0, no_time.address, 8],
    );
}

/// The living and ended children of a process, but for its keepers (which have no say in its life).
fn children(dir: &ProcDir, along: &BTreeMap<Pid, bool>) -> Result<Vec<Child>, CaptureError> {
    let mut children = Vec::new();
    for host in child_hosts(dir)? {
        let child = ProcDir::process(host);
        let (Ok(status), Ok(stat)) = (child.status(), child.stat()) else {
            continue;
        };
        // An image's keeper that has ended, and that a daemon which was killed has not had reaped.
        if status.state == 'Z' && stat.exit_signal == 0 {
            continue;
        }
        let last = |v: &[i32]| v.last().copied().map_or(Pid(0), Pid);
        let pid = last(&status.ns_pids);
        let stopped = along.get(&pid).copied().unwrap_or(status.state == 'T');
        children.push(Child {
            pid,
            pgid: last(&status.ns_pgids),
            sid: last(&status.ns_sids),
            along: along.contains_key(&pid),
            continued: false,
            ended: (status.state == 'Z').then_some(stat.exit_code),
            stop: stopped.then_some(ChildStop {
                waitable: false,
                unsaid: false,
                pending: Vec::new(),
            }),
            comm: stat.comm,
        });
    }
    Ok(children)
}

/// The children of a process: their numbers on this machine.
fn child_hosts(dir: &ProcDir) -> io::Result<Vec<i32>> {
    let mut hosts = Vec::new();
    for tid in dir.threads()? {
        let text = dir.text(&format!("task/{tid}/children"))?;
        hosts.extend(text.split_ascii_whitespace().filter_map(|n| n.parse::<i32>().ok()));
    }
    Ok(hosts)
}
