//! A move at its destination: one thread from the proposal until the home knows that the process runs.
//!
//! Owns the blanks while they are prepared and loaded. Refuses to decide: every step is asked for by the protocol's
//! machine. A blank that was made for the move dies with this daemon; one that had been a surrogate becomes one again.

use super::arrivals::Arrival;
use super::payload::{self, Frozen, FrozenProcess, Prepare, Prepared, Proposal};
use super::recover::{ArrivalRecord, KeptDestination, KeptPlace};
use super::second_hand::SecondHand;
use super::{Mover, NEST_FILTERS, Word, lock};
use crate::entries::Place;
use crate::obstacle::obstacle;
use crate::pager::{Finish, Journal, NewSpace, SpaceHandle, Withdrawn};
use crate::processes::{HiddenKind, Resident};
use crate::restore::{Blank, Common, Kit, Remade, RestoreError};
use crate::verify;
use dunlin_cluster::page_map::PageMap;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::destination::{DestinationAction, DestinationEvent, DestinationMove};
use dunlin_cluster::relocation::home::HomeEvent;
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{ImageId, MoveId, Pid, RunId, Slot};
use dunlin_proto::image::{DescriptionKind, Plan};
use dunlin_proto::pages::ClientId;
use dunlin_proto::peer::{PeerReply, PeerRequest};
use dunlin_proto::relocation::Member;
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Options;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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

    /// How pagers reach the holders of images.
    pub(super) fn connect(&self) -> Arc<crate::pager::Connect> {
        let peers = self.peers.clone();
        Arc::new(move |image: ImageId| {
            let open = || {
                let purpose = dunlin_proto::peer::Purpose::Pages(image);
                peers.open(image.holder, purpose).map_err(io::Error::other)
            };
            Ok(crate::pager::Connections {
                faults: open()?,
                bulk: open()?,
            })
        })
    }

    /// How far the monotonic clocks of a node are ahead of ours, at most, nanoseconds. Each question gives a bound that is too
    /// high by the time until it was answered, which would add up over many moves: the fastest of several counts.
    fn clocks_ahead(&self, of: Slot) -> io::Result<[i64; 2]> {
        const QUESTIONS: usize = 8;
        let mut least = [i64::MAX; 2];
        for _ in 0..QUESTIONS {
            let before = raw_clocks();
            match self.peers.call(of, &PeerRequest::Clocks) {
                Ok(PeerReply::Clocks(theirs)) => least = [0, 1].map(|i| least[i].min(theirs[i] - before[i])),
                Ok(_) => return Err(io::Error::other("the source gave an answer to another question")),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(least)
    }
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME of this daemon, nanoseconds.
pub fn raw_clocks() -> [i64; 2] {
    use rustix::time::{ClockId, clock_gettime};
    [ClockId::Monotonic, ClockId::Boottime].map(|clock| {
        let now = clock_gettime(clock);
        now.tv_sec * 1_000_000_000 + now.tv_nsec
    })
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

/// An arriving process, or tree.
struct Incoming {
    mover: Arc<Mover>,
    id: MoveId,
    common: Common,
    prepared: Vec<Prepared>,
    /// Where each process comes, in their order; the first of them have become `blanks`.
    places: Vec<Placed>,
    relatives: Vec<Vec<Pid>>,
    blanks: Vec<Blank>,
    frozen: Vec<FrozenProcess>,
    spaces: Vec<SpaceHandle>,
    members: Vec<Member>,
    verified: BTreeMap<Pid, u64>,
    event: Option<DestinationEvent>,
    /// What a former daemon has rebuilt.
    waiting: Vec<(KeptPlace, Option<Withdrawn>)>,
}

/// A place that was made, or found, for an arriving process.
struct Placed {
    pid: Pid,
    place: Place,
    comm: Vec<u8>,
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
            event: None,
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

    /// The next event. Spins when everything is prepared or loaded: the source is, or will soon be, frozen.
    fn wait(&self, words: &Receiver<Word>, until: Option<Duration>) -> DestinationEvent {
        let spin_until = Instant::now() + Duration::from_millis(20);
        while !self.blanks.is_empty() && Instant::now() < spin_until {
            if let Ok(Word::Destination(event)) = words.try_recv() {
                return event;
            }
            std::hint::spin_loop();
        }
        let longest = Duration::from_secs(1);
        let left = until.map_or(longest, |at| at.saturating_sub(self.mover.now()).min(longest));
        loop {
            match words.recv_timeout(left) {
                Ok(Word::Destination(event)) => return event,
                Ok(Word::Source(_)) => {}
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
                let stored = kept
                    .map_err(io::Error::other)
                    .and_then(|blob| self.mover.nest.store_soon(&label, blob));
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
            DestinationAction::Learn(changes) => self.mover.decide(HomeEvent::Learn(changes)),
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

    /// Runs `work` with what a restore needs of this node.
    fn with_kit<T>(
        &mut self,
        work: impl FnOnce(&mut Incoming, &mut Kit<'_>) -> Result<T, RestoreError>,
    ) -> Result<T, String> {
        let mover = self.mover.clone();
        let root = mover.nest.root().try_clone_to_owned().map_err(|e| e.to_string())?;
        let steer = |pid: Pid| -> io::Result<Box<dyn FnOnce() -> io::Result<()> + '_>> {
            let guard = mover.nest.steer(pid)?;
            Ok(Box::new(move || {
                if guard.finish()? {
                    Ok(())
                } else {
                    Err(io::Error::other(format!("the number {pid} was not taken")))
                }
            }))
        };
        let open_stream = |run: RunId, stream: u8| -> io::Result<OwnedFd> { mover.streams.open(run, stream) };
        let mut kit = Kit {
            installer: &mover.installer,
            root,
            shared: &mover.config.shared,
            cookie: mover.nest.cookie(),
            nest_filters: NEST_FILTERS,
            steer: &steer,
            open_stream: &open_stream,
            options: Options {
                follow: true,
                suspend_seccomp: true,
                ..Options::default()
            },
            common: std::mem::take(&mut self.common),
        };
        let done = work(self, &mut kit);
        self.common = kit.common;
        done.map_err(|error| error.to_string())
    }

    fn prepare(&mut self, payload: &[u8]) -> Result<(), String> {
        let Prepare { processes } = payload::decode(payload)?;
        let ahead = self.mover.clocks_ahead(self.id.source).map_err(|e| e.to_string())?;
        // First all places, parents before children, while each is still a bare surrogate; then what is in them.
        let moving: Vec<Pid> = processes.iter().map(|p| p.plan.image.lineage.pid).collect();
        for process in &processes {
            let mut lineage = process.plan.image.lineage.clone();
            lineage.children.retain(|child| !moving.contains(&child.pid));
            let place = self
                .mover
                .entries
                .place(&lineage)
                .map_err(|e| format!("making its entry: {e}"))?;
            self.places.push(Placed {
                pid: lineage.pid,
                place,
                comm: ProcDir::process(place.host)
                    .bytes("comm")
                    .unwrap_or_default()
                    .trim_ascii_end()
                    .to_vec(),
            });
            let mut relatives: Vec<Pid> = [lineage.ppid, lineage.pgid, lineage.sid].into();
            relatives.retain(|pid| self.mover.hidden.kind(*pid) == Some(HiddenKind::Relative));
            relatives.dedup();
            self.relatives.push(relatives);
        }
        for (index, process) in processes.into_iter().enumerate() {
            let place = self.places[index].place;
            let offsets = [0, 1].map(|i| process.clock_offsets_ns[i] + ahead[i]);
            let blank =
                self.with_kit(|_, kit| Blank::prepare(place.host, !place.stood_before, &process.plan, offsets, kit))?;
            self.blanks.push(blank);
            self.prepared.push(process);
            if self.prepared.last().is_some_and(|p| p.ahead) {
                self.fill_ahead(self.blanks.len() - 1)?;
            }
        }
        Ok(())
    }

    fn rebuild(&mut self, payload: &[u8]) -> Result<(), String> {
        let started = Instant::now();
        let Frozen { processes } = payload::decode(payload)?;
        if processes.len() != self.blanks.len() {
            return Err("the essence is not of the processes that were prepared".into());
        }
        for (index, process) in processes.into_iter().enumerate() {
            let came = self.stop_filling(index, &process)?;
            let mut stale = process.ahead.as_ref().map_or(Vec::new(), |ahead| ahead.stale.clone());
            // What was called back and has not come again is there in an older form.
            stale.extend(came.iter().flat_map(|came| came.map.runs_away()));
            let remade = self.with_kit(|this, kit| this.blanks[index].load(&process.essence, &stale, kit))?;
            self.make_children(index, &process)?;
            self.adopt(index, &process, came.map(|came| (came, remade)))?;
            self.await_all(index, &process)?;
            self.blanks[index]
                .complete(&process.essence)
                .map_err(|e| e.to_string())?;
            self.verify(index, &process)?;
            self.frozen.push(process);
        }
        for (blank, process) in self.blanks.iter().zip(&self.frozen) {
            blank.outlive(&process.essence).map_err(|e| e.to_string())?;
        }
        tracing::debug!(load_us = started.elapsed().as_micros(), "loaded");
        Ok(())
    }

    /// Surrogates of the children that stay behind, so that the process can wait for them.
    fn make_children(&mut self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        let children = &process.essence.lineage.children;
        if children.is_empty() {
            return Ok(());
        }
        let blank = &self.blanks[index];
        self.mover
            .entries
            .children(blank.host, blank.scratch(), children)
            .map_err(|e| format!("making surrogates of its children: {e}"))?;
        blank
            .unhear_children(&process.essence)
            .map_err(|e| format!("waiting for its children: {e}"))?;
        let made = children.iter().map(|c| c.pid);
        self.relatives[index].extend(made.filter(|pid| self.mover.hidden.kind(*pid) == Some(HiddenKind::Relative)));
        Ok(())
    }

    /// The pages of a process begin to come while it still runs at its source.
    fn fill_ahead(&mut self, index: usize) -> Result<(), String> {
        let image = self.prepared[index].image;
        let blank = &self.blanks[index];
        let (uffd, regions) = blank.pages().map_err(|e| e.to_string())?;
        let mut map = PageMap::new();
        back_all(&mut map, &regions, image).map_err(|e| e.to_string())?;
        let space = NewSpace {
            id: None,
            pid: Some(blank.host),
            uffd,
            map,
            connect: self.mover.connect(),
            observer: Arc::new(()),
            claims: None,
            journal: None,
            ahead: Some(blank.memory().map_err(|e| e.to_string())?),
        };
        let space = self.mover.pager.adopt(space).map_err(|(error, _)| error.to_string())?;
        self.mover.ahead.insert(self.id, blank.pid, space, image);
        Ok(())
    }

    /// What has come of a process's pages so far; nothing more comes until they are adopted again.
    fn stop_filling(&self, index: usize, process: &FrozenProcess) -> Result<Option<Withdrawn>, String> {
        let pid = self.blanks[index].pid;
        match (self.mover.ahead.remove(self.id, pid), &process.ahead) {
            (Some(space), Some(_)) => match space.withdraw() {
                Ok(withdrawn) => Ok(Some(withdrawn)),
                Err(how) => Err(format!("the memory that came ahead is lost ({how:?})")),
            },
            (None, None) => Ok(None),
            (Some(_), None) | (None, Some(_)) => Err("source and destination disagree on what was sent ahead".into()),
        }
    }

    /// Waits for every page, if it is not to run before.
    fn await_all(&self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        const PATIENCE: Duration = Duration::from_secs(240);
        if process.ahead.as_ref().is_none_or(|ahead| !ahead.all_first) {
            return Ok(());
        }
        match self.spaces[index].wait_finished(PATIENCE) {
            Some(Finish::Drained) => Ok(()),
            Some(Finish::Gone | Finish::Withdrawn) => Err("its blank was lost while the last pages came".into()),
            None => Err("its last pages did not come in time".into()),
        }
    }

    fn adopt(
        &mut self,
        index: usize,
        process: &FrozenProcess,
        came: Option<(Withdrawn, Remade)>,
    ) -> Result<(), String> {
        let image = self.prepared[index].image;
        let blank = &self.blanks[index];
        let (uffd, regions) = blank.pages().map_err(|e| e.to_string())?;
        let (map, claims) = match came {
            None => (page_map(process, &regions, image).map_err(|e| e.to_string())?, None),
            Some((came, remade)) => {
                let map = page_map_after(process, came.map, &remade, image).map_err(|e| e.to_string())?;
                (map, Some(came.claims))
            }
        };
        let second = SecondHand::new(self.mover.nest.clone());
        let id = self.mover.pager.next_id();
        let journal = Journal::begin(ClientId(super::random()), &map).map_err(|e| format!("no journal for it: {e}"))?;
        second
            .keep(id, (blank.pid, blank.host), uffd.as_fd(), &journal)
            .map_err(|e| format!("init could not take its userfaultfd: {e}"))?;
        let space = NewSpace {
            id: Some(id),
            pid: Some(blank.host),
            uffd,
            map,
            connect: self.mover.connect(),
            observer: Arc::new(second),
            claims,
            journal: Some(journal),
            ahead: None,
        };
        match self.mover.pager.adopt(space) {
            Ok(handle) => {
                self.spaces.push(handle);
                Ok(())
            }
            Err((error, _)) => Err(format!("the pager could not take its memory: {error}")),
        }
    }

    /// Compares the copy with its original, which is parked, if that was asked for.
    fn verify(&mut self, index: usize, process: &FrozenProcess) -> Result<(), String> {
        const PATIENCE: Duration = Duration::from_secs(240);
        let Some(source) = &process.digest else { return Ok(()) };
        let blank = &self.blanks[index];
        verify::compare_space(blank.host, blank.space(), blank.hole())?;
        verify::compare_threads(blank, &process.essence)?;
        verify::compare_files(blank.host, blank.files())?;
        if self.spaces[index].wait_finished(PATIENCE).is_none() {
            return Err("the pages did not come in time to be compared".into());
        }
        let copy = blank.digest(&process.essence).map_err(|e| e.to_string())?;
        let pages = verify::compare_pages(source, &copy)?;
        tracing::debug!(pages, "verified");
        self.verified.insert(blank.pid, pages);
        Ok(())
    }

    fn resume(&mut self) {
        let started = Instant::now();
        self.resume_waiting();
        for index in 0..self.frozen.len() {
            self.mover.remember_arrival(&self.arrival_of(index));
        }
        let blanks = std::mem::take(&mut self.blanks);
        let mut hosts = Vec::new();
        for (blank, process) in blanks.into_iter().zip(&self.frozen) {
            let (pid, host) = (blank.pid, blank.host);
            match blank.resume(&process.essence) {
                Ok(_) => hosts.push(host),
                Err(error) => tracing::error!(%pid, %error, "a granted process could not be resumed"),
            }
        }
        self.common = Common::default();
        tracing::debug!(resume_us = started.elapsed().as_micros(), "resumed");
        for index in 0..self.frozen.len() {
            self.arrive(index);
        }
    }

    /// What is kept of a process that waits for the decision.
    fn place_of(&self, index: usize) -> KeptPlace {
        let Placed { pid, place, comm } = &self.places[index];
        KeptPlace {
            pid: *pid,
            host: place.host,
            comm: comm.clone(),
            stopped_by: self.frozen[index].essence.stopped_by,
            arrival: self.arrival_of(index),
        }
    }

    /// Lets those run that a former daemon has rebuilt.
    fn resume_waiting(&mut self) {
        for (place, space) in std::mem::take(&mut self.waiting) {
            let (mover, pid) = (&self.mover, place.pid);
            mover.remember_arrival(&place.arrival);
            mover.hidden.remove(pid);
            let arrived = mover.recover_arrival(place.arrival);
            if let Some(space) = space {
                mover.adopt_again(pid, space);
            }
            mover.log("unregistering a surrogate", mover.nest.unregister_surrogate(pid));
            mover.let_run_on(pid, place.host, place.stopped_by);
            match arrived {
                Ok(None) => {}
                Ok(Some(ended)) => mover.vanished(ended),
                Err(error) => tracing::error!(%pid, %error, "an arrived process cannot be watched"),
            }
        }
    }

    /// What a later daemon must know of a process that came; written down before it runs.
    fn arrival_of(&self, index: usize) -> ArrivalRecord {
        let process = &self.frozen[index];
        let lineage = &process.essence.lineage;
        let member = self.members.iter().find(|m| m.pid == lineage.pid);
        let mut images: BTreeMap<ImageId, MoveId> = process.images.iter().copied().collect();
        images.insert(self.prepared[index].image, self.id);
        ArrivalRecord {
            pid: lineage.pid,
            moves: lineage.moves + 1,
            command: lineage.command.clone(),
            incarnation: member.map(|m| m.incarnation.after_commit()).unwrap_or_default(),
            ids: member.map(|m| m.ids.clone()).unwrap_or_default(),
            images: images.into_iter().collect(),
            relatives: self.relatives[index].clone(),
            uid: process.essence.traits.uids[0],
        }
    }

    fn arrive(&self, index: usize) {
        let process = &self.frozen[index];
        let record = self.arrival_of(index);
        let (pid, incarnation) = (record.pid, record.incarnation);
        let mover = &self.mover;
        if self.places[index].place.stood_before {
            mover.log("unregistering a surrogate", mover.nest.unregister_surrogate(pid));
        }
        let space = self.spaces[index].clone();
        let streams = streams_of(process, &self.prepared[index].plan);
        let elsewhere = elsewhere(space.clone());
        mover.residents.insert(
            pid,
            Resident {
                moves: record.moves,
                command: record.command,
                incarnation,
                frozen: false,
                elsewhere,
            },
        );
        mover.arrivals.insert(
            pid,
            Arrival {
                ids: record.ids,
                images: record.images.into_iter().collect(),
                space: Some(space),
                relatives: record.relatives,
                verified_pages: self.verified.get(&pid).copied(),
            },
        );
        lock(&mover.busy).insert(pid, self.id);
        mover.orders.arrive(pid, process.obeyed.clone());
        mover.hidden.remove(pid);
        match mover.nest.pidfd(pid) {
            Ok(Some(pidfd)) => {
                let watched = mover.exits.watch(pid, pidfd, record.uid);
                mover.log("watching an arrived process", watched.map(|_| ()));
            }
            // It has ended already: its parent here has been told by the kernel, its home is told by the tick.
            Ok(None) => mover.vanished(pid),
            Err(error) => tracing::error!(%pid, %error, "an arrived process cannot be watched"),
        }
        mover.streams.arrived(pid, &streams);
        mover.tell_stops(&process.essence.lineage.children);
        tracing::info!(%pid, from = %self.id.source, ?incarnation, "a process has arrived");
    }

    fn destroy(&mut self) {
        for (place, space) in std::mem::take(&mut self.waiting) {
            self.mover.stand_for(place.pid, place.host, &place.comm);
            if let Some(space) = space {
                self.mover.hand_over(BTreeMap::from([(place.pid, space)]));
            }
        }
        // A failure leaves one place half-made; those after it are as they were found or made.
        let touched = std::mem::take(&mut self.blanks).len() + 1;
        for (index, Placed { pid, place, comm }) in std::mem::take(&mut self.places).into_iter().enumerate() {
            if let Some(space) = self.mover.ahead.remove(self.id, pid) {
                // Whatever it answers: nothing is installed from here on.
                drop(space.withdraw());
            }
            if !place.stood_before {
                // Its end is nobody's: the surrogate of its parent will tell of it.
                self.mover.hidden.insert(pid, HiddenKind::Leaving);
                if let Some(host) = rustix::process::Pid::from_raw(place.host) {
                    let _ = rustix::process::kill_process(host, rustix::process::Signal::KILL);
                }
            } else if index < touched {
                let restored = self.mover.entries.stand_again(pid, place.host, &comm);
                self.mover.log("making a surrogate stand again", restored);
            }
        }
        self.relatives.clear();
        self.spaces.clear();
        self.common = Common::default();
    }
}

/// How many pages of a space are elsewhere, by node.
pub(super) fn elsewhere(space: SpaceHandle) -> Arc<dyn Fn() -> BTreeMap<Slot, u64> + Send + Sync> {
    Arc::new(move || {
        let mut by_node = BTreeMap::new();
        if space.progress().finished.is_none() {
            for (image, pages) in space.pages_elsewhere() {
                *by_node.entry(image.holder).or_insert(0) += pages;
            }
        }
        by_node
    })
}

/// What nothing else is known of in these regions is in this image.
fn back_all(
    map: &mut PageMap,
    regions: &[(u64, u64)],
    image: ImageId,
) -> Result<(), dunlin_cluster::page_map::MapError> {
    for (start, end) in regions {
        map.cover(*start, *end)?;
        map.back_with(*start, (end - start) / 4096, image, *start)?;
    }
    Ok(())
}

/// Where the pages of an arriving process are: what is still elsewhere by its own map, everything else at its source.
fn page_map(
    process: &FrozenProcess,
    regions: &[(u64, u64)],
    image: ImageId,
) -> Result<PageMap, dunlin_cluster::page_map::MapError> {
    let mut map = match &process.map {
        Some(earlier) => PageMap::from_image(earlier)?,
        None => PageMap::new(),
    };
    back_all(&mut map, regions, image)?;
    for run in &process.essence.hot_pages {
        map.settle(run.address, run.bytes.len() as u64 / 4096);
    }
    Ok(map)
}

/// Where they are after much of it was sent ahead: as it was known at the freeze, but for what has changed since.
fn page_map_after(
    process: &FrozenProcess,
    mut map: PageMap,
    remade: &Remade,
    image: ImageId,
) -> Result<PageMap, dunlin_cluster::page_map::MapError> {
    for (start, end) in &remade.gone {
        map.unmap(*start, *end);
    }
    for (start, end) in &remade.come {
        map.cover(*start, *end)?;
        map.recall(*start, (end - start) / 4096, image);
    }
    for (start, pages) in process.ahead.iter().flat_map(|ahead| &ahead.stale) {
        map.recall(*start, *pages, image);
    }
    for run in &process.essence.hot_pages {
        map.settle(run.address, run.bytes.len() as u64 / 4096);
    }
    Ok(map)
}

fn streams_of(process: &FrozenProcess, plan: &Plan) -> Vec<(RunId, u8)> {
    let files = process.essence.files.as_ref().unwrap_or(&plan.image.files);
    let stream = |kind: &DescriptionKind| match kind {
        DescriptionKind::Stream { run, stream } => Some((*run, *stream)),
        _ => None,
    };
    files.descriptions.iter().filter_map(|d| stream(&d.kind)).collect()
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
