//! Capture: a running process becomes a [`Plan`], and a stopped one an [`Essence`](dunlin_proto::image::Essence).
//!
//! Owns the source's side of a move as far as the process itself is concerned: the foothold, what is read while the
//! program runs, and (in [`freeze`]) what is read while it is stopped. Refuses to know nodes, connections and
//! decisions. Invariants: nothing here changes what the program can observe; after every function that returns the
//! program runs on, or is stopped with all it needs to run on in the returned value; nothing in the freeze touches all
//! pages.

mod ahead;
mod clocks;
pub(crate) mod descriptors;
mod ended;
mod error;
pub mod freeze;
pub mod held;
mod questions;
mod reading;
pub mod shared;
mod sleep;
pub mod space;
mod stop;
mod surroundings;
mod threads;
mod trap;
mod waker;
mod writes;

pub use ahead::{Run, Watch, demanded};
pub use clocks::{clock_offsets, clocks, time_offsets};
pub use descriptors::Met;
pub use ended::made_again;
pub use error::CaptureError;
pub use sleep::{let_go, monotonic_ns, remember, select_limit, select_unit_ns};
pub use surroundings::Surroundings;
pub use threads::{from_words, to_words};
pub use trap::Trap;

use crate::obstacle::obstacle;
use descriptors::Glimpse;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{Pid, RunId};
use dunlin_proto::image::{Files, Lineage, Pages, Plan, ProcessImage, Space, ThreadImage, Traits};
use dunlin_sys::foothold::{Foothold, syscall_instruction};
use dunlin_sys::inspect;
use dunlin_sys::pagemap::{self, Query};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::procfs::fdinfo::parse_timers;
use dunlin_sys::procfs::limits;
use dunlin_sys::procfs::maps::{Mapping, VmFlags};
use dunlin_sys::procfs::status::Status;
use dunlin_sys::ptrace::{Options, Registers, Running, Stop, Stopped};
use dunlin_sys::refuge::{Others, Refuge};
use dunlin_sys::script::{Held, Script};
use dunlin_sys::uffd::Uffd;
use questions::{ProcessAnswers, ProcessQuestions};
use sleep::Sleeps;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;
use stop::{STOP_PATIENCE, await_stop, refuse_at_once, stop_one};

/// All signals blocked but SIGTRAP, which ends a script.
pub const SCRIPT_MASK: u64 = !(1 << 4);
const PAGE: u64 = 4096;

/// A process that is being moved away, while it runs.
pub struct Source {
    /// Its PID.
    pub pid: Pid,
    /// Its number on this machine.
    pub host: i32,
    /// What the destination was told.
    pub plan: Plan,
    dir: ProcDir,
    memory: File,
    pagemap: File,
    foothold: Foothold,
    listing: Vec<(Mapping, VmFlags)>,
    glimpses: Vec<Glimpse>,
    file_pages: BTreeMap<u64, Vec<u8>>,
    /// The threads' numbers in the nest, by their numbers on this machine.
    tids: BTreeMap<i32, Pid>,
    sleeps: Sleeps,
    nest_filters: usize,
    refuge: Option<Refuge>,
    writes: ahead::Writes,
    /// The listing is newer than the plan.
    looked_again: bool,
}

/// What was seen of a process while it ran.
struct Looked {
    space: Space,
    files: Files,
    listing: Vec<(Mapping, VmFlags)>,
    glimpses: Vec<Glimpse>,
    tids: BTreeMap<i32, Pid>,
    traits: Traits,
    resident_bytes: u64,
    pagemap: File,
}

/// The memory of a captured process, to be served to its new node. Both files hold the address space, not the task.
pub struct Memory {
    /// `/proc/PID/mem`.
    pub memory: File,
    /// `/proc/PID/pagemap`.
    pub pagemap: File,
}

