//! A move at its source: one thread from the request until the last page is fetched.
//!
//! Owns the processes while they are prepared, frozen and given away. Refuses to decide: every step is asked for by the
//! protocol's machine.

use super::fates::Fates;
use super::payload::{self, Proposal};
use super::progress::Times;
use super::records::{KeptSource, Left};
use super::{Mover, Word, lock, random};
use crate::capture::freeze::Frozen;
use crate::capture::{Met, Source, Watch};
use crate::pager::Withdrawn;
use crate::signals::orders::Obeyed;
use crate::sockets::leaving::Leaving;
use crate::steps;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::home::HomeEvent;
use dunlin_cluster::relocation::source::{Plan, SourceAction, SourceEvent, SourceMove, SourceRecord, SourceStage};
use dunlin_proto::control::{
    Failure, FailureKind, MoveMode, MovePhase, MoveProgress, MoveReport, MoveRequest, Obstacle, WaitFor,
};
use dunlin_proto::ids::{ImageId, MoveId, Pid};
use dunlin_proto::image::Plan as ProcessPlan;
use dunlin_proto::relocation::{Claim, DestinationToSource};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// What a move came to.
#[derive(Debug)]
pub enum MoveOutcome {
    /// It is done, as far as was waited for.
    Moved(Vec<MoveReport>),
    /// It was refused before the freeze; everything runs on.
    Refused(Vec<Obstacle>),
    /// It failed; the message says where the process runs.
    Failed(Failure),
}

/// Is told how a move goes; dropping the receiver does not stop it.
pub type Reporter = Sender<Report>;

/// One report.
#[derive(Debug)]
pub enum Report {
    /// It goes on.
    Progress(MoveProgress),
    /// It is over.
    Outcome(MoveOutcome),
}

pub(super) fn failure(kind: FailureKind, message: String, hint: Option<&str>) -> Failure {
    Failure {
        kind,
        message,
        hint: hint.map(str::to_owned),
    }
}

/// For so long a thread of a move waits awake, where the next word is expected at once.
pub(super) const AWAKE: Duration = Duration::from_micros(40);

/// A move under way.
pub(super) struct Outgoing<'a> {
    pub(super) mover: Arc<Mover>,
    pub(super) request: MoveRequest,
    pub(super) plan: Plan,
    pub(super) party: Vec<(Pid, i32)>,
    /// It is stopped before it is looked at: see [`super::still`].
    pub(super) still: bool,
    pub(super) met: Met,
    pub(super) sources: Vec<Source>,
    pub(super) frozen: Vec<Frozen>,
    pub(super) withdrawn: BTreeMap<Pid, Withdrawn>,
    pub(super) images: BTreeMap<Pid, ImageId>,
    /// The orders that each has obeyed, from when nobody could give it more.
    pub(super) obeyed: BTreeMap<Pid, Obeyed>,
    /// Children whose stops are told by their parent's arrival.
    pub(super) taken: Vec<Pid>,
    pub(super) keepers: BTreeMap<Pid, i32>,
    pub(super) watches: Vec<Watch>,
    pub(super) regions: BTreeMap<Pid, Vec<(u64, u64)>>,
    /// Of a move that a former daemon began: what it had frozen.
    pub(super) left: Vec<Left>,
    /// Whose images had been released by all before there was a keeper: none is made.
    pub(super) released: BTreeSet<Pid>,
    /// What init keeps of it.
    pub(super) kept: Option<SourceRecord>,
    pub(super) times: Times,
    pub(super) reporter: &'a Reporter,
    pub(super) told: bool,
    pub(super) failed: Option<MoveOutcome>,
    pub(super) events: Vec<SourceEvent>,
    pub(super) early: Vec<SourceEvent>,
    pub(super) tight: bool,
    /// The destination has closed the connection by which it is told.
    cut: bool,
    pub(super) sockets: Leaving,
}

/// Goes on with a move of a former daemon, of which these images are left: who asked for it is not told.
pub(super) fn go_on(
    mover: &Arc<Mover>,
    KeptSource { record, left }: KeptSource,
    fates: Fates,
    withdrawn: BTreeMap<Pid, Withdrawn>,
    words: &Receiver<Word>,
) {
    let (reporter, _) = channel();
    let plan = record.plan;
    let request = MoveRequest {
        pid: fates.kept.first().map_or(Pid(0), |(image, _)| image.pid),
        to: mover.config.name_of(plan.destination),
        tree: false,
        mode: MoveMode::Demand,
        wait: WaitFor::Resumed,
        verify: false,
    };
    let mut this = Outgoing::new(mover.clone(), request, plan, Vec::new(), &reporter);
    this.told = true;
    this.withdrawn = withdrawn;
    this.left = left;
    this.released = fates.released;
    this.kept = Some(record.clone());
    this.sockets = Leaving::take_up(&mover.edge, plan.move_id);
    for left in &this.left {
        this.images.extend(left.image.map(|image| (left.pid, image)));
        this.regions.insert(left.pid, left.regions.clone());
    }
    for (image, keeper) in fates.kept {
        this.images.insert(image.pid, image.id);
        this.keepers.insert(image.pid, keeper);
    }
    let mut machine = SourceMove::recover(mover.now(), record, this.limits());
    // The outcome is for who asked.
    let _ = this.drive(&mut machine, words);
}

