//! The blank: a stopped process that is being turned into another.
//!
//! Owns the order of the steps. Each step is in a file of its own.

use super::anew::{start_anew, stop_at_rest};
use super::mappings::Remade;
use super::{During, Kit, RestoreError, descriptors, mappings, signals, threads, traits};
use crate::capture::held::Note;
use crate::capture::{SCRIPT_MASK, parked};
use crate::files::{Use, open_same};
use crate::install::Wanted;
use crate::steps;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Essence, Pages, Plan, ProcessImage};
use dunlin_sys::foothold::Foothold;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::{Options, Registers, Running, Stopped};
use dunlin_sys::refuge::Refuge;
use dunlin_sys::script::Script;
use dunlin_sys::surrogate;
use dunlin_sys::uffd::Uffd;
use rustix::fs::OFlags;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// The descriptor by which a blank gets its program's name; no other is open then.
const EXE: i32 = 3;

/// A process that is being restored.
pub struct Blank {
    /// Its PID.
    pub pid: Pid,
    /// Its number on this machine.
    pub host: i32,
    pub(super) image: ProcessImage,
    pub(super) file_pages: BTreeMap<u64, Vec<u8>>,
    pub(crate) foothold: Foothold,
    pub(super) memory: File,
    pub(super) uffd: Uffd,
    /// Threads by PID, with their number on this machine; all stopped, traced by this OS thread.
    pub(super) threads: BTreeMap<Pid, i32>,
    /// Sleeps that were over before the thread could fall asleep again: their answers, by host number.
    pub(super) slept: BTreeMap<i32, i64>,
    /// Limits that select(2) and its like read from memory: address, the call, when it ends (CLOCK_MONOTONIC).
    pub(super) limits: Vec<(u64, i64, u64)>,
    /// The registers that each thread gets when it may run, by host number.
    pub(super) loaded: BTreeMap<i32, Registers>,
    /// What its process was stopped by when a script ran last.
    pub(super) stopped: Cell<Option<i32>>,
    /// Where its first thread is while the loop is taken out.
    pub(super) refuge: Option<Refuge>,
    pub(crate) options: Options,
    /// What is in its table.
    pub(super) installed: descriptors::Installed,
}

/// Registers (27 words) and extended state of a thread.
pub type ThreadState = (Vec<u64>, Vec<u8>);

/// A process that runs here now.
pub struct Resumed {
    /// Serves its missing pages.
    pub uffd: Uffd,
    /// What is registered with it.
    pub regions: Vec<(u64, u64)>,
    /// Its number on this machine.
    pub host: i32,
}

