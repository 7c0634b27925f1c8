//! A move at its source: one thread from the request until the last page is fetched.
//!
//! Owns the processes while they are prepared, frozen and given away. Refuses to decide: every step is asked for by the
//! protocol's machine.

use super::ahead::Rounds;
use super::attempts::Attempts;
use super::payload::{self, Ahead, Frozen as FrozenPayload, FrozenProcess, Prepare, Prepared, Proposal};
use super::progress::{Times, phase};
use super::recover::{ImageRecord, KeptSource, Left};
use super::{Mover, NEST_FILTERS, Word, lock, random};
use crate::capture::freeze::Frozen;
use crate::capture::held::Abandoned;
use crate::capture::{CaptureError, Met, Source, Surroundings, demanded};
use crate::obstacle::obstacle;
use crate::page_server::NewImage;
use crate::pager::{Journal, NewSpace, Withdrawn};
use crate::signals::orders::Obeyed;
use dunlin_cluster::relocation::Limits;
use dunlin_cluster::relocation::home::HomeEvent;
use dunlin_cluster::relocation::source::{
    Plan, SourceAction, SourceEvent, SourceMove, SourceRecord, SourceReport, SourceStage, WhyNot,
};
use dunlin_proto::control::{
    Failure, FailureKind, MoveMode, MovePhase, MoveProgress, MoveReport, MoveRequest, Obstacle, WaitFor,
};
use dunlin_proto::ids::{ImageId, MoveId, Pid, Slot};
use dunlin_proto::image::{Lineage, Plan as ProcessPlan};
use dunlin_proto::pages::ClientId;
use dunlin_proto::peer::{PeerReply, PeerRequest};
use dunlin_proto::relocation::{Claim, LeaseRefusal, Member};
use dunlin_sys::procfs::ProcDir;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
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

impl Mover {
    /// Starts a move of a process that is here. The receiver gets the progress and, last, the outcome.
    pub fn move_out(&self, request: MoveRequest) -> std::io::Result<Receiver<Report>> {
        let (sender, receiver) = channel();
        let mover = self.arc();
        let name = format!("move-{}", request.pid);
        std::thread::Builder::new().name(name).spawn(move || {
            let mut attempts = Attempts::new();
            while let Err(outcome) = Outgoing::run(mover.clone(), request.clone(), &sender) {
                let Some(pause) = attempts.next(&outcome) else {
                    let _ = sender.send(Report::Outcome(outcome));
                    return;
                };
                std::thread::sleep(pause);
            }
        })?;
        Ok(receiver)
    }

