//! A move at its destination: one thread from the proposal until the home knows that the process runs.
//!
//! Owns the thread, its protocol machine and what a proposal is checked for. Refuses to decide: every step is asked for by
//! the machine; how each is done is said in [`rebuild`](super::rebuild) (before the decision) and
//! [`arrive`](super::arrive) (after it).

use super::payload::{self, FrozenProcess, Prepared, Proposal};
use super::records::{KeptDestination, KeptPlace};
use super::{Mover, Word, lock};
use crate::entries::Place;
use crate::obstacle::obstacle;
use crate::pager::{SpaceHandle, Withdrawn};
use crate::restore::{Blank, Common};
use crate::sockets::arriving::Arriving;
use crate::sockets::recovery::KeptSocket;
use crate::steps;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::destination::{DestinationAction, DestinationEvent, DestinationMove};
use dunlin_proto::control::{Obstacle, Step};
use dunlin_proto::ids::{MoveId, Pid, Slot};
use dunlin_proto::image::FrozenSocket;
use dunlin_proto::image::Plan;
use dunlin_proto::relocation::Member;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

impl Mover {
    /// Begins to be the destination of a move.
    pub(super) fn accept_proposal(&self, id: MoveId, home: Slot, proposal: Vec<u8>) {
        let (sender, words) = channel();
        lock(&self.destinations).insert(id, sender);
        let mover = self.arc();
        let thread = std::thread::Builder::new().name("arrival".into()).spawn(move || {
            dunlin_sys::inspect::be_prompt();
            let machine = DestinationMove::start(mover.here, Limits::default(), id, home, proposal);
            Incoming::new(mover.clone(), id).go(machine, &words);
            lock(&mover.busy).retain(|_, by| *by != id);
            lock(&mover.destinations).remove(&id);
        });
        if let Err(error) = thread {
            // The source hears nothing and gives up.
            tracing::error!(%id, %error, "no thread for an arriving process");
            lock(&self.destinations).remove(&id);
        }
    }

    /// Goes on with an arrival of a former daemon's time, whatever became of it.
    pub(super) fn go_on_arriving(
        &self,
        id: MoveId,
        machine: DestinationMove,
        waiting: Vec<(KeptPlace, Option<Withdrawn>)>,
        words: &Receiver<Word>,
    ) {
        let mut incoming = Incoming::new(self.arc(), id);
        incoming.waiting = waiting;
        incoming.go(machine, words);
    }

    /// Could these processes be restored here?
    pub fn examine_plans(&self, plans: &[u8]) -> Result<Vec<Obstacle>, String> {
        let plans: Vec<Plan> = payload::decode(plans)?;
        let root = self.nest.root().try_clone_to_owned().map_err(|e| e.to_string())?;
        let mut obstacles = Vec::new();
        for plan in &plans {
            obstacles.extend(crate::restore::examine(plan, &root, &self.config.shared));
            let pid = plan.image.lineage.pid;
            let in_use = self.nest.host_pid(pid).map_err(|e| e.to_string())?.is_some();
            if in_use && self.hidden.kind(pid).is_none() {
                obstacles.push(obstacle(
                    pid,
                    "kernel",
                    format_args!("PID {pid}"),
                    "it is in use on the destination",
                    "this should not be; please report it",
                ));
            }
        }
        Ok(obstacles)
    }
}

/// An arriving process, or tree.
pub(super) struct Incoming {
    pub(super) mover: Arc<Mover>,
    pub(super) id: MoveId,
    pub(super) common: Common,
    pub(super) prepared: Vec<Prepared>,
    /// Where each process comes, in their order; the first of them have become `blanks`.
    pub(super) places: Vec<Placed>,
    pub(super) relatives: Vec<Vec<Pid>>,
    pub(super) blanks: Vec<Blank>,
    pub(super) frozen: Vec<FrozenProcess>,
    pub(super) spaces: Vec<SpaceHandle>,
    pub(super) members: Vec<Member>,
    pub(super) verified: BTreeMap<Pid, u64>,
    pub(super) sockets: Vec<FrozenSocket>,
    pub(super) arriving: Arriving,
    pub(super) kept_sockets: Vec<Vec<KeptSocket>>,
    pub(super) event: Option<DestinationEvent>,
    /// What was done here while they were frozen.
    pub(super) steps: Vec<Step>,
    /// What a former daemon has rebuilt.
    pub(super) waiting: Vec<(KeptPlace, Option<Withdrawn>)>,
}

/// A place that was made, or found, for an arriving process.
pub(super) struct Placed {
    pub(super) pid: Pid,
    pub(super) place: Place,
    pub(super) comm: Vec<u8>,
}

impl Incoming {
    fn new(mover: Arc<Mover>, id: MoveId) -> Incoming {
        Incoming {
            mover,
            id,
            common: Common::default(),
            prepared: Vec::new(),
            places: Vec::new(),
            relatives: Vec::new(),
            blanks: Vec::new(),
            frozen: Vec::new(),
            spaces: Vec::new(),
            members: Vec::new(),
            verified: BTreeMap::new(),
            sockets: Vec::new(),
            arriving: Arriving::default(),
            kept_sockets: Vec::new(),
            event: None,
            steps: Vec::new(),
            waiting: Vec::new(),
        }
    }