impl Source {
    /// Gains a foothold in a running process and reads everything that the destination needs to prepare.
    ///
    /// `lineage` is what the caller's process table knows; `nest_filters` how many seccomp filters every process of
    /// the nest has; `met` the open file descriptions met in other processes of the same move. With `watch`, its writes
    /// can be [tracked](Source::watch_writes) until it is frozen.
    pub fn prepare(
        host: i32,
        lineage: Lineage,
        nest_filters: usize,
        around: &Surroundings<'_>,
        met: &mut Met,
        watch: bool,
    ) -> Result<Source, CaptureError> {
        let dir = ProcDir::process(host);
        let pid = lineage.pid;
        let status = dir.status()?;
        refuse_at_once(pid, &dir, &status)?;
        let timers_text = dir.text("timers")?;
        let timers = parse_timers(&timers_text).map_err(io::Error::from)?;

        let mut sleeps = Sleeps::default();
        let refuge = Refuge::find(host, syscall_instruction(&dir)?)?;
        let claim = waker::claim(host);
        sleeps.look(host, host);
        let (thread, stop) = stop_one(pid, Running::seize(host, Options::default())?)?;
        // Only now: it may have executed another program since it was looked at.
        let (memory, refuge) = match memory_of(host, &dir, refuge) {
            Ok(found) => found,
            Err(error) => {
                thread.detach(0)?;
                return Err(error);
            }
        };
        let (registers, mask) = (thread.registers()?, thread.signal_mask()?);
        let again = sleeps.again(host, host, &registers).filter(|_| stop == Stop::Interrupt);
        let asleep = match &again {
            Some(again) => sleeps.find_ended(host, host, again, &memory),
            None => sleeps.find(host, host, &registers, &memory),
        };
        let mut restore = again.unwrap_or(registers);
        let thread = finish_write(thread, host, &mut restore, mask, &memory)?;
        let filters = freeze::own_filters(&thread, status.seccomp_filters, nest_filters);
        let asked = Trap::look(&dir).map_err(CaptureError::from).and_then(|trap| {
            let held = Held {
                tid: host,
                mask,
                registers: restore,
            };
            let watch = watch && filters.as_ref().is_ok_and(Vec::is_empty);
            first_stop(thread, &held, refuge.as_ref(), &timers, trap, watch)
        });
        // Whatever came of it, the program must run on as it was.
        let thread = Stopped::assume(host);
        if let Some(again) = again.filter(|_| ended::is_signalled(host, host, mask, mask)) {
            restore = ended::interrupted(&again);
        } else if again.and(asleep).is_some() {
            let_go(host, host);
        }
        let undone = thread
            .set_signal_mask(mask)
            .and_then(|()| thread.set_registers(&restore))
            .and_then(|()| thread.detach(0));
        drop(claim);
        let (foothold, answers, watched) = asked?;
        undone?;
        foothold.arena.release();
        let seccomp = filters?;

        let hole = foothold.range();
        // The program runs: anything may be gone when it is looked at, and the foothold must not stay behind then.
        let look = |met: &mut Met| -> Result<Looked, CaptureError> {
            let mut obstacles = Vec::new();
            let listing = space::listing(&dir)?;
            let layout = dir.stat()?.layout;
            let space = space::read(pid, &dir, hole, layout, answers.brk, &listing, &mut obstacles)?;
            shared::look(pid, &space, around, &mut obstacles);
            let glimpses = descriptors::glimpse(&dir)?;
            // It may have finished reading by the freeze, or be held there for so long already.
            reading::look(pid, host, &glimpses);
            let owner = descriptors::Owner { pid, host, around };
            let looked = Looked {
                files: descriptors::read(&owner, &glimpses, None, met, &mut obstacles)?,
                tids: read_tids(pid, host, &dir, &mut obstacles)?,
                traits: read_traits(&dir, &status, &answers)?,
                resident_bytes: dir.stat()?.rss_pages * PAGE,
                pagemap: File::open(dir.path("pagemap"))?,
                space,
                listing,
                glimpses,
            };
            if obstacles.is_empty() {
                Ok(looked)
            } else {
                Err(CaptureError::Obstacles(obstacles))
            }
        };
        let looked = look(met).map_err(|error| give_up(host, &foothold, error))?;
        let mut source = Source {
            pid,
            host,
            plan: Plan {
                image: ProcessImage {
                    lineage,
                    traits: looked.traits,
                    space: looked.space,
                    files: looked.files,
                    signals: answers.signals.clone(),
                    threads: Vec::new(),
                    seccomp,
                    stopped_by: None,
                },
                file_pages: Vec::new(),
                clocks_ns: clocks(&dir),
                hole,
                resident_bytes: looked.resident_bytes,
                cpu_features: Vec::new(),
                xstate_bytes: 0,
            },
            dir,
            memory,
            pagemap: looked.pagemap,
            foothold,
            listing: looked.listing,
            glimpses: looked.glimpses,
            file_pages: BTreeMap::new(),
            tids: looked.tids,
            sleeps,
            nest_filters,
            refuge,
            writes: watched.map_or(ahead::Writes::Unwatched, ahead::Writes::Watchable),
            looked_again: false,
        };
        source.plan.image.threads = source.tids.values().copied().map(placeholder).collect();
        source.plan.image.threads.sort_by_key(|t| (t.tid != pid, t.tid));
        // What is unmapped meanwhile is found out in the freeze.
        source.plan.file_pages = source.read_file_pages().unwrap_or_default();
        for run in &source.plan.file_pages {
            for (i, page) in run.bytes.chunks(PAGE as usize).enumerate() {
                source.file_pages.insert(run.address + i as u64 * PAGE, page.to_vec());
            }
        }
        Ok(source)
    }