impl Blank {
    /// Does everything that can be done before the freeze in the surrogate (or fresh blank) whose host number is given.
    ///
    /// `clock_offsets_ns`: how far its clocks must be ahead of this daemon's, at least and at most.
    /// `expendable`: it dies with this daemon until it is resumed; not so for an entry that stands for a process that
    /// runs elsewhere.
    pub fn prepare(
        host: i32,
        expendable: bool,
        plan: &Plan,
        clock_offsets_ns: [(i64, i64); 2],
        kit: &mut Kit<'_>,
    ) -> Result<Blank, RestoreError> {
        let pid = plan.image.lineage.pid;
        check_sound(pid, &plan.image)?;
        let options = Options {
            exit_kill: expendable,
            follow: true,
            suspend_seccomp: true,
        };
        kit.options = options;
        let running = Running::seize(host, options).during(pid, "tracing the blank")?;
        let thread = stop_at_rest(running).during(pid, "stopping the blank")?;
        thread.set_signal_mask(SCRIPT_MASK).during(pid, "blocking signals")?;
        let exe = open_same(
            kit.root.as_fd(),
            &plan.image.space.exe,
            OFlags::RDONLY,
            Use::Content,
            kit.shared,
        )
        .map_err(|error| {
            RestoreError::Obstacles(vec![crate::descriptors::file::missing(
                pid,
                &plan.image.space.exe,
                &error,
            )])
        })?;
        surrogate::secure(&thread, host).during(pid, "securing its entry")?;
        let (thread, exe) = start_anew(pid, host, thread, clock_offsets_ns, exe, kit)?;
        surrogate::secure(&thread, host).during(pid, "securing its entry")?;
        let ranges: Vec<(u64, u64)> = plan.image.space.mappings.iter().map(|m| (m.start, m.end)).collect();
        let (thread, foothold) = Foothold::plant(thread, host, &ranges).during(pid, "planting the loop")?;
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(ProcDir::process(host).path("mem"))
            .during(pid, "opening its memory")?;
        // Should this daemon die, an entry that stands for a process waits here, from the first script on.
        Note::blank(&plan.image.signals.actions).leave(&foothold);
        let registers = thread.registers().during(pid, "reading registers")?;
        thread
            .set_registers(&parked(&foothold, &registers))
            .during(pid, "parking the blank")?;
        // After it, too, it is parked: what it was before leads into memory that is gone then.
        let (thread, foothold) = mappings::clear(pid, host, thread, foothold, &plan.image.space)?;
        mappings::map(
            pid,
            host,
            thread,
            &foothold,
            &plan.image.space,
            &plan.image.space.mappings,
            kit,
        )?;
        let uffd = mappings::demand(pid, host, &foothold, &plan.image.space.mappings, kit)?;
        let mut blank = Blank {
            pid,
            host,
            image: plan.image.clone(),
            file_pages: BTreeMap::new(),
            foothold,
            memory,
            uffd,
            threads: BTreeMap::from([(pid, host)]),
            slept: BTreeMap::new(),
            limits: Vec::new(),
            loaded: BTreeMap::new(),
            refuge: None,
            stopped: Cell::new(None),
            options,
            installed: BTreeMap::new(),
        };
        blank.refuge = Refuge::find(host, blank.foothold.syscall_at).during(pid, "looking for a refuge")?;
        for run in &plan.file_pages {
            blank.write_file_pages(run)?;
        }
        let number = exe.is_some().then_some(EXE);
        if let Some(fd) = exe {
            let wanted = Wanted {
                fd,
                number: EXE,
                close_on_exec: true,
            };
            install(pid, pid, blank.leader(), blank.foothold.syscall_at, vec![wanted], kit)?;
        }
        mappings::describe(&blank, &plan.image.space, number)?;
        descriptors::install_all(&mut blank, &plan.image.files, kit)?;
        signals::set_actions(&blank, None, &plan.image.signals.actions)?;
        signals::count_ahead(&blank, &plan.image.signals)?;
        traits::set(&blank, &plan.image.traits, &plan.image.seccomp, kit)?;
        threads::make(&mut blank, plan.image.threads.iter().map(|t| t.tid), kit)?;
        Ok(blank)
    }

