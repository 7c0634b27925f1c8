//! What travels inside the freeze.
//!
//! Owns the reading of a stopped process: the answers of its threads, what has changed since the plan, and the pages that
//! are certain to be touched at once. Refuses to change anything but what the process was prepared with.

use super::Frozen;
use super::children::children;
use crate::capture::questions::{ProcessQuestions, ThreadQuestions};
use crate::capture::threads::{self, ThreadManner};
use crate::capture::{
    CaptureError, Met, PAGE, Surroundings, clocks, descriptors, ended, read_traits, reading, shared, sleep, space,
};
use crate::steps;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Essence, Files, MappingKind, Pages, Space, ThreadImage};
use dunlin_sys::batch::Batch;
use dunlin_sys::pagemap::{self, Query};
use dunlin_sys::procfs::fdinfo::parse_timers;
use dunlin_sys::procfs::maps;
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::Script;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::FileExt;

/// A process with no more memory than this has its mappings listed in the freeze with their flags, if they have changed:
/// that takes a few milliseconds at most.
const LISTED_AGAIN: u64 = 256 << 20;
const SIGCONT: i32 = 18;
/// The largest of what is read there; it may lie across two pages.
const TIMESPEC: u64 = 16;
/// Arguments and environment beyond so many pages are left to the pager.
const MAX_ARGUMENT_PAGES: usize = 32;
/// ECHILD.
const NO_CHILD: i64 = -10;

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
        let (clocks_ns, asked_ns) = (clocks(&self.source.dir), sleep::monotonic_ns());
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

    fn space_now(&mut self, brk: u64, obstacles: &mut Vec<Obstacle>) -> Result<Option<Space>, CaptureError> {
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
        obstacles: &mut Vec<Obstacle>,
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
        // What was closed while the plan was made is not in it, even if the same is open again.
        let same = glimpses == source.glimpses
            && glimpses.len() == planned.table.len()
            && planned
                .descriptions
                .iter()
                .all(|description| description.owner.is_none())
            && met.share_as(source.host, &glimpses, planned)?;
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
                for address in sleep::reads(sleep) {
                    add(address);
                    add(address.saturating_add(TIMESPEC - 1));
                }
            }
        }
        // Arguments and environment: who reads them through /proc does not fault, and would find nothing.
        let [.., arg_start, _, _, env_end] = self.source.plan.image.space.layout;
        let words = (arg_start & !(PAGE - 1)..env_end).step_by(PAGE as usize);
        wanted.extend(words.take(MAX_ARGUMENT_PAGES));
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
}

pub(in crate::capture) fn own_filters(
    leader: &Stopped,
    count: Option<u32>,
    nest: usize,
) -> Result<Vec<Vec<u8>>, CaptureError> {
    let count = count.unwrap_or(0) as usize;
    let mut filters = Vec::with_capacity(count.saturating_sub(nest));
    // The nest's come first: the oldest has number 0.
    for index in nest..count {
        filters.extend(leader.seccomp_filter(index)?);
    }
    Ok(filters)
}