    /// What would keep a process that is here from moving, to a node or to any.
    pub fn examine_here(&self, pid: Pid, to: Option<Slot>) -> std::io::Result<Result<Vec<Obstacle>, Failure>> {
        let mover = self.arc();
        // On a thread of its own: ptrace is bound to threads.
        let thread = std::thread::Builder::new()
            .name(format!("examine-{pid}"))
            .spawn(move || {
                let mut met = Vec::new();
                let party = mover.party(pid, false)?;
                let prepared = mover.prepare_sources(&party, &mut met, false);
                match prepared {
                    Ok(sources) => {
                        let obstacles = to.map_or(Ok(Vec::new()), |to| mover.examine_there(&sources, to));
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
    fn party(&self, pid: Pid, tree: bool) -> Result<Vec<(Pid, i32)>, Failure> {
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
            let news = children
                .into_iter()
                .filter(|(child, _)| self.hidden.kind(*child).is_none());
            party.extend(news.collect::<Vec<_>>());
            next += 1;
        }
        Ok(party)
    }

    fn prepare_sources(
        &self,
        party: &[(Pid, i32)],
        met: &mut Vec<Met>,
        watch: bool,
    ) -> Result<Vec<Source>, MoveOutcome> {
        let identify = |fd: std::os::fd::BorrowedFd<'_>| self.streams.identify(fd);
        let around = self.surroundings(&identify, party);
        let mut sources: Vec<Source> = Vec::new();
        let mut obstacles = Vec::new();
        for (pid, host) in party {
            let prepared = self
                .lineage(*pid, *host)
                .and_then(|lineage| Source::prepare(*host, lineage, NEST_FILTERS, &around, met, watch));
            match prepared {
                Ok(source) => sources.push(source),
                Err(CaptureError::Obstacles(more)) => obstacles.extend(more),
                Err(error) => {
                    sources.into_iter().for_each(Source::abandon);
                    if matches!(error, CaptureError::Gone) && has_ended(*host) && party.first() == Some(&(*pid, *host))
                    {
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
        if obstacles.is_empty() {
            return Ok(sources);
        }
        sources.into_iter().for_each(Source::abandon);
        Err(MoveOutcome::Refused(obstacles))
    }

    fn surroundings<'a>(
        &self,
        identify: &'a dyn Fn(std::os::fd::BorrowedFd<'_>) -> Option<(dunlin_proto::ids::RunId, u8)>,
        party: &[(Pid, i32)],
    ) -> Surroundings<'a> {
        let moving: Vec<i32> = party.iter().map(|(_, host)| *host).collect();
        let staying = self
            .neighbours()
            .into_iter()
            .filter(|(host, pid)| !moving.contains(host) && pid.0 > 1 && self.hidden.kind(*pid).is_none());
        Surroundings::new(identify, moving.clone(), staying.collect())
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

    fn lineage(&self, pid: Pid, host: i32) -> Result<Lineage, CaptureError> {
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
    fn examine_there(&self, sources: &[Source], to: Slot) -> Result<Vec<Obstacle>, Failure> {
        let plans: Vec<ProcessPlan> = sources
            .iter()
            .map(|s| ProcessPlan {
                file_pages: Vec::new(),
                ..s.plan.clone()
            })
            .collect();
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
}

fn children_of(host: i32) -> Vec<(Pid, i32)> {
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

fn has_ended(host: i32) -> bool {
    ProcDir::process(host).status().is_ok_and(|status| status.state == 'Z') || !ProcDir::process(host).path("").exists()
}

fn failure(kind: FailureKind, message: String, hint: Option<&str>) -> Failure {
    Failure {
        kind,
        message,
        hint: hint.map(str::to_owned),
    }
}

/// A move under way.
struct Outgoing<'a> {
    mover: Arc<Mover>,
    request: MoveRequest,
    plan: Plan,
    party: Vec<(Pid, i32)>,
    met: Vec<Met>,
    sources: Vec<Source>,
    frozen: Vec<Frozen>,
    withdrawn: BTreeMap<Pid, Withdrawn>,
    images: BTreeMap<Pid, ImageId>,
    /// The orders that each has obeyed, from when nobody could give it more.
    obeyed: BTreeMap<Pid, Obeyed>,
    keepers: BTreeMap<Pid, i32>,
    regions: BTreeMap<Pid, Vec<(u64, u64)>>,
    /// Of a move that a former daemon began: what it had frozen.
    left: Vec<Left>,
    times: Times,
    reporter: &'a Reporter,
    told: bool,
    failed: Option<MoveOutcome>,
    events: Vec<SourceEvent>,
    early: Vec<SourceEvent>,
    tight: bool,
}

/// Goes on with a move of a former daemon, of which these images are left: who asked for it is not told.
pub(super) fn go_on(
    mover: &Arc<Mover>,
    KeptSource { record, left }: KeptSource,
    images: Vec<(ImageRecord, i32)>,
    withdrawn: BTreeMap<Pid, Withdrawn>,
    words: &Receiver<Word>,
) {
    let (reporter, _) = channel();
    let plan = record.plan;
    let request = MoveRequest {
        pid: images.first().map_or(Pid(0), |(image, _)| image.pid),
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
    for left in &this.left {
        this.images.extend(left.image.map(|image| (left.pid, image)));
        this.regions.insert(left.pid, left.regions.clone());
    }
    for (image, keeper) in images {
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
            met: Vec::new(),
            sources: Vec::new(),
            frozen: Vec::new(),
            withdrawn: BTreeMap::new(),
            images: BTreeMap::new(),
            obeyed: BTreeMap::new(),
            keepers: BTreeMap::new(),
            regions: BTreeMap::new(),
            left: Vec::new(),
            times: Times::start(),
            reporter,
            told: false,
            failed: None,
            events: Vec::new(),
            early: Vec::new(),
            tight: false,
        }
    }

    fn run(mover: Arc<Mover>, request: MoveRequest, reporter: &'a Reporter) -> Result<(), MoveOutcome> {
        let times = Times::start();
        let pid = request.pid;
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
        self.sources = self.mover.prepare_sources(&self.party, &mut self.met, watch)?;
        match self.mover.examine_there(&self.sources, self.plan.destination) {
            Ok(obstacles) if obstacles.is_empty() => {}
            refused => {
                self.sources.drain(..).for_each(Source::abandon);
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
            resident_bytes: self.sources.iter().map(|s| s.plan.resident_bytes).sum(),
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
                self.act(action)?;
            }
            if machine.is_ended() {
                return self.failed.take().map_or(Ok(()), Err);
            }
            let event = match self.events.pop() {
                Some(event) => event,
                None => self.wait(words, machine.next_timeout()),
            };
            // A copy whose pages are few has them all before it is known here that it runs.
            if matches!(event, SourceEvent::Drained(..)) && self.times.resumed.is_none() {
                self.early.push(event);
                continue;
            }
            machine.handle(self.mover.now(), event);
            if self.times.resumed.is_some() && !self.told && last_report.elapsed() > Duration::from_millis(100) {
                last_report = Instant::now();
                self.report_drain();
            }
        }
    }

    /// The next event. Spins while the process is frozen: a blocking wait costs a cross-CPU wake.
    fn wait(&self, words: &Receiver<Word>, until: Option<Duration>) -> SourceEvent {
        let spin_until = Instant::now() + Duration::from_millis(5);
        while self.tight && Instant::now() < spin_until {
            if let Ok(Word::Source(event)) = words.try_recv() {
                return event;
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
                Ok(Word::Source(event)) => return event,
                Ok(Word::Destination(_)) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return SourceEvent::Tick,
            }
        }
    }

    fn act(&mut self, action: SourceAction) -> Result<(), MoveOutcome> {
        match action {
            SourceAction::Send { to, msg } => self.mover.send(to, msg),
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
            SourceAction::Forget => {
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
            SourceAction::MakeImage => self.make_images(),
            SourceAction::ForgetImage(pid) => self.forget_image(pid),
            SourceAction::Learn(changes) => self.mover.decide(HomeEvent::Learn(changes)),
            SourceAction::Raise(claims) => self.mover.decide(HomeEvent::Raise(claims)),
            SourceAction::Report(report) => self.reported(report)?,
        }
        Ok(())
    }

    /// A record that cannot be made durable ends the thread as a crash would: what is parked waits for the next daemon.
    fn persist(&self, record: SourceRecord) -> Result<(), MoveOutcome> {
        let is_first = matches!(record.stage, SourceStage::Freezing(_));
        let left = self
            .left
            .iter()
            .cloned()
            .chain(self.frozen.iter().map(|f| self.left_of(f)));
        let kept = KeptSource {
            left: left.collect(),
            record,
        };
        let label = self.label();
        let stored = postcard::to_stdvec(&kept)
            .map_err(std::io::Error::other)
            .and_then(|blob| {
                // Before the freeze there is time to hear whether there is room.
                if is_first {
                    self.mover.nest.store(&label, &[], blob)
                } else {
                    self.mover.nest.store_soon(&label, blob)
                }
            });
        stored.map_err(|error| {
            let message = format!(
                "process {} was not moved: the record {label} could not be kept: {error}; it waits until this daemon is restarted",
                self.request.pid
            );
            MoveOutcome::Failed(failure(FailureKind::MoveFailed, message, None))
        })
    }

    fn left_of(&self, frozen: &Frozen) -> Left {
        let pid = frozen.source.pid;
        Left {
            pid,
            host: frozen.source.host,
            image: self.images.get(&pid).copied(),
            regions: self.regions.get(&pid).cloned().unwrap_or_default(),
            pending: frozen.pending().to_vec(),
            streams: frozen.source.streams(),
        }
    }

    fn reported(&mut self, report: SourceReport) -> Result<(), MoveOutcome> {
        match report {
            SourceReport::Failed(why) => {
                // An abort that this node has not heard of: known now, so that the next attempt is leased.
                if let WhyNot::NotLeased(LeaseRefusal::Incarnation { pid, actual }) = &why {
                    let claim = Claim {
                        pid: *pid,
                        incarnation: *actual,
                    };
                    self.mover.decide(HomeEvent::Raise(vec![claim]));
                }
                for image in self.images.values() {
                    self.mover.images.remove(*image);
                }
                self.sources.drain(..).for_each(Source::abandon);
                let message = format!(
                    "process {} was not moved: {why}; it runs on {}",
                    self.request.pid, self.mover.config.name
                );
                let kind = match why {
                    WhyNot::Refused(obstacles) => {
                        self.failed = Some(MoveOutcome::Refused(obstacles));
                        return Ok(());
                    }
                    WhyNot::HomeSilent(_) | WhyNot::DestinationLost(_) => FailureKind::Unreachable,
                    WhyNot::SourceRestarted | WhyNot::Cancelled => FailureKind::Other,
                    WhyNot::NotLeased(_)
                    | WhyNot::EndedByHome
                    | WhyNot::DestinationFailed(_)
                    | WhyNot::SourceFailed(_) => FailureKind::MoveFailed,
                };
                self.failed = Some(MoveOutcome::Failed(failure(kind, message, None)));
            }
            SourceReport::Committed => self.progress(MovePhase::Commit),
            SourceReport::Resumed => {
                self.tight = false;
                self.times.resumed = Some(Instant::now());
                self.events.append(&mut self.early);
                self.progress(MovePhase::Resume);
                if self.request.wait == WaitFor::Resumed {
                    self.finish_moved();
                }
            }
            SourceReport::Drained => {
                self.times.drained = Some(Instant::now());
                self.finish_moved();
            }
        }
        Ok(())
    }

    fn finish_moved(&mut self) {
        let reports = self.party.iter().map(|(pid, _)| {
            let drain = self.mover.drain_of(*pid, self.plan.destination);
            self.mover.report(
                *pid,
                self.plan.destination,
                self.request.mode,
                &self.times,
                drain.as_ref(),
                drain.as_ref().and_then(|d| d.verified_pages),
            )
        });
        let reports = reports.collect();
        self.finish(MoveOutcome::Moved(reports));
    }

    fn finish(&mut self, outcome: MoveOutcome) {
        if !std::mem::replace(&mut self.told, true) {
            let _ = self.reporter.send(Report::Outcome(outcome));
        }
    }

    fn report_drain(&self) {
        if let Some(drain) = self.mover.drain_of(self.request.pid, self.plan.destination) {
            let _ = self.reporter.send(Report::Progress(MoveProgress {
                pid: self.request.pid,
                phase: MovePhase::Drain,
                pages_left: drain.pages_left,
                pages_total: drain.pages_total,
                bytes_per_second: drain.bytes_per_second,
            }));
        }
    }

    fn progress(&self, at: MovePhase) {
        let _ = self.reporter.send(Report::Progress(phase(self.request.pid, at)));
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

    fn prepare_payload(&mut self) -> Result<Vec<u8>, CaptureError> {
        let ahead = self.request.mode != MoveMode::Demand;
        let mut processes = Vec::new();
        for mut source in std::mem::take(&mut self.sources) {
            let image = ImageId {
                holder: self.mover.here,
                nonce: random(),
            };
            self.images.insert(source.pid, image);
            processes.push(Prepared {
                plan: source.plan.clone(),
                image,
                clock_offsets_ns: source.clock_offsets(),
                ahead,
            });
            // First the watch, then the pages.
            let served = match ahead {
                true => source.watch_writes().and_then(|()| self.serve(&source, image)),
                false => Ok(()),
            };
            self.sources.push(source);
            served?;
        }
        Ok(payload::encode(&Prepare { processes }))
    }

    /// Serves the memory of a process, which may run.
    fn serve(&self, source: &Source, id: ImageId) -> Result<(), CaptureError> {
        let memory = source.memory()?;
        self.mover.images.register(NewImage {
            id,
            mem: memory.memory,
            pagemap: memory.pagemap,
            keeper: None,
            regions: demanded(&source.plan),
            on_unused: self.on_unused(source.pid),
        });
        Ok(())
    }

    /// Writes cannot be watched as long as the process waits for pages of an earlier move.
    fn await_own_drain(&self) -> Result<(), MoveOutcome> {
        const PATIENCE: Duration = Duration::from_secs(60);
        for (pid, _) in &self.party {
            let space = self.mover.arrivals.get(*pid).and_then(|arrival| arrival.space);
            if space.is_some_and(|space| space.wait_finished(PATIENCE).is_none()) {
                let message = format!("process {pid} was not moved: its pages are still coming from elsewhere");
                let hint = Some("wait until they have come (`pages_elsewhere` in `dunlin ps`), or use --mode demand");
                return Err(MoveOutcome::Failed(failure(FailureKind::Other, message, hint)));
            }
        }
        Ok(())
    }

    /// What is to be sent before the freeze is sent.
    fn send_ahead(&mut self) -> Result<(), CaptureError> {
        let rounds = Rounds {
            mover: &self.mover,
            by: self.plan.move_id,
            to: self.plan.destination,
            mode: self.request.mode,
        };
        let reporter = self.reporter;
        rounds.run(&mut self.sources, |progress| {
            drop(reporter.send(Report::Progress(progress)))
        })
    }

    fn freeze(&mut self) -> Result<(Vec<Member>, Vec<u8>), CaptureError> {
        // Whatever can be looked up before the stop is.
        let mover = self.mover.clone();
        let identify = |fd: std::os::fd::BorrowedFd<'_>| mover.streams.identify(fd);
        let around = mover.surroundings(&identify, &self.party);
        around.look();
        // From here on what is sent to it would stay behind with the emptied process.
        self.obeyed = self
            .party
            .iter()
            .map(|(pid, _)| (*pid, mover.orders.close(*pid)))
            .collect();
        for (run, stream) in self.sources.iter().flat_map(Source::streams) {
            mover.streams.settle(run, stream)?;
        }
        let started = Instant::now();
        let mut sources = std::mem::take(&mut self.sources).into_iter();
        while let Some(source) = sources.next() {
            match source.freeze() {
                Ok(frozen) => {
                    self.times.frozen.get_or_insert(frozen.since);
                    self.frozen.push(frozen);
                }
                Err((source, error)) => {
                    self.sources = std::iter::once(*source).chain(sources).collect();
                    return Err(error);
                }
            }
        }
        self.tight = true;
        let stopped = Instant::now();
        let mut processes = Vec::new();
        let mut members = Vec::new();
        let mut frozen_all = std::mem::take(&mut self.frozen);
        for frozen in &mut frozen_all {
            let captured = self.capture(frozen, &around);
            match captured {
                Ok((member, process)) => {
                    members.push(member);
                    processes.push(process);
                }
                Err(error) => {
                    self.frozen = frozen_all;
                    return Err(error);
                }
            }
        }
        self.frozen = frozen_all;
        let captured = Instant::now();
        for frozen in &mut self.frozen {
            frozen.park()?;
        }
        let payload = payload::encode(&FrozenPayload { processes });
        self.times.essence_bytes = payload.len() as u64;
        tracing::debug!(
            stop_us = (stopped - started).as_micros(),
            capture_us = (captured - stopped).as_micros(),
            park_us = captured.elapsed().as_micros(),
            bytes = payload.len(),
            "frozen"
        );
        Ok((members, payload))
    }

    fn capture(
        &mut self,
        frozen: &mut Frozen,
        around: &Surroundings<'_>,
    ) -> Result<(Member, FrozenProcess), CaptureError> {
        let pid = frozen.source.pid;
        for (run, stream) in frozen.source.streams() {
            self.mover.streams.settle(run, stream)?;
        }
        let mut essence = frozen.essence(around, &mut self.met)?;
        let moving: Vec<Pid> = self.party.iter().map(|(pid, _)| *pid).collect();
        essence.lineage.children.retain(|child| {
            !moving.contains(&child.pid)
                && self.mover.hidden.kind(child.pid) != Some(crate::processes::HiddenKind::Keeper)
        });
        let arrival = self.mover.arrivals.get(pid);
        let mut map = None;
        let mut images = Vec::new();
        if let Some(arrival) = &arrival
            && let Some(Ok(withdrawn)) = arrival.space.as_ref().map(|space| space.withdraw())
        {
            map = Some(withdrawn.map.to_image());
            images = arrival.images.iter().map(|(image, by)| (*image, *by)).collect();
            self.withdrawn.insert(pid, withdrawn);
        }
        let mut ahead = None;
        if let Some(image) = self.images.get(&pid).copied() {
            let regions = demanded(&frozen.source.plan);
            self.regions.insert(pid, regions.clone());
            if frozen.source.is_sent_ahead() {
                ahead = Some(Ahead {
                    stale: frozen.source.stale(&regions)?,
                    all_first: self.request.mode == MoveMode::Precopy,
                });
                self.mover.images.set_regions(image, regions);
            } else {
                self.serve(&frozen.source, image)?;
            }
        }
        let mut ids = frozen.tids();
        ids.retain(|tid| *tid != pid);
        ids.extend(
            [essence.lineage.pgid, essence.lineage.sid]
                .into_iter()
                .filter(|id| *id != pid && id.0 > 100),
        );
        // A child that has ended and is not yet waited for keeps its number.
        let ended = essence.lineage.children.iter().filter(|child| child.ended.is_some());
        ids.extend(ended.map(|child| child.pid));
        ids.sort_unstable();
        ids.dedup();
        let left_by = images.iter().map(|(_, by)| *by).collect();
        let member = lock(&self.mover.home).table().member(pid, ids, left_by);
        let digest = if self.request.verify {
            Some(frozen.digest(&essence)?)
        } else {
            None
        };
        Ok((
            member,
            FrozenProcess {
                essence,
                map,
                digest,
                images,
                obeyed: self.obeyed.remove(&pid).unwrap_or_default(),
                ahead,
            },
        ))
    }

    fn on_unused(&self, pid: Pid) -> Box<dyn FnOnce(ImageId) + Send> {
        let mover = self.mover.clone();
        let (id, destination) = (self.plan.move_id, self.plan.destination);
        Box::new(move |_| {
            mover.image_is_unused(id, pid);
            mover.to_source(id, SourceEvent::Drained(destination, pid));
        })
    }

    fn thaw(&mut self) {
        self.tight = false;
        for (pid, _) in &self.party {
            lock(&self.mover.ends).remove(pid);
        }
        self.thaw_all();
        for (pid, _) in &self.party {
            self.mover.orders.open(*pid);
        }
    }

    fn thaw_all(&mut self) {
        for image in self.images.values() {
            self.mover.images.remove(*image);
        }
        for frozen in self.frozen.drain(..) {
            let pid = frozen.source.pid;
            // The pager must serve again before the program can fault again.
            if let Some(withdrawn) = self.withdrawn.remove(&pid) {
                self.mover.adopt_again(pid, withdrawn);
            }
            if let Err(error) = frozen.thaw() {
                tracing::error!(%pid, %error, "a process could not be let run on");
            }
        }
        self.sources.drain(..).for_each(Source::abandon);
        for left in std::mem::take(&mut self.left) {
            if let Some(withdrawn) = self.withdrawn.remove(&left.pid) {
                self.mover.adopt_again(left.pid, withdrawn);
            }
            self.mover.let_run_on(left.pid, left.host, None);
        }
    }

    /// What a former daemon had parked is another node's by now.
    fn leave_again(&mut self, left: &Left, leaving: &[i32]) {
        let (mover, pid) = (self.mover.clone(), left.pid);
        mover.exits.left(pid);
        let found = Abandoned::find(pid, left.host).ok().flatten();
        if let Some(abandoned) = found.filter(|_| mover.nest.host_pid(pid).ok().flatten() == Some(left.host)) {
            let arena = abandoned.arena();
            let keeper = children_of(left.host).into_iter().find(|(child, host)| {
                Abandoned::find(*child, *host).is_ok_and(|found| found.is_some_and(|found| found.arena() == arena))
            });
            let into_image = || abandoned.into_image(left.pending.clone(), keeper.map(|(child, _)| child));
            let remember = |number| self.remember_image(pid, number);
            match mover.leave_behind((pid, left.host, false), into_image, leaving, remember) {
                Ok((_, keeper)) => self.serve_again(pid, keeper),
                Err(error) => tracing::error!(%pid, %error, "a departed process was not cleared away"),
            }
        }
        mover.streams.departed(pid, &left.streams, self.plan.destination);
        mover.residents.remove(pid);
        if mover.arrivals.remove(pid).is_some() {
            mover.forget_arrival(pid);
        }
    }

    fn serve_again(&mut self, pid: Pid, keeper: i32) {
        self.keepers.insert(pid, keeper);
        let open = |name: &str| File::open(ProcDir::process(keeper).path(name));
        let (Some(id), Ok(mem), Ok(pagemap)) = (self.images.get(&pid).copied(), open("mem"), open("pagemap")) else {
            return tracing::error!(%pid, "the pages that a process left here cannot be served");
        };
        let left = self.left.iter().find(|left| left.pid == pid);
        self.mover.images.register(NewImage {
            id,
            mem,
            pagemap,
            keeper: Some(keeper),
            regions: left.map(|left| left.regions.clone()).unwrap_or_default(),
            on_unused: self.on_unused(pid),
        });
    }

    fn make_images(&mut self) {
        let to = self.plan.destination;
        let leaving: Vec<i32> = self.party.iter().map(|(_, host)| *host).collect();
        for frozen in std::mem::take(&mut self.frozen) {
            let pid = frozen.source.pid;
            let streams = frozen.source.streams();
            self.mover.exits.left(pid);
            let task = (pid, frozen.source.host, frozen.is_stopped());
            let mover = self.mover.clone();
            let remember = |number| self.remember_image(pid, number);
            match mover.leave_behind(task, || frozen.into_image(), &leaving, remember) {
                Ok((_, keeper)) => {
                    self.keepers.insert(pid, keeper);
                    if let Some(image) = self.images.get(&pid) {
                        self.mover.images.set_keeper(*image, keeper);
                    }
                }
                Err(error) => tracing::error!(%pid, %error, "a departed process was not cleared away"),
            }
            self.mover.streams.departed(pid, &streams, to);
            self.mover.residents.remove(pid);
            self.mover.orders.leave(pid);
            if self.mover.arrivals.remove(pid).is_some() {
                self.mover.forget_arrival(pid);
            }
        }
        let left = std::mem::take(&mut self.left);
        let leaving: Vec<i32> = left.iter().map(|left| left.host).collect();
        for one in &left {
            self.left = left.clone();
            self.leave_again(one, &leaving);
        }
        self.left.clear();
        self.mover.sweep();
    }

    fn remember_image(&mut self, pid: Pid, keeper: Pid) {
        if let Some(id) = self.images.get(&pid) {
            self.mover.remember_image(&ImageRecord {
                id: *id,
                by: self.plan.move_id,
                pid,
                keeper,
                regions: self.regions.remove(&pid).unwrap_or_default(),
                unused: false,
            });
        }
    }

    fn forget_image(&mut self, pid: Pid) {
        if let Some(image) = self.images.get(&pid) {
            self.mover.images.remove(*image);
        }
        if let Some(keeper) = self.keepers.remove(&pid) {
            self.mover.end_keeper(keeper);
            self.mover.drop_image_record(self.plan.move_id, pid);
        }
    }
}

impl Mover {
    /// Lets a process run on that a former daemon held. Nothing to do if it runs already.
    pub(super) fn let_run_on(&self, pid: Pid, host: i32, stopped_by: Option<i32>) {
        let done = Abandoned::find(pid, host).and_then(|found| match found {
            Some(abandoned) => abandoned.run_on(stopped_by),
            None => Ok(()),
        });
        match done {
            Ok(()) | Err(CaptureError::Gone) => {}
            Err(error) => tracing::error!(%pid, %error, "a process that was held could not be let run on"),
        }
    }

    fn reserve_party(&self, party: &[(Pid, i32)], id: MoveId) -> Result<(), MoveOutcome> {
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

    /// Serves a space again whose move was given up.
    pub(super) fn adopt_again(&self, pid: Pid, withdrawn: Withdrawn) {
        let Withdrawn {
            id: old,
            observer,
            pid: host,
            uffd,
            map,
            claims,
        } = withdrawn;
        let id = self.pager.next_id();
        let journal = Journal::begin(ClientId(random()), &map);
        match &journal {
            Ok(journal) => observer.renamed(old, id, uffd.as_fd(), journal.as_fd()),
            Err(error) => tracing::error!(%pid, %error, "no journal for its address space"),
        }
        let space = NewSpace {
            id: Some(id),
            pid: host,
            uffd,
            map,
            connect: self.connect(),
            observer,
            claims: Some(claims),
            journal: journal.ok(),
            ahead: None,
        };
        match self.pager.adopt(space) {
            Ok(handle) => {
                if let Some(mut arrival) = self.arrivals.get(pid) {
                    arrival.space = Some(handle);
                    self.arrivals.insert(pid, arrival);
                }
            }
            Err((error, space)) => {
                tracing::error!(%pid, %error, "the pager could not take a space back: the process waits");
                // Without its userfaultfd the program would read zeros: better that it waits for ever.
                std::mem::forget(space);
            }
        }
    }

    /// Keeps the claims of withdrawn spaces, whose pages from here are all there, until their new node has certainly claimed
    /// the older images itself.
    pub(super) fn hand_over(&self, withdrawn: BTreeMap<Pid, Withdrawn>) {
        const GRACE: Duration = Duration::from_secs(3);
        if withdrawn.is_empty() {
            return;
        }
        let keep = std::thread::Builder::new().name("hand-over".into()).spawn(move || {
            std::thread::sleep(GRACE);
            // Until then a daemon that comes after this one does the same.
            for space in withdrawn.values() {
                space.observer.let_go(space.id);
            }
            drop(withdrawn);
        });
        if let Err(error) = keep {
            tracing::error!(%error, "older images may be released too early");
        }
    }
}
