//! Epoll sets. See epoll_ctl(2), KCMP_EPOLL_TFD in kcmp(2).
//!
//! A watch is of a description, under the number that its descriptor had when it was added; the number may be another
//! file's by now. Watches are added by a process of the move itself, with the description under that number for as long
//! as it takes: a signalfd is watched for the signals of whoever adds it. Adding asks the file whether it is ready, so that
//! no event that was still to be told is lost; one that was told already may, with EPOLLET, be told once more, as
//! epoll(7) allows. A watch with EPOLLONESHOT that has fired is made to fire here, and its event is thrown away.

use super::{Look, Refusal};
use crate::capture::descriptors::Glimpse;
use crate::install::Wanted;
use crate::restore::{Blank, During, Kit, RestoreError};
use dunlin_proto::image::{Description, DescriptionKind, Files, Watch};
use dunlin_sys::inspect;
use dunlin_sys::procfs::special;
use dunlin_sys::script::Script;
use rustix::event::{PollFd, PollFlags, epoll};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const SYS_CLOSE: i64 = 3;
const SYS_EPOLL_CTL: i64 = 233;
const ADD: u64 = 1;
const DELETE: u64 = 2;
const ONESHOT: u32 = 1 << 30;
/// EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET: what is left of a watch that has fired.
const MANNER: u32 = 0xf << 28;
/// IN, PRI, OUT, ERR, HUP, RDNORM, RDBAND, WRNORM, WRBAND, MSG, RDHUP.
const ANYTHING: u32 = 0x27df;
/// No more watches in one set: a bound on what a peer sends.
const MAX_WATCHES: usize = 1 << 22;

/// A watch as /proc has it: its target is known by number only.
pub(crate) struct Found {
    pub watch: Watch,
    pub inode: u64,
    /// Among those with this number.
    pub nth: u32,
}

/// What an epoll descriptor watches; the targets are not known yet.
pub(crate) fn look(look: &Look<'_>) -> io::Result<Vec<Found>> {
    let mut nths: BTreeMap<i32, u32> = BTreeMap::new();
    let of = |seen: special::Watch| {
        let nth = nths.entry(seen.number).or_insert(0);
        *nth += 1;
        Found {
            watch: Watch {
                number: seen.number,
                target: 0,
                events: seen.events,
                data: seen.data,
            },
            inode: seen.inode,
            nth: *nth - 1,
        }
    };
    Ok(special::watches(&look.glimpse.steady)?.into_iter().map(of).collect())
}

