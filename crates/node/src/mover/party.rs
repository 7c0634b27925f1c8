//! Who takes part in a move: the processes that it covers, looked at where they run.
//!
//! Owns the look around before a move, and what is in its way. Refuses to move anything.

use super::outgoing::{MoveOutcome, failure};
use super::{Mover, NEST_FILTERS, lock, payload};
use crate::capture::{CaptureError, Met, Source, Surroundings};
use crate::obstacle::obstacle;
use crate::sockets::leaving::Owner;
use dunlin_proto::control::{Failure, FailureKind, Obstacle};
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::image::{Lineage, Plan as ProcessPlan, Socket};
use dunlin_proto::peer::{PeerReply, PeerRequest};
use dunlin_sys::procfs::ProcDir;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

impl Mover {
    /// What would keep a process that is here from moving, to a node or to any.
    pub fn examine_here(&self, pid: Pid, to: Option<Slot>) -> std::io::Result<Result<Vec<Obstacle>, Failure>> {
        let mover = self.arc();
        // On a thread of its own: ptrace is bound to threads.
        let thread = std::thread::Builder::new()
            .name(format!("examine-{pid}"))
            .spawn(move || {
                let mut met = Met::default();
                let mut party = mover.party(pid, false)?;
                let prepared = mover.prepare_sources(&mut party, 0, &mut met, false);
                match prepared {
                    Ok(sources) => {
                        let plans = sources.iter().map(|source| &source.plan);
                        let obstacles = to.map_or(Ok(Vec::new()), |to| mover.examine_there(plans, to));
                        sources.into_iter().for_each(Source::abandon);
                        obstacles
                    }
                    Err(MoveOutcome::Refused(obstacles)) => Ok(obstacles),
                    Err(MoveOutcome::Failed(failure)) => Err(failure),
                    Err(MoveOutcome::Moved(_)) => Ok(Vec::new()),
                }
            })?;
        thread
            .join()
            .map_err(|_| std::io::Error::other("the examination did not end well"))
    }

    /// The processes that a move covers, with their numbers on this machine, parents first.
    pub(super) fn party(&self, pid: Pid, tree: bool) -> Result<Vec<(Pid, i32)>, Failure> {
        let nobody = || {
            failure(
                FailureKind::NoProcess,
                format!("process {pid} is not on this node"),
                None,
            )
        };
        if self.hidden.kind(pid).is_some() {
            return Err(nobody());
        }
        let host = self.nest.host_pid(pid).ok().flatten().ok_or_else(nobody)?;
        let mut party = vec![(pid, host)];
        let mut next = 0;
        while tree && next < party.len() {
            let children = children_of(party[next].1);
            // One that has ended and is not yet waited for stays behind: its parent finds its status wherever that is.
            let news = children
                .into_iter()
                .filter(|(child, host)| self.hidden.kind(*child).is_none() && !has_ended(*host));
            party.extend(news.collect::<Vec<_>>());
            next += 1;
        }
        Ok(party)
    }

    /// Prepares a party from its member `from` on. Children that have ended meanwhile are members no more.
    pub(super) fn prepare_sources(
        &self,
        party: &mut Vec<(Pid, i32)>,
        from: usize,
        met: &mut Met,
        watch: bool,
    ) -> Result<Vec<Source>, MoveOutcome> {
        let identify = |fd: std::os::fd::BorrowedFd<'_>| self.streams.identify(fd);
        let around = self.surroundings(&identify, party);
        let mut sources: Vec<Source> = Vec::new();
        let mut obstacles = Vec::new();
        let root = party.first().copied();
        let mut ended = Vec::new();
        for member in &party[from..] {
            let (pid, host) = member;
            let prepared = self
                .lineage(*pid, *host)
                .and_then(|lineage| Source::prepare(*host, lineage, NEST_FILTERS, &around, met, watch));
            let is_gone = matches!(prepared, Err(CaptureError::Gone)) && has_ended(*host);
            match prepared {
                Ok(source) => sources.push(source),
                Err(_) if is_gone && root != Some(*member) => ended.push(*member),
                Err(CaptureError::Obstacles(more)) => obstacles.extend(more),
                Err(error) => {
                    sources.into_iter().for_each(Source::abandon);
                    if is_gone {
                        let message = format!("process {pid} has ended");
                        return Err(MoveOutcome::Failed(failure(FailureKind::NoProcess, message, None)));
                    }
                    return Err(MoveOutcome::Failed(failure(
                        FailureKind::MoveFailed,
                        format!("process {pid} cannot be captured: {error}; it runs on here"),
                        None,
                    )));
                }
            }
        }
        party.retain(|member| !ended.contains(member));
        for source in &sources {
            let watched = source.is_watched() && self.arrivals.get(source.pid).is_none_or(|a| a.space.is_none());
            if watched {
                obstacles.push(obstacle(
                    source.pid,
                    "memory",
                    format_args!("process {}", source.pid),
                    "it was forked by a process whose pages were still elsewhere, and so are some of its own",
                    "try again when its parent's pages have come (see `pages_elsewhere` in `dunlin ps`)",
                ));
            }
        }
        let each = sources.iter().map(|source| (source.pid, sockets_of(source)));
        let each = each.flat_map(|(pid, sockets)| sockets.map(move |(_, number, _, socket)| (pid, number, socket)));
        obstacles.extend(crate::sockets::look::parted(each));
        if obstacles.is_empty() {
            return Ok(sources);
        }
        sources.into_iter().for_each(Source::abandon);
        Err(MoveOutcome::Refused(obstacles))
    }