impl<'a> Outgoing<'a> {
    fn new(
        mover: Arc<Mover>,
        request: MoveRequest,
        plan: Plan,
        party: Vec<(Pid, i32)>,
        reporter: &'a Reporter,
    ) -> Outgoing<'a> {
        Outgoing {
            mover,
            request,
            plan,
            party,
            still: false,
            met: Met::default(),
            sources: Vec::new(),
            frozen: Vec::new(),
            withdrawn: BTreeMap::new(),
            images: BTreeMap::new(),
            obeyed: BTreeMap::new(),
            taken: Vec::new(),
            keepers: BTreeMap::new(),
            watches: Vec::new(),
            regions: BTreeMap::new(),
            left: Vec::new(),
            released: BTreeSet::new(),
            kept: None,
            times: Times::start(),
            reporter,
            told: false,
            failed: None,
            events: Vec::new(),
            early: Vec::new(),
            tight: false,
            cut: false,
            sockets: Leaving::default(),
        }
    }

    pub(super) fn run(
        mover: Arc<Mover>,
        request: MoveRequest,
        still: bool,
        reporter: &'a Reporter,
    ) -> Result<(), MoveOutcome> {
        let times = Times::start();
        let pid = request.pid;
        dunlin_sys::inspect::be_prompt();
        let to = mover.config.slot_of(&request.to).ok_or_else(|| {
            MoveOutcome::Failed(failure(
                FailureKind::NoNode,
                format!("there is no node {}", request.to),
                None,
            ))
        })?;
        let home = mover.modulus().home(pid).ok_or_else(|| {
            MoveOutcome::Failed(failure(
                FailureKind::Invalid,
                format!("process {pid} belongs to its node"),
                None,
            ))
        })?;
        if to == mover.here {
            let message = format!("process {pid} is on {} already", request.to);
            return Err(MoveOutcome::Failed(failure(FailureKind::Invalid, message, None)));
        }
        let party = mover.party(pid, request.tree).map_err(MoveOutcome::Failed)?;
        let id = MoveId {
            source: mover.here,
            nonce: random(),
        };
        mover.reserve_party(&party, id)?;
        let plan = Plan {
            move_id: id,
            home,
            destination: to,
        };
        let mut this = Outgoing::new(mover.clone(), request, plan, party, reporter);
        this.times = times;
        this.still = still;
        let outcome = this.go();
        mover.hand_over(std::mem::take(&mut this.withdrawn));
        lock(&mover.sources).remove(&id);
        lock(&mover.busy).retain(|_, by| *by != id);
        outcome
    }

    fn go(&mut self) -> Result<(), MoveOutcome> {
        self.progress(MovePhase::Propose);
        let (sender, words) = channel();
        lock(&self.mover.sources).insert(self.plan.move_id, sender);
        self.mover.links.warm(self.plan.destination);
        let watch = self.request.mode != MoveMode::Demand;
        if watch {
            self.await_own_drain()?;
        }
        self.sources = self.mover.prepare_sources(&mut self.party, 0, &mut self.met, watch)?;
        if self.still
            && let Err(outcome) = self.hold_still()
        {
            self.thaw();
            return Err(outcome);
        }
        match self.mover.examine_there(self.plans(), self.plan.destination) {
            Ok(obstacles) if obstacles.is_empty() => {}
            refused => {
                self.let_on();
                return Err(match refused {
                    Ok(obstacles) => MoveOutcome::Refused(obstacles),
                    Err(failure) => MoveOutcome::Failed(failure),
                });
            }
        }
        let claims = {
            let home = lock(&self.mover.home);
            let claim = |pid: &Pid| Claim {
                pid: *pid,
                incarnation: home.table().incarnation(*pid),
            };
            self.party.iter().map(|(pid, _)| claim(pid)).collect::<Vec<_>>()
        };
        let proposal = payload::encode(&Proposal {
            pids: self.party.iter().map(|(pid, _)| *pid).collect(),
            resident_bytes: self.plans().map(|plan| plan.resident_bytes).sum(),
            cpu_features: super::incoming::cpu_features(),
        });
        let mut machine = SourceMove::start(self.mover.now(), self.plan, self.limits(), claims, proposal);
        self.drive(&mut machine, &words)
    }

    /// Does what the machine says until it has nothing more to say.
    fn drive(&mut self, machine: &mut SourceMove, words: &Receiver<Word>) -> Result<(), MoveOutcome> {
        let mut last_report = Instant::now();
        loop {
            while let Some(action) = machine.poll_action() {
                if let SourceAction::MakeImage = action {
                    self.let_it_run_first(words);
                }
                self.act(action)?;
            }
            if machine.is_ended() {
                return self.failed.take().map_or(Ok(()), Err);
            }
            let event = match self.events.pop() {
                Some(event) => event,
                None => {
                    let event = self.wait(words, machine.next_timeout());
                    steps::mark("waiting for a word");
                    event
                }
            };
            // A copy whose pages are few has them all before it is known here that it runs.
            if matches!(event, SourceEvent::Drained(..)) && self.times.resumed.is_none() {
                self.early.push(event);
                continue;
            }
            if matches!(event, SourceEvent::Tick) {
                // One that had not said anything yet when it died is not known to be gone by its own connection.
                let was_cut = std::mem::replace(&mut self.cut, self.mover.links.is_cut(self.plan.destination));
                if self.cut && !was_cut {
                    machine.handle(self.mover.now(), SourceEvent::PeerLost(self.plan.destination));
                }
            }
            machine.handle(self.mover.now(), event);
            if self.times.resumed.is_some() && !self.told && last_report.elapsed() > Duration::from_millis(100) {
                last_report = Instant::now();
                self.report_drain();
            }
        }
    }

    /// The next event. Stays awake for a moment while the process is frozen, in case it is about to come.
    fn wait(&mut self, words: &Receiver<Word>, until: Option<Duration>) -> SourceEvent {
        let spin_until = Instant::now() + AWAKE;
        while self.tight && Instant::now() < spin_until {
            if let Ok(Word::Source(event, at)) = words.try_recv() {
                return self.heard(event, at);
            }
            std::hint::spin_loop();
        }
        let draining = self.times.resumed.is_some() && !self.told;
        let longest = if draining {
            Duration::from_millis(100)
        } else {
            Duration::from_secs(1)
        };
        let left = until.map_or(longest, |at| at.saturating_sub(self.mover.now()).min(longest));
        loop {
            match words.recv_timeout(left) {
                Ok(Word::Source(event, at)) => return self.heard(event, at),
                Ok(Word::Destination(_)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return SourceEvent::Tick,
            }
        }
    }

    /// When it was heard that it runs there counts, not when there was time for it: it is cleared away here meanwhile.
    fn heard(&mut self, event: SourceEvent, at: Instant) -> SourceEvent {
        if matches!(event, SourceEvent::FromDestination(_, DestinationToSource::Resumed)) {
            self.times.resumed_heard.get_or_insert(at);
        }
        event
    }

    /// It runs there, or is about to: nobody waits for what is cleared away here, and where the destination shares this
    /// machine's CPUs, as in a lab, it wants them now. But locks are free for it only when its descriptors here are closed, and
    /// sockets are closed here, without a word to anybody, before packets are handed over.
    fn let_it_run_first(&mut self, words: &Receiver<Word>) {
        const PATIENCE: Duration = Duration::from_millis(5);
        let until = Instant::now() + PATIENCE;
        let must_close = |frozen: &Frozen| {
            frozen.source.has_locks() || super::party::owner(&frozen.source).sockets().next().is_some()
        };
        let is_urgent = self.frozen.iter().any(must_close);
        while self.tight && !is_urgent {
            let left = until.saturating_duration_since(Instant::now());
            let event = match words.recv_timeout(left) {
                Ok(Word::Source(event, at)) => self.heard(event, at),
                Ok(Word::Destination(_)) => continue,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            };
            let runs = matches!(event, SourceEvent::FromDestination(_, DestinationToSource::Resumed));
            self.events.insert(0, event);
            if runs {
                break;
            }
        }
        steps::mark("waiting for a word");
    }

    fn act(&mut self, action: SourceAction) -> Result<(), MoveOutcome> {
        match action {
            SourceAction::Send { to, msg } => {
                self.mover.send(to, msg);
                steps::mark("sending words");
            }
            SourceAction::Prepare(_) => {
                self.progress(MovePhase::Prepare);
                let event = match self.prepare_payload() {
                    Ok(payload) => SourceEvent::Prepared(payload),
                    Err(error) => SourceEvent::Failed(error.to_string()),
                };
                self.events.push(event);
            }
            SourceAction::ReadyToFreeze(_) => {
                let event = match self.send_ahead() {
                    Ok(()) => SourceEvent::Freeze,
                    Err(error) => SourceEvent::Failed(error.to_string()),
                };
                self.events.push(event);
            }
            SourceAction::Persist(record) => self.persist(record)?,
            // What could not be cleared away must not run on: the next daemon has to know of it.
            SourceAction::Forget if !self.left.is_empty() => {}
            SourceAction::Forget => {
                self.kept = None;
                self.mover
                    .log("dropping a record", self.mover.nest.drop_soon(&self.label()));
            }
            SourceAction::Freeze => {
                self.progress(MovePhase::Freeze);
                let event = match self.freeze() {
                    Ok((members, payload)) => SourceEvent::Frozen(members, payload),
                    Err(error) => {
                        self.thaw();
                        SourceEvent::Failed(error.to_string())
                    }
                };
                self.events.push(event);
            }
            SourceAction::Thaw => self.thaw(),
            SourceAction::MakeImage => {
                self.make_images();
                steps::mark("making the image (not waited for)");
                self.keep_what_is_left()?;
            }
            SourceAction::ForgetImage(pid) => self.forget_image(pid),
            SourceAction::Learn(changes) => self.mover.decide(HomeEvent::Learn(changes)),
            SourceAction::Raise(claims) => self.mover.decide(HomeEvent::Raise(claims)),
            SourceAction::Report(report) => self.reported(report)?,
        }
        Ok(())
    }

    /// A record that cannot be made durable ends the thread as a crash would: what is parked waits for the next daemon.
    fn persist(&mut self, record: SourceRecord) -> Result<(), MoveOutcome> {
        let is_first = matches!(record.stage, SourceStage::Freezing(_));
        // What is stopped and not parked yet runs on if this daemon dies.
        let parked = if is_first { &[][..] } else { &self.frozen[..] };
        let left = self.left.iter().cloned().chain(parked.iter().map(|f| self.left_of(f)));
        let kept = KeptSource {
            left: left.collect(),
            record,
        };
        steps::mark("putting together the record");
        let stored = self.keep(&kept, is_first);
        self.kept = Some(kept.record);
        stored
    }

    /// What was parked is cleared away: should a process come back, it is none that a later daemon has to clear away.
    fn keep_what_is_left(&self) -> Result<(), MoveOutcome> {
        let Some(record) = self.kept.clone() else { return Ok(()) };
        let left = self.left.clone();
        self.keep(&KeptSource { record, left }, false)
    }

    fn keep(&self, kept: &KeptSource, wait: bool) -> Result<(), MoveOutcome> {
        let label = self.label();
        let stored = postcard::to_stdvec(kept)
            .map_err(std::io::Error::other)
            .and_then(|blob| {
                // Before the freeze there is time to hear whether there is room.
                if wait {
                    self.mover.nest.store(&label, &[], blob)
                } else {
                    self.mover.nest.store_soon(&label, blob)
                }
            });
        steps::mark("keeping the record");
        stored.map_err(|error| {
            let message = format!(
                "process {} was not moved: the record {label} could not be kept: {error}; it waits until this daemon is restarted",
                self.request.pid
            );
            MoveOutcome::Failed(failure(FailureKind::MoveFailed, message, None))
        })
    }

    pub(super) fn left_of(&self, frozen: &Frozen) -> Left {
        let pid = frozen.source.pid;
        Left {
            pid,
            host: frozen.source.host,
            arena: frozen.source.arena().ok(),
            image: self.images.get(&pid).copied(),
            regions: self.regions.get(&pid).cloned().unwrap_or_default(),
            pending: frozen.pending().to_vec(),
            streams: frozen.source.streams(),
        }
    }

    /// The members that have been looked at, stopped or running.
    pub(super) fn looked_at(&self) -> impl Iterator<Item = &Source> {
        let stopped = self.frozen.iter().map(|frozen| &frozen.source);
        stopped.chain(&self.sources)
    }

    /// What the destination is told of them.
    fn plans(&self) -> impl Iterator<Item = &ProcessPlan> {
        self.looked_at().map(|source| &source.plan)
    }

    /// A comparison of everything takes its time.
    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        if self.request.verify || self.request.mode == MoveMode::Precopy {
            limits.parked = Duration::from_secs(300);
        }
        limits
    }

    fn label(&self) -> String {
        format!("source/{}", self.plan.move_id)
    }
}