    /// Takes the foothold out of a process that will not move after all.
    pub fn abandon(self) {
        let _ = give_up(self.host, &self.foothold, CaptureError::Gone);
    }

    /// The files through which its pages can be read, now and for as long as the address space lives.
    pub fn memory(&self) -> io::Result<Memory> {
        Ok(Memory {
            memory: self.memory.try_clone()?,
            pagemap: self.pagemap.try_clone()?,
        })
    }

    /// By which arena it is known again, should this daemon die: see [`held::Abandoned::arena`].
    pub fn arena(&self) -> io::Result<u64> {
        self.foothold.arena.number()
    }

    /// Whether a userfaultfd serves some of its memory.
    pub fn is_watched(&self) -> bool {
        self.listing.iter().any(|(_, flags)| flags.contains(b"um"))
    }

    /// The standard streams of runs that it uses.
    pub fn streams(&self) -> Vec<(RunId, u8)> {
        self.plan.image.files.streams()
    }

    /// Has it locks of files?
    pub fn has_locks(&self) -> bool {
        let mut all = self.plan.image.files.descriptions.iter();
        all.any(|description| !description.locks.is_empty())
    }

    /// How far its time namespace's clocks are ahead of this daemon's, nanoseconds.
    pub fn clock_offsets(&self) -> [i64; 2] {
        clock_offsets(&self.dir)
    }

    /// The pages that the program wrote in private mappings of files: they cannot be fetched on demand, because the
    /// kernel would fill a missing one from the file.
    fn read_file_pages(&self) -> io::Result<Vec<Pages>> {
        let mut runs = Vec::new();
        for mapping in &self.plan.image.space.mappings {
            if mapping.kind.is_copied() {
                for range in pagemap::scan(&self.pagemap, mapping.start, mapping.end, Query::CONTENT) {
                    let range = range.map_err(io::Error::from)?;
                    let mut bytes = vec![0u8; (range.end - range.start) as usize];
                    self.memory.read_exact_at(&mut bytes, range.start)?;
                    runs.push(Pages {
                        address: range.start,
                        bytes,
                    });
                }
            }
        }
        Ok(runs)
    }
}

/// The memory of a stopped process; and its refuge, which was looked for while it ran, and is again if need be.
fn memory_of(host: i32, dir: &ProcDir, refuge: Option<Refuge>) -> Result<(File, Option<Refuge>), CaptureError> {
    let memory = File::open(dir.path("mem"))?;
    let refuge = match refuge {
        Some(refuge) if !refuge.is_in(&memory) => Refuge::find(host, syscall_instruction(dir)?)?,
        refuge => refuge,
    };
    Ok((memory, refuge))
}

/// Plants the foothold and asks the process what only it can answer. The caller puts registers and mask back.
fn first_stop(
    thread: Stopped,
    held: &Held,
    refuge: Option<&Refuge>,
    timers: &[dunlin_sys::procfs::fdinfo::PosixTimer],
    trap: Trap,
    watch: bool,
) -> Result<(Foothold, ProcessAnswers, Option<Uffd>), CaptureError> {
    let host = held.tid;
    if let Some(refuge) = refuge {
        refuge.enter(&thread, host, held, Others::Run)?;
    }
    thread.set_signal_mask(SCRIPT_MASK)?;
    let (thread, foothold) = Foothold::plant(thread, host, &[])?;
    foothold.arena.hold(0, held);
    let mut script = Script::new(&foothold.arena);
    let questions = ProcessQuestions::ask(&mut script, timers);
    let (thread, answers) = script.run(thread)?;
    let mut answers = questions.read(&answers);
    trap.correct(&mut answers.signals.actions);
    let (thread, watched) = if watch {
        let (thread, uffd) = ahead::userfaultfd_of(thread, host, &foothold)?;
        (thread, Some(uffd))
    } else {
        (thread, None)
    };
    trap.put_back(thread, &foothold, &answers.signals.actions)?;
    Ok((foothold, answers, watched))
}

/// See [`writes`]. Whatever goes wrong, the thread can be let run on with these registers.
fn finish_write(
    thread: Stopped,
    host: i32,
    registers: &mut Registers,
    mask: u64,
    memory: &File,
) -> Result<Stopped, CaptureError> {
    if !writes::is_short(registers, memory) {
        return Ok(thread);
    }
    let at = dunlin_sys::foothold::syscall_instruction(&ProcDir::process(host))?;
    thread.set_signal_mask(SCRIPT_MASK)?;
    let thread = writes::complete(thread, host, at, registers, memory)?;
    thread.set_registers(registers)?;
    thread.set_signal_mask(mask)?;
    Ok(thread)
}