    /// Makes the descriptors of all processes of a move what they are inside the freeze, and connects them with each other;
    /// comes before anything is [loaded](Blank::load).
    pub fn load_descriptors<'a>(
        blanks: &mut [Blank],
        essences: impl Iterator<Item = &'a Essence>,
        kit: &mut Kit<'_>,
    ) -> Result<(), RestoreError> {
        for (blank, essence) in blanks.iter_mut().zip(essences) {
            let same = || kit.common.sockets_remade.then(|| blank.image.files.clone());
            if let Some(files) = essence.files.clone().or_else(same) {
                kit.options = blank.options;
                descriptors::correct(blank, &files, kit)?;
            }
        }
        descriptors::connect_at_last(blanks, kit)
    }

    /// Connects the descriptors of prepared processes with each other.
    pub fn connect(blanks: &[Blank], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        descriptors::connect(blanks, kit)
    }

    /// Corrects what has changed since the plan, puts everything of the freeze in place and verifies it. `stale` are the
    /// pages that came ahead in vain (first address, number of pages).
    pub fn load(&mut self, essence: &Essence, stale: &[(u64, u64)], kit: &mut Kit<'_>) -> Result<Remade, RestoreError> {
        kit.options = self.options;
        let mut remade = Remade::default();
        if let Some(space) = &essence.space {
            remade = mappings::correct(self, space, kit)?;
        }
        steps::mark("correcting mappings");
        if !stale.is_empty() {
            mappings::drop_stale(self, stale)?;
        }
        if essence.traits != self.image.traits || essence.seccomp != self.image.seccomp {
            traits::correct(self, essence, kit)?;
        }
        steps::mark("correcting traits");
        for run in &essence.file_pages {
            self.write_file_pages(run)?;
        }
        mappings::drop_pages(self, &essence.file_pages_dropped)?;
        for part in &essence.shared {
            let memory = kit.common.shared.get(&part.memory).ok_or(RestoreError::Unsound {
                pid: self.pid,
                why: "bytes of shared memory that it does not have",
            })?;
            memory
                .write_all_at(&part.bytes, part.offset)
                .during(self.pid, "filling shared memory")?;
        }
        steps::mark("pages of file mappings");
        for run in &essence.hot_pages {
            self.check_pages(run)?;
            self.uffd
                .copy(run.address, &run.bytes)
                .during(self.pid, "installing hot pages")?;
        }
        steps::mark("hot pages");
        signals::set_actions(self, Some(&self.image.signals.actions), &essence.signals.actions)?;
        steps::mark("signal actions");
        threads::make(self, essence.threads.iter().map(|t| t.tid), kit)?;
        threads::end_others(self, &essence.threads)?;
        steps::mark("threads that came or went");
        threads::load(self, essence, kit)?;
        Ok(remade)
    }

    /// What needs pages that may be elsewhere. The caller has taken [`Blank::pages`] into the pager before.
    pub fn complete(&self, essence: &Essence) -> Result<(), RestoreError> {
        threads::register_rest(self, essence)?;
        threads::wait_for_clocks(self, essence)
    }

    /// From now on it survives this daemon, waiting: the home has been, or is about to be, asked for the commit.
    pub fn outlive(&self, essence: &Essence) -> Result<(), RestoreError> {
        Note::blank(&essence.signals.actions).leave(&self.foothold);
        let options = Options {
            exit_kill: false,
            ..self.options
        };
        for host in self.threads.values() {
            Stopped::assume(*host)
                .set_options(options)
                .during(self.pid, "letting it outlive this daemon")?;
        }
        Ok(())
    }

    /// Has a thread wait in the loop, should it be let go.
    pub(super) fn park(&self, thread: &Stopped) -> Result<(), RestoreError> {
        let registers = thread.registers().during(self.pid, "reading registers")?;
        thread
            .set_registers(&parked(&self.foothold, &registers))
            .during(self.pid, "parking a thread")
    }

    /// Lets the program run. The caller has taken [`Blank::pages`] into the pager before.
    pub fn resume(self, essence: &Essence) -> Result<Resumed, RestoreError> {
        super::locks::take(&self)?;
        steps::mark("locks of files");
        threads::resume(&self, essence)?;
        let regions = mappings::demanded(&self.image.space.mappings);
        Ok(Resumed {
            uffd: self.uffd,
            regions,
            host: self.host,
        })
    }

    /// The missing pages' descriptor (a second handle) and the regions that are registered with it.
    pub fn pages(&self) -> Result<(Uffd, Vec<(u64, u64)>), RestoreError> {
        let uffd = self.uffd.try_clone().during(self.pid, "copying its userfaultfd")?;
        Ok((uffd, mappings::demanded(&self.image.space.mappings)))
    }

    /// Its children, or their surrogates, have been stopped, continued or ended as the children were, and the kernel has told
    /// it so: what it had waited for, or been signalled, before is taken away again. `has_past`: its place may have been told
    /// of all of them before it came.
    pub fn unhear_children(&self, essence: &Essence, has_past: bool) -> Result<(), RestoreError> {
        const SYS_WAITID: i64 = 247;
        const P_PID: u64 = 1;
        /// WSTOPPED, WCONTINUED, WNOHANG.
        const HEAR: u64 = 2 | 8 | 1;
        const SIGCHLD: i32 = 17;
        let mut script = Script::new(&self.foothold.arena);
        let mut any = false;
        for child in essence.lineage.children.iter().filter(|child| child.ended.is_none()) {
            any |= has_past || child.stop.is_some() || child.continued;
            let waitable = child.stop.as_ref().map_or(child.continued, |stop| stop.waitable);
            if !waitable && (has_past || child.stop.is_some()) {
                script.attempt("waitid", SYS_WAITID, &[P_PID, child.pid.0 as u64, 0, HEAR, 0]);
            }
        }
        any |= essence.lineage.children.iter().any(|child| child.ended.is_some());
        let pending = essence.threads.iter().flat_map(|t| &t.pending);
        let told = pending
            .chain(&essence.signals.pending)
            .any(|info| info.starts_with(&SIGCHLD.to_le_bytes()));
        if any && !told {
            crate::capture::freeze::add_take(&mut script, SIGCHLD);
        }
        self.run(self.host, script, "waiting for children")
    }

    /// Its memory, to be written by whoever brings pages before it runs.
    pub fn memory(&self) -> std::io::Result<File> {
        self.memory.try_clone()
    }

    /// Hashes of all its private pages; every one of them must be here.
    pub fn digest(&self, essence: &Essence) -> std::io::Result<crate::verify::Digest> {
        let areas = crate::verify::kernel_areas(&essence.threads);
        let pagemap = File::open(ProcDir::process(self.host).path("pagemap"))?;
        crate::verify::digest(&self.memory, &pagemap, &self.image.space.mappings, &areas)
    }

    /// Registers (27 words) and extended state of one of its threads, as they are.
    pub fn read_thread(&self, tid: Pid) -> Result<Option<ThreadState>, RestoreError> {
        let Some(host) = self.threads.get(&tid) else {
            return Ok(None);
        };
        let thread = Stopped::assume(*host);
        let registers = match self.loaded.get(host) {
            Some(registers) => *registers,
            None => thread.registers().during(self.pid, "reading registers")?,
        };
        let mut xstate = Vec::new();
        thread
            .xstate(&mut xstate)
            .during(self.pid, "reading the extended state")?;
        Ok(Some((crate::capture::to_words(&registers), xstate)))
    }

    /// The descriptors it was given.
    pub fn files(&self) -> &dunlin_proto::image::Files {
        &self.image.files
    }

    /// The address space that it should have.
    pub fn space(&self) -> &dunlin_proto::image::Space {
        &self.image.space
    }

    /// Where its foothold is.
    pub fn hole(&self) -> (u64, u64) {
        self.foothold.range()
    }

    /// Memory of the blank that may be overwritten.
    pub fn scratch(&self) -> u64 {
        self.foothold.range().1 - 4096
    }

    /// The first thread, stopped.
    pub(crate) fn leader(&self) -> Stopped {
        Stopped::assume(self.host)
    }

    /// Runs a script in one of its threads.
    pub(crate) fn run(&self, tid: i32, script: Script<'_>, what: &'static str) -> Result<(), RestoreError> {
        if script.is_empty() {
            return Ok(());
        }
        let (_, answers) = script.run(Stopped::assume(tid)).during(self.pid, what)?;
        self.stopped.set(answers.stopped_by());
        Ok(())
    }

    /// Writes pages of a private file mapping, whatever its protection.
    fn write_file_pages(&mut self, run: &Pages) -> Result<(), RestoreError> {
        self.check_pages(run)?;
        self.memory
            .write_all_at(&run.bytes, run.address)
            .during(self.pid, "writing pages of file mappings")?;
        for (i, bytes) in run.bytes.chunks(4096).enumerate() {
            self.file_pages.insert(run.address + i as u64 * 4096, bytes.to_vec());
        }
        Ok(())
    }

    fn check_pages(&self, run: &Pages) -> Result<(), RestoreError> {
        let sound = run.address.is_multiple_of(4096) && run.bytes.len().is_multiple_of(4096) && !run.bytes.is_empty();
        let end = run.address.checked_add(run.bytes.len() as u64);
        let inside = end.is_some_and(|end| end <= 0x7fff_ffff_f000);
        if sound && inside {
            Ok(())
        } else {
            Err(RestoreError::Unsound {
                pid: self.pid,
                why: "a page outside",
            })
        }
    }
}

/// Has descriptors installed through a stopped thread.
pub(crate) fn install(
    pid: Pid,
    tid: Pid,
    thread: Stopped,
    at: u64,
    wanted: Vec<Wanted>,
    kit: &Kit<'_>,
) -> Result<Stopped, RestoreError> {
    if wanted.is_empty() {
        return Ok(thread);
    }
    kit.installer
        .install(thread, at, tid, wanted, kit.options)
        .during(pid, "installing descriptors")
}

/// What a peer sends is checked before any of it is used.
fn check_sound(pid: Pid, image: &ProcessImage) -> Result<(), RestoreError> {
    let unsound = |why| Err(RestoreError::Unsound { pid, why });
    if let Some(why) = image.space.unsound() {
        return unsound(why);
    }
    if !image.files.is_sound() {
        return unsound("a descriptor of a description that is not listed");
    }
    if image.signals.actions.len() != 64 || image.traits.limits.len() != 16 || image.threads.is_empty() {
        return unsound("a part of it is missing");
    }
    Ok(())
}