/// Whether a descriptor is what a watch is of.
pub(crate) fn is_target(look: &Look<'_>, found: &Found, host: i32, candidate: &Glimpse) -> io::Result<bool> {
    // A socket has one description.
    let name = candidate.link.as_os_str().as_encoded_bytes();
    if let Some(inode) = name.strip_prefix(b"socket:[").and_then(|rest| rest.strip_suffix(b"]")) {
        return Ok(std::str::from_utf8(inode).is_ok_and(|inode| inode.parse() == Ok(found.inode)));
    }
    let candidate = (host, candidate.number);
    match inspect::is_watched_by(look.host, look.glimpse.number, found.watch.number, found.nth, candidate) {
        Ok(is) => Ok(is),
        // The set has changed meanwhile.
        Err(dunlin_sys::Errno(2 | 9)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Nobody of the move has what is watched.
pub(crate) fn unknown(look: &Look<'_>, found: &Found) -> Refusal {
    let why = format!(
        "it watches a file, added as descriptor {}, that no process of the move has open",
        found.watch.number
    );
    let hint =
        "move the tree (--tree) if another process of it has the file; otherwise EPOLL_CTL_DEL it before closing it";
    let what = look.glimpse.link.display();
    Box::new(crate::obstacle::descriptor(
        look.pid,
        look.glimpse.number,
        what,
        &why,
        hint,
    ))
}

pub(crate) fn make() -> io::Result<OwnedFd> {
    Ok(epoll::create(epoll::CreateFlags::CLOEXEC)?)
}

/// What an epoll set has been given here, with the [making](crate::restore::Common::made) of each target.
#[derive(Debug, Default)]
pub(crate) struct Given {
    made: u64,
    watches: BTreeMap<Watch, u64>,
}

/// Gives all epoll sets of the moved processes what they watch; again after anything of it has changed. Watches that have
/// fired are made to only when this is the `last` time, when what they watch has in it what it had.
pub(crate) fn connect(blanks: &[Blank], last: bool, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let mut done = Vec::new();
    let all = blanks.iter().flat_map(|blank| &blank.files().descriptions);
    let all: BTreeMap<u64, &Description> = all.map(|description| (description.key, description)).collect();
    for blank in blanks {
        let files = blank.files();
        for descriptor in &files.table {
            let description = &files.descriptions[descriptor.description as usize];
            let DescriptionKind::Epoll { watches } = &description.kind else {
                continue;
            };
            if !done.contains(&description.key) {
                done.push(description.key);
                Set {
                    blank,
                    number: descriptor.number,
                    key: description.key,
                    all: &all,
                }
                .connect(watches, last, kit)?;
            }
        }
    }
    Ok(())
}

/// An epoll set, by a process that has it.
struct Set<'a> {
    blank: &'a Blank,
    number: i32,
    key: u64,
    /// All descriptions of the move, by key.
    all: &'a BTreeMap<u64, &'a Description>,
}

impl Set<'_> {
    fn connect(&self, watches: &[Watch], last: bool, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        let pid = self.blank.pid;
        if watches.len() > MAX_WATCHES {
            return Err(RestoreError::Unsound {
                pid,
                why: "an epoll set beyond every bound",
            });
        }
        let made = |key: &u64| {
            kit.common.made.get(key).copied().ok_or(RestoreError::Unsound {
                pid,
                why: "an epoll set that watches what is not there",
            })
        };
        let set = made(&self.key)?;
        kit.options = self.blank.options;
        let mut wanted = BTreeMap::new();
        for watch in watches.iter().filter(|watch| last || !has_fired(watch)) {
            wanted.insert(*watch, made(&watch.target)?);
        }
        let mut given = kit.common.given.remove(&self.key).unwrap_or_default();
        if given.made != set {
            given = Given::default();
        }
        // With the last descriptor of a file that was made anew since, its watches have gone.
        given
            .watches
            .retain(|watch, made| kit.common.made.get(&watch.target) == Some(made));
        let fired: Vec<Watch> = wanted
            .keys()
            .filter(|w| has_fired(w) && !given.watches.contains_key(w))
            .copied()
            .collect();
        // Making one fire takes whatever else is ready out of the set.
        let stale = given
            .watches
            .iter()
            .filter(|(w, made)| !fired.is_empty() || wanted.get(w) != Some(made));
        let stale: Vec<Watch> = stale.map(|(watch, _)| *watch).collect();
        self.control(DELETE, &stale, kit)?;
        given.watches.retain(|watch, _| !stale.contains(watch));
        if !fired.is_empty() {
            let armed: Vec<Watch> = fired
                .iter()
                .map(|w| Watch {
                    events: w.events | ANYTHING,
                    ..*w
                })
                .collect();
            self.control(ADD, &armed, kit)?;
            let readied = self.make_ready(&fired, kit)?;
            self.let_fire(&fired, kit)?;
            self.make_unready(readied, kit)?;
        }
        let missing = wanted
            .keys()
            .filter(|w| !given.watches.contains_key(w) && !fired.contains(w));
        let missing: Vec<Watch> = missing.copied().collect();
        self.control(ADD, &missing, kit)?;
        kit.common.given.insert(
            self.key,
            Given {
                made: set,
                watches: wanted,
            },
        );
        Ok(())
    }

    /// Adds or takes out watches.
    fn control(&self, operation: u64, watches: &[Watch], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        let files = self.blank.files();
        let here = |watch: &Watch| {
            let found = files.table.binary_search_by_key(&watch.number, |d| d.number);
            found.is_ok_and(|at| files.descriptions[files.table[at].description as usize].key == watch.target)
        };
        let (direct, others): (Vec<Watch>, Vec<Watch>) = watches.iter().partition(|watch| here(watch));
        for some in direct.chunks(4096) {
            let mut script = Script::new(&self.blank.foothold.arena);
            some.iter()
                .for_each(|watch| self.add_control(&mut script, operation, watch));
            self.blank.run(self.blank.host, script, "filling an epoll set")?;
        }
        for watch in others {
            self.lend(watch, kit)?;
            let mut script = Script::new(&self.blank.foothold.arena);
            self.add_control(&mut script, operation, &watch);
            let ran = self.blank.run(self.blank.host, script, "filling an epoll set");
            self.give_back(files, watch, kit)?;
            ran?;
        }
        Ok(())
    }

    fn add_control(&self, script: &mut Script<'_>, operation: u64, watch: &Watch) {
        let event = script.bytes(&[&watch.events.to_le_bytes()[..], &watch.data.to_le_bytes()].concat());
        let arguments = [self.number as u64, operation, watch.number as u64, event.address];
        script.call("epoll_ctl", SYS_EPOLL_CTL, &arguments);
    }

    /// Puts what is watched under the number at which it once was.
    fn lend(&self, watch: Watch, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        self.install(watch.target, watch.number, true, kit)
    }

    fn give_back(&self, files: &Files, watch: Watch, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        match files.table.binary_search_by_key(&watch.number, |d| d.number) {
            Ok(at) => {
                let descriptor = &files.table[at];
                let key = files.descriptions[descriptor.description as usize].key;
                self.install(key, watch.number, descriptor.close_on_exec, kit)
            }
            Err(_) => {
                let mut script = Script::new(&self.blank.foothold.arena);
                script.call("close", SYS_CLOSE, &[watch.number as u64]);
                self.blank.run(self.blank.host, script, "closing a descriptor")
            }
        }
    }

    fn install(&self, key: u64, number: i32, close_on_exec: bool, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
        let pid = self.blank.pid;
        let fd = kit.common.descriptions.get(&key).map(OwnedFd::try_clone);
        let fd = fd.ok_or(RestoreError::Unsound {
            pid,
            why: "an epoll set that watches what is not there",
        })?;
        let wanted = Wanted {
            fd: fd.during(pid, "dup")?,
            number,
            close_on_exec,
        };
        let at = self.blank.foothold.syscall_at;
        crate::restore::install(pid, pid, self.blank.leader(), at, vec![wanted], kit).map(|_| ())
    }

    /// Sees to it that what is watched is ready for something. What has been done to it for that is to be undone.
    fn make_ready(&self, fired: &[Watch], kit: &Kit<'_>) -> Result<Vec<u64>, RestoreError> {
        let pid = self.blank.pid;
        let mut readied = Vec::new();
        for watch in fired {
            let (Some(description), Some(fd)) =
                (self.all.get(&watch.target), kit.common.descriptions.get(&watch.target))
            else {
                continue;
            };
            match &description.kind {
                DescriptionKind::Pipe { pipe, write: false, .. }
                    if !is_ready(fd).during(pid, "looking at a pipe")? =>
                {
                    if let Some((_, writing)) = kit.common.pipes.get(pipe) {
                        rustix::io::write(writing, &[0]).during(pid, "letting a watch fire")?;
                        readied.push(watch.target);
                    }
                }
                DescriptionKind::Timer(timer) if timer.ticks == 0 => {
                    dunlin_sys::fdcalls::set_ticks(fd.as_fd(), 1).during(pid, "letting a watch fire")?;
                    readied.push(watch.target);
                }
                _ => {}
            }
        }
        Ok(readied)
    }

    fn make_unready(&self, readied: Vec<u64>, kit: &Kit<'_>) -> Result<(), RestoreError> {
        let pid = self.blank.pid;
        for key in readied {
            let (Some(description), Some(fd)) = (self.all.get(&key), kit.common.descriptions.get(&key)) else {
                continue;
            };
            match &description.kind {
                DescriptionKind::Pipe { pipe, .. } => {
                    if let Some((reading, _)) = kit.common.pipes.get(pipe) {
                        rustix::io::read(reading, &mut [0; 1]).during(pid, "letting a watch fire")?;
                    }
                }
                DescriptionKind::Timer(timer) => {
                    super::timer::set(fd, timer, self.blank.host).during(pid, "letting a watch fire")?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes out the events of watches that are to have fired; all of them must be ready for something.
    fn let_fire(&self, fired: &[Watch], kit: &Kit<'_>) -> Result<(), RestoreError> {
        let pid = self.blank.pid;
        let set = kit.common.descriptions.get(&self.key).ok_or(RestoreError::Unsound {
            pid,
            why: "an epoll set that is not there",
        })?;
        let mut events = Vec::with_capacity(fired.len().min(4096));
        let no_time = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            events.clear();
            epoll::wait(set, rustix::buffer::spare_capacity(&mut events), Some(&no_time))
                .during(pid, "letting a watch fire")?;
            if events.is_empty() {
                break;
            }
        }
        let own = dunlin_sys::procfs::ProcDir::own();
        let text = own
            .text(&format!("fdinfo/{}", set.as_raw_fd()))
            .during(pid, "reading an epoll set")?;
        let armed = special::watches(&text).during(pid, "reading an epoll set")?;
        match armed.iter().find(|watch| watch.events & !MANNER != 0) {
            None => Ok(()),
            Some(watch) => Err(RestoreError::Obstacles(vec![crate::obstacle::obstacle(
                pid,
                "descriptor",
                format_args!("fd {} (an epoll set)", self.number),
                format!(
                    "it has told an event of descriptor {} that was to be told once (EPOLLONESHOT), and the descriptor is \
                     ready for nothing, so that this cannot be made so again",
                    watch.number
                ),
                "try again: such a state lasts as long as the program handles the event",
            )])),
        }
    }
}

fn has_fired(watch: &Watch) -> bool {
    watch.events & ONESHOT != 0 && watch.events & !MANNER == 0
}

fn is_ready(fd: &OwnedFd) -> io::Result<bool> {
    let interest = PollFlags::IN | PollFlags::OUT | PollFlags::PRI;
    let mut polled = [PollFd::new(fd, interest)];
    let no_time = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::event::poll(&mut polled, Some(&no_time))? > 0)
}