/// Takes the foothold out of a running process and hands the reason back.
fn give_up(host: i32, foothold: &Foothold, reason: CaptureError) -> CaptureError {
    let undo = || -> Result<(), CaptureError> {
        let _claim = waker::claim(host);
        let mut sleeps = Sleeps::default();
        sleeps.look(host, host);
        let (thread, _) = Running::seize(host, Options::default())?.stop(Instant::now() + STOP_PATIENCE)?;
        let (mut found, mask) = (thread.registers()?, thread.signal_mask()?);
        let memory = File::open(ProcDir::process(host).path("mem"))?;
        if !foothold.is_planted(host) {
            // It has executed another program, which may write to a pipe by now.
            return Ok(finish_write(thread, host, &mut found, mask, &memory)?.detach(0)?);
        }
        let again = sleeps
            .again(host, host, &found)
            .filter(|_| !ended::is_signalled(host, host, mask, mask));
        let asleep = again.and_then(|again| sleeps.find_ended(host, host, &again, &memory));
        let mut registers = again.unwrap_or(found);
        let thread = finish_write(thread, host, &mut registers, mask, &memory)?;
        let held = Held {
            tid: host,
            mask,
            registers,
        };
        if let Some(refuge) = Refuge::find(host, foothold.syscall_at)? {
            refuge.enter(&thread, host, &held, Others::Run)?;
        }
        thread.set_signal_mask(SCRIPT_MASK)?;
        let thread = foothold.uproot(thread)?;
        thread.set_signal_mask(mask)?;
        thread.set_registers(&held.registers)?;
        if asleep.is_some() {
            let_go(host, host);
        }
        Ok(thread.detach(0)?)
    };
    if let Err(error) = undo() {
        // An unused mapping stays in the program: harmless, and worth a line.
        tracing::warn!(host, %error, "the foothold could not be taken out");
    }
    reason
}

fn read_tids(
    pid: Pid,
    host: i32,
    dir: &ProcDir,
    obstacles: &mut Vec<Obstacle>,
) -> Result<BTreeMap<i32, Pid>, CaptureError> {
    let mut tids = BTreeMap::new();
    for tid in dir.threads()? {
        let thread = ProcDir::thread(host, tid);
        // A thread that has ended meanwhile is simply not there.
        let Ok(status) = thread.status() else { continue };
        let Some(number) = status.ns_pids.last().copied() else {
            continue;
        };
        if tid != host {
            for (what, words) in [
                (inspect::Sharing::Files, "a descriptor table of its own"),
                (inspect::Sharing::FileSystem, "a working directory of its own"),
            ] {
                if !inspect::shares((host, tid), what).unwrap_or(true) {
                    obstacles.push(obstacle(
                        pid,
                        "thread",
                        format_args!("thread {number}"),
                        format!("it has {words} (unshare)"),
                        "such a thread cannot be moved yet; keep the process on this node",
                    ));
                }
            }
        }
        tids.insert(tid, Pid(number));
    }
    Ok(tids)
}

fn read_traits(dir: &ProcDir, status: &Status, answers: &ProcessAnswers) -> Result<Traits, CaptureError> {
    let path = |name: &str| dir.link(name).map(|p| p.into_os_string().into_encoded_bytes());
    let limits = limits::parse(&dir.text("limits")?).map_err(io::Error::from)?;
    Ok(Traits {
        cwd: path("cwd")?,
        root: path("root")?,
        umask: status.umask,
        personality: u32::from_str_radix(dir.text("personality")?.trim(), 16).unwrap_or(0),
        uids: status.uids,
        gids: status.gids,
        groups: status.groups.clone(),
        capabilities: status.capabilities,
        securebits: answers.securebits,
        no_new_privs: status.no_new_privs,
        dumpable: answers.dumpable,
        subreaper: answers.subreaper,
        thp_disable: answers.thp_disable,
        limits,
        oom_score_adj: dir.text("oom_score_adj")?.trim().parse().unwrap_or(0),
    })
}

fn placeholder(tid: Pid) -> ThreadImage {
    ThreadImage {
        tid,
        comm: Vec::new(),
        registers: Vec::new(),
        xstate: Vec::new(),
        mask: 0,
        pending: Vec::new(),
        alt_stack: [0; 3],
        robust_list: [0; 2],
        clear_tid: 0,
        rseq: None,
        sleep: None,
        schedule: [0; 4],
        affinity: None,
        io_priority: 0,
        timer_slack_ns: 0,
        parent_death_signal: 0,
    }
}

/// Registers of a thread that waits at the arena's park until it is told otherwise, also after calls that it is made to do.
pub fn parked(foothold: &Foothold, registers: &Registers) -> Registers {
    Registers {
        rip: foothold.arena.park_address(),
        rsp: foothold.arena.landing(),
        orig_rax: u64::MAX,
        rax: 0,
        ..*registers
    }
}