    pub(super) fn surroundings<'a>(
        &self,
        identify: &'a dyn Fn(std::os::fd::BorrowedFd<'_>) -> Option<(dunlin_proto::ids::RunId, u8)>,
        party: &[(Pid, i32)],
    ) -> Surroundings<'a> {
        let moving: Vec<i32> = party.iter().map(|(_, host)| *host).collect();
        let (mut staying, mut others) = (Vec::new(), Vec::new());
        for (host, pid) in self.neighbours() {
            if !moving.contains(&host) && pid.0 > 1 && self.hidden.kind(pid).is_none() {
                staying.push((host, pid));
            } else {
                others.push(host);
            }
        }
        Surroundings::new(identify, moving, staying, others, self.edge.inside())
    }

    /// All processes of the nest: host numbers and PIDs.
    pub(super) fn neighbours(&self) -> Vec<(i32, Pid)> {
        let mut found = Vec::new();
        let mut queue = vec![self.nest.init_pid()];
        while let Some(host) = queue.pop() {
            for (pid, child) in children_of(host) {
                found.push((child, pid));
                queue.push(child);
            }
        }
        found
    }

    pub(super) fn lineage(&self, pid: Pid, host: i32) -> Result<Lineage, CaptureError> {
        let dir = ProcDir::process(host);
        let status = dir.status()?;
        let last = |numbers: &[i32]| numbers.last().copied().map_or(Pid(0), Pid);
        let parent = ProcDir::process(status.ppid)
            .status()
            .map(|s| last(&s.ns_pids))
            .unwrap_or(Pid(1));
        let resident = self.residents.get(pid);
        let command = match &resident {
            Some(resident) => resident.command.clone(),
            None => {
                let text = dir.bytes("cmdline")?;
                let words: Vec<_> = text.split(|b| *b == 0).filter(|w| !w.is_empty()).collect();
                String::from_utf8_lossy(&words.join(&b' ')).into_owned()
            }
        };
        Ok(Lineage {
            pid,
            ppid: parent,
            pgid: last(&status.ns_pgids),
            sid: last(&status.ns_sids),
            children: Vec::new(),
            moves: resident.map_or(0, |r| r.moves),
            command,
        })
    }

    /// Asks the destination whether everything that the plans name is there.
    pub(super) fn examine_there<'a>(
        &self,
        plans: impl Iterator<Item = &'a ProcessPlan>,
        to: Slot,
    ) -> Result<Vec<Obstacle>, Failure> {
        let named = plans.map(|plan| ProcessPlan {
            file_pages: Vec::new(),
            ..plan.clone()
        });
        let plans: Vec<ProcessPlan> = named.collect();
        match self.peers.call(
            to,
            &PeerRequest::Examine {
                plans: payload::encode(&plans),
            },
        ) {
            Ok(PeerReply::Obstacles(obstacles)) => Ok(obstacles),
            Ok(PeerReply::Failed(failure)) => Err(failure),
            Ok(_) => Err(failure(
                FailureKind::Other,
                "the destination gave an answer to another question".into(),
                None,
            )),
            Err(error) => Err(failure(FailureKind::Unreachable, error.to_string(), None)),
        }
    }

    /// A party that is being moved has grown.
    pub(super) fn reserve_more(&self, more: &[(Pid, i32)], id: MoveId) {
        lock(&self.busy).extend(more.iter().map(|(pid, _)| (*pid, id)));
    }

    pub(super) fn reserve_party(&self, party: &[(Pid, i32)], id: MoveId) -> Result<(), MoveOutcome> {
        let mut busy = lock(&self.busy);
        // A process that has just come may go on when its home knows that it is here: a matter of milliseconds.
        let deadline = Instant::now() + Duration::from_secs(5);
        let arriving = |busy: &BTreeMap<Pid, MoveId>| {
            party
                .iter()
                .any(|(pid, _)| busy.get(pid).is_some_and(|by| by.source != self.here))
        };
        while arriving(&busy) && Instant::now() < deadline {
            drop(busy);
            std::thread::sleep(Duration::from_millis(1));
            busy = lock(&self.busy);
        }
        for (pid, _) in party {
            if let Some(other) = busy.get(pid) {
                let message = format!("process {pid} is already being moved ({other})");
                let hint = Some("wait for that move to end");
                return Err(MoveOutcome::Failed(failure(FailureKind::Invalid, message, hint)));
            }
        }
        busy.extend(party.iter().map(|(pid, _)| (*pid, id)));
        Ok(())
    }
}

pub(super) fn children_of(host: i32) -> Vec<(Pid, i32)> {
    let dir = ProcDir::process(host);
    let mut children = Vec::new();
    for tid in dir.threads().unwrap_or_default() {
        let text = dir.text(&format!("task/{tid}/children")).unwrap_or_default();
        for child in text.split_ascii_whitespace().filter_map(|n| n.parse::<i32>().ok()) {
            if let Ok(status) = ProcDir::process(child).status()
                && let Some(pid) = status.ns_pids.last()
            {
                children.push((Pid(*pid), child));
            }
        }
    }
    children
}

pub(super) fn has_ended(host: i32) -> bool {
    ProcDir::process(host).status().is_ok_and(|status| status.state == 'Z') || !ProcDir::process(host).path("").exists()
}

/// The sockets of a process that is looked at.
pub(super) fn sockets_of(source: &Source) -> impl Iterator<Item = (u64, i32, u32, &Socket)> {
    owner(source).sockets()
}

pub(super) fn owner(source: &Source) -> Owner<'_> {
    Owner {
        pid: source.pid,
        host: source.host,
        files: &source.plan.image.files,
    }
}