    fn go(&mut self, mut machine: DestinationMove, words: &Receiver<Word>) {
        loop {
            while let Some(action) = machine.poll_action() {
                if !self.act(action) {
                    return;
                }
            }
            if machine.is_ended() {
                return;
            }
            let event = self
                .event
                .take()
                .unwrap_or_else(|| self.wait(words, machine.next_timeout()));
            machine.handle(self.mover.now(), event);
        }
    }

    /// The next event. Stays awake for a moment when everything is prepared or loaded: the source is, or will soon be, frozen.
    fn wait(&self, words: &Receiver<Word>, until: Option<Duration>) -> DestinationEvent {
        let spin_until = Instant::now() + super::outgoing::AWAKE;
        while !self.blanks.is_empty() && Instant::now() < spin_until {
            if let Ok(Word::Destination(event)) = words.try_recv() {
                return event;
            }
            // Where there are few CPUs, whoever it waits for needs this one.
            std::thread::yield_now();
        }
        let longest = Duration::from_secs(1);
        let left = until.map_or(longest, |at| at.saturating_sub(self.mover.now()).min(longest));
        loop {
            match words.recv_timeout(left) {
                Ok(Word::Destination(event)) => return event,
                Ok(Word::Source(..)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return DestinationEvent::Tick,
            }
        }
    }

    /// Carries one action out; if that is impossible, no other may follow.
    fn act(&mut self, action: DestinationAction) -> bool {
        match action {
            DestinationAction::Send { to, msg } => self.mover.send(to, msg),
            DestinationAction::Check(proposal) => self.event = Some(self.check(&proposal)),
            DestinationAction::Prepare(payload) => {
                let done = self.prepare(&payload);
                self.event = Some(match done {
                    Ok(()) => DestinationEvent::Prepared(Vec::new()),
                    Err(why) => DestinationEvent::Failed(why),
                });
            }
            DestinationAction::Rebuild(members, payload) => {
                self.members = members;
                let done = self.rebuild(&payload);
                self.event = Some(match done {
                    Ok(()) => DestinationEvent::Rebuilt,
                    Err(why) => DestinationEvent::Failed(why),
                });
            }
            DestinationAction::Persist(record) => {
                let label = self.label();
                let places = match self.frozen.is_empty() {
                    true => self.waiting.iter().map(|(place, _)| place.clone()).collect(),
                    false => (0..self.frozen.len()).map(|index| self.place_of(index)).collect(),
                };
                let kept = postcard::to_stdvec(&KeptDestination { record, places });
                steps::mark("putting together the record");
                let stored = kept
                    .map_err(io::Error::other)
                    .and_then(|blob| self.mover.nest.store_soon(&label, blob));
                steps::mark("keeping the record");
                if let Err(error) = stored {
                    // As a crash would: whoever waits for a word of this move gives it up, or waits for the next daemon.
                    tracing::error!(%label, %error, "a move stops: its record could not be kept");
                    return false;
                }
            }
            DestinationAction::Forget => {
                self.mover
                    .log("dropping a record", self.mover.nest.drop_soon(&self.label()));
            }
            DestinationAction::Resume => self.resume(),
            DestinationAction::Destroy => self.destroy(),
            DestinationAction::Learn(changes) => self.mover.learned(changes),
            DestinationAction::Post { to, notice } => self.mover.post(to, notice),
        }
        true
    }

    fn label(&self) -> String {
        format!("destination/{}", self.id)
    }

    fn check(&self, proposal: &[u8]) -> DestinationEvent {
        let proposal: Proposal = match payload::decode(proposal) {
            Ok(proposal) => proposal,
            Err(why) => return DestinationEvent::Failed(why),
        };
        let root = proposal.pids.first().copied().unwrap_or(Pid(0));
        let mut obstacles = Vec::new();
        for pid in &proposal.pids {
            // A copy whose move away is not decided, another move's blank, or one that its home does not yet know here.
            if let Some(other) = lock(&self.mover.busy).get(pid).filter(|by| **by != self.id) {
                obstacles.push(obstacle(
                    *pid,
                    "kernel",
                    format_args!("PID {pid}"),
                    format!("the destination still has a move of it under way ({other})"),
                    "try again when that move has ended",
                ));
            }
        }
        let here = cpu_features();
        let missing: Vec<&String> = proposal.cpu_features.iter().filter(|f| !here.contains(f)).collect();
        if !missing.is_empty() {
            let words: Vec<&str> = missing.iter().map(|f| f.as_str()).collect();
            obstacles.push(obstacle(
                root,
                "cpu",
                words.join(" "),
                "the destination's CPU lacks features that the program may use",
                "move it to a node with the same or a newer CPU",
            ));
        }
        let available = memory_available();
        if available.is_some_and(|bytes| bytes < proposal.resident_bytes) {
            obstacles.push(obstacle(
                root,
                "memory",
                format_args!("{} MiB", proposal.resident_bytes >> 20),
                "the destination has not so much memory left",
                "free memory there, or choose another node",
            ));
        }
        if obstacles.is_empty() {
            DestinationEvent::Accepted(Vec::new())
        } else {
            DestinationEvent::Refused(obstacles)
        }
    }
}

/// The CPU features that programs can see.
pub fn cpu_features() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    let flags = flags
        .and_then(|line| line.split_once(':'))
        .map_or("", |(_, flags)| flags);
    flags.split_ascii_whitespace().map(str::to_owned).collect()
}

fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_ascii_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}
