//! Every transition of the source, by its exact actions.

use super::*;
use crate::relocation::{RETRY_FIRST, RETRY_SLOWEST};
use dunlin_proto::control::Obstacle;
use dunlin_proto::ids::{Incarnation, MoveId};
use dunlin_proto::relocation::{EntryChange, LeaseRefusal};
use std::time::Duration;

const HERE: Slot = Slot(1);
const HOME: Slot = Slot(2);
const THERE: Slot = Slot(3);
const ID: MoveId = MoveId { source: HERE, nonce: 7 };
const PLAN: Plan = Plan {
    move_id: ID,
    home: HOME,
    destination: THERE,
};
const T: Now = Now::from_secs(100);

fn claim(pid: i32) -> Claim {
    Claim {
        pid: Pid(pid),
        incarnation: Incarnation(0),
    }
}

fn member(pid: i32) -> Member {
    Member {
        pid: Pid(pid),
        incarnation: Incarnation(0),
        ids: vec![Pid(pid + 1)],
        images: vec![],
        homes: [HOME].into(),
    }
}

fn members() -> Vec<Member> {
    vec![member(106), member(114)]
}

fn entries() -> Vec<EntryChange> {
    entries_after_commit(&members(), THERE)
}

fn drain(machine: &mut SourceMove) -> Vec<SourceAction> {
    std::iter::from_fn(|| machine.poll_action()).collect()
}

fn on(machine: &mut SourceMove, event: SourceEvent) -> Vec<SourceAction> {
    machine.handle(T, event);
    drain(machine)
}

fn home_says(machine: &mut SourceMove, word: HomeToSource) -> Vec<SourceAction> {
    on(machine, SourceEvent::FromHome(HOME, word))
}

fn there_says(machine: &mut SourceMove, word: DestinationToSource) -> Vec<SourceAction> {
    on(machine, SourceEvent::FromDestination(THERE, word))
}

fn to_home(word: SourceToHome) -> SourceAction {
    let msg = MoveMsg::SourceToHome(ID, word);
    SourceAction::Send { to: HOME, msg }
}

fn to_there(word: SourceToDestination) -> SourceAction {
    let msg = MoveMsg::SourceToDestination(ID, word);
    SourceAction::Send { to: THERE, msg }
}

fn record(stage: SourceStage) -> SourceRecord {
    SourceRecord { plan: PLAN, stage }
}

fn image(undrained: &[i32]) -> SourceStage {
    SourceStage::Image {
        members: members(),
        undrained: undrained.iter().copied().map(Pid).collect(),
    }
}

fn failed(why: WhyNot) -> SourceAction {
    SourceAction::Report(SourceReport::Failed(why))
}

fn aborted() -> HomeToSource {
    let raised = vec![claim(106)];
    HomeToSource::Outcome(Outcome::Aborted { raised })
}

const COMMITTED: HomeToSource = HomeToSource::Outcome(Outcome::Committed);

fn leasing() -> SourceMove {
    let claims = vec![claim(106), claim(114)];
    let mut m = SourceMove::start(T, PLAN, Limits::default(), claims.clone(), b"what".to_vec());
    let destination = THERE;
    assert_eq!(drain(&mut m), [to_home(SourceToHome::Lease { destination, claims })]);
    m
}

fn proposing() -> SourceMove {
    let mut m = leasing();
    let payload = b"what".to_vec();
    let propose = to_there(SourceToDestination::Propose { home: HOME, payload });
    assert_eq!(home_says(&mut m, HomeToSource::Leased), [propose]);
    m
}

fn preparing() -> SourceMove {
    let mut m = proposing();
    let payload = b"yes".to_vec();
    let accept = DestinationToSource::Accept { payload };
    assert_eq!(there_says(&mut m, accept), [SourceAction::Prepare(b"yes".to_vec())]);
    m
}

fn destination_preparing() -> SourceMove {
    let mut m = preparing();
    let payload = b"maps".to_vec();
    let prepare = to_there(SourceToDestination::Prepare { payload });
    assert_eq!(on(&mut m, SourceEvent::Prepared(b"maps".to_vec())), [prepare]);
    m
}

fn ready() -> SourceMove {
    let mut m = destination_preparing();
    let prepared = DestinationToSource::Prepared {
        payload: b"go".to_vec(),
    };
    assert_eq!(
        there_says(&mut m, prepared),
        [SourceAction::ReadyToFreeze(b"go".to_vec())]
    );
    assert!(m.is_before_freeze());
    m
}

fn freezing() -> SourceMove {
    let mut m = ready();
    let stage = SourceStage::Freezing(vec![claim(106), claim(114)]);
    let expected = [SourceAction::Persist(record(stage)), SourceAction::Freeze];
    assert_eq!(on(&mut m, SourceEvent::Freeze), expected);
    assert!(!m.is_before_freeze());
    m
}

fn parked() -> SourceMove {
    let mut m = freezing();
    let essence = SourceToDestination::Essence {
        members: members(),
        payload: b"regs".to_vec(),
    };
    let expected = [
        SourceAction::Persist(record(SourceStage::Parked(members()))),
        to_there(essence),
    ];
    assert_eq!(on(&mut m, SourceEvent::Frozen(members(), b"regs".to_vec())), expected);
    m
}

fn aborting(why: &str) -> SourceMove {
    let mut m = parked();
    assert_eq!(
        on(&mut m, SourceEvent::Failed(why.into())),
        [to_home(SourceToHome::Abort)]
    );
    m
}

fn committed() -> SourceMove {
    let mut m = parked();
    let expected = [
        SourceAction::Persist(record(image(&[106, 114]))),
        SourceAction::Learn(entries()),
        SourceAction::MakeImage,
        SourceAction::Report(SourceReport::Committed),
        to_home(SourceToHome::OutcomeNoted),
    ];
    assert_eq!(home_says(&mut m, COMMITTED), expected);
    m
}

#[test]
fn a_move_goes_through() {
    let mut m = committed();
    let resumed = SourceAction::Report(SourceReport::Resumed);
    assert_eq!(there_says(&mut m, DestinationToSource::Resumed), [resumed]);
    assert_eq!(there_says(&mut m, DestinationToSource::Resumed), []);
    assert_eq!(home_says(&mut m, COMMITTED), [to_home(SourceToHome::OutcomeNoted)]);
    // Whoever runs it by then tells, here slot 5.
    let noted = |pid| SourceAction::Send {
        to: Slot(5),
        msg: MoveMsg::Noted(Notice::Drained {
            move_id: ID,
            pid: Pid(pid),
        }),
    };
    let first = [
        SourceAction::ForgetImage(Pid(114)),
        SourceAction::Persist(record(image(&[106]))),
        noted(114),
    ];
    assert_eq!(on(&mut m, SourceEvent::Drained(Slot(5), Pid(114))), first);
    assert_eq!(on(&mut m, SourceEvent::Drained(Slot(5), Pid(114))), [noted(114)]);
    let last = [
        SourceAction::ForgetImage(Pid(106)),
        SourceAction::Forget,
        SourceAction::Report(SourceReport::Drained),
        noted(106),
    ];
    assert_eq!(on(&mut m, SourceEvent::Drained(Slot(5), Pid(106))), last);
    assert!(m.is_ended() && m.next_timeout().is_none());
    assert_eq!(on(&mut m, SourceEvent::Drained(Slot(5), Pid(106))), [noted(106)]);
}

#[test]
fn a_failure_before_the_freeze_is_a_cancel() {
    let states: [fn() -> SourceMove; 5] = [leasing, proposing, preparing, destination_preparing, ready];
    for state in states {
        let cancel = [
            failed(WhyNot::SourceFailed("oops".into())),
            to_there(SourceToDestination::Cancel),
            to_home(SourceToHome::Abort),
        ];
        let mut m = state();
        assert_eq!(on(&mut m, SourceEvent::Failed("oops".into())), cancel);
        assert_eq!(on(&mut m, SourceEvent::Cancel), []);
        // No essence was sent: a commit is not believed.
        assert_eq!(home_says(&mut m, COMMITTED), []);
        let raise = SourceAction::Raise(vec![claim(106)]);
        assert_eq!(
            home_says(&mut m, aborted()),
            [raise.clone(), to_home(SourceToHome::OutcomeNoted)]
        );
        assert!(m.is_ended());

        let mut m = state();
        let ended = [
            raise,
            to_there(SourceToDestination::Cancel),
            failed(WhyNot::EndedByHome),
            to_home(SourceToHome::OutcomeNoted),
        ];
        assert_eq!(home_says(&mut m, aborted()), ended);
        assert!(m.is_ended());
    }
}

#[test]
fn every_party_may_refuse() {
    let mut m = leasing();
    let why = LeaseRefusal::Unknown { pid: Pid(106) };
    assert_eq!(
        home_says(&mut m, HomeToSource::LeaseRefused(why)),
        [failed(WhyNot::NotLeased(why))]
    );
    assert!(m.is_ended());

    let mut m = proposing();
    let obstacles = vec![Obstacle {
        pid: Pid(106),
        kind: "cpu".into(),
        object: "avx512".into(),
        why: "absent".into(),
        hint: "move elsewhere".into(),
    }];
    let actions = there_says(
        &mut m,
        DestinationToSource::Refuse {
            obstacles: obstacles.clone(),
        },
    );
    assert_eq!(actions[0], failed(WhyNot::Refused(obstacles)));

    let mut m = destination_preparing();
    let actions = there_says(&mut m, DestinationToSource::Failed { why: "no room".into() });
    assert_eq!(actions[0], failed(WhyNot::DestinationFailed("no room".into())));
}

#[test]
fn a_freeze_that_was_undone_is_a_cancel() {
    let mut m = freezing();
    let expected = [
        SourceAction::Forget,
        failed(WhyNot::SourceFailed("a new mapping".into())),
        to_there(SourceToDestination::Cancel),
        to_home(SourceToHome::Abort),
    ];
    assert_eq!(on(&mut m, SourceEvent::Failed("a new mapping".into())), expected);
}

#[test]
fn what_goes_wrong_during_the_freeze_counts_when_it_is_over() {
    let mut m = freezing();
    assert_eq!(on(&mut m, SourceEvent::PeerLost(THERE)), []);
    assert_eq!(home_says(&mut m, aborted()), [], "not noted: the home must tell again");
    // Parked, but nothing was sent: still the home has the word.
    assert_eq!(
        on(&mut m, SourceEvent::Frozen(members(), vec![])),
        [to_home(SourceToHome::Abort)]
    );
    assert_eq!(home_says(&mut m, aborted())[0], SourceAction::Thaw);
}

#[test]
fn a_parked_copy_is_thawed_only_by_the_homes_word() {
    let silence = |m: &mut SourceMove| {
        m.handle(T + Limits::default().parked, SourceEvent::Tick);
        drain(m)
    };
    type Wrong = Box<dyn Fn(&mut SourceMove) -> Vec<SourceAction>>;
    let wrongs: [Wrong; 6] = [
        Box::new(|m| on(m, SourceEvent::Failed("x".into()))),
        Box::new(|m| on(m, SourceEvent::Cancel)),
        Box::new(|m| on(m, SourceEvent::PeerLost(THERE))),
        Box::new(|m| there_says(m, DestinationToSource::Failed { why: "verify".into() })),
        Box::new(|m| there_says(m, DestinationToSource::Unknown)),
        Box::new(silence),
    ];
    for wrong in wrongs {
        let mut m = parked();
        assert_eq!(wrong(&mut m), [to_home(SourceToHome::Abort)]);
        assert_eq!(
            wrong(&mut m)
                .iter()
                .filter(|a| !matches!(a, SourceAction::Send { .. }))
                .count(),
            0
        );
        let actions = home_says(&mut m, aborted());
        assert_eq!(actions.first(), Some(&SourceAction::Thaw));
        assert_eq!(actions.last(), Some(&to_home(SourceToHome::OutcomeNoted)));
    }
}

#[test]
fn thawing_in_order() {
    let mut m = aborting("oops");
    let expected = [
        SourceAction::Thaw,
        SourceAction::Raise(vec![claim(106)]),
        SourceAction::Forget,
        to_there(SourceToDestination::Cancel),
        failed(WhyNot::SourceFailed("oops".into())),
        to_home(SourceToHome::OutcomeNoted),
    ];
    assert_eq!(home_says(&mut m, aborted()), expected);
    assert!(m.is_ended());
}

#[test]
fn a_commit_that_was_faster_than_the_abort_stands() {
    let mut m = aborting("oops");
    let actions = home_says(&mut m, COMMITTED);
    assert!(actions.contains(&SourceAction::MakeImage) && !actions.contains(&SourceAction::Thaw));
    // A home that has forgotten the commit since presumes an abort: too late.
    assert_eq!(home_says(&mut m, aborted()), [to_home(SourceToHome::OutcomeNoted)]);
}

#[test]
fn a_resume_proves_the_commit() {
    for mut m in [parked(), aborting("oops")] {
        let expected = [
            SourceAction::Persist(record(image(&[106, 114]))),
            SourceAction::Learn(entries()),
            SourceAction::MakeImage,
            SourceAction::Report(SourceReport::Committed),
            SourceAction::Report(SourceReport::Resumed),
        ];
        assert_eq!(there_says(&mut m, DestinationToSource::Resumed), expected);
        assert_eq!(home_says(&mut m, COMMITTED), [to_home(SourceToHome::OutcomeNoted)]);
    }
}

#[test]
fn drained_before_the_outcome_is_known_is_not_noted() {
    for mut m in [parked(), aborting("oops")] {
        assert_eq!(on(&mut m, SourceEvent::Drained(THERE, Pid(106))), []);
    }
}

#[test]
fn questions_are_repeated_ever_more_slowly() {
    let mut m = aborting("oops");
    let mut at = T;
    for round in 0..12 {
        let next = m.next_timeout().unwrap();
        assert!(next - at <= RETRY_SLOWEST && next - at >= RETRY_FIRST, "round {round}");
        m.handle(next - Duration::from_millis(1), SourceEvent::Tick);
        assert_eq!(drain(&mut m), []);
        m.handle(next, SourceEvent::Tick);
        assert_eq!(drain(&mut m), [to_home(SourceToHome::Abort)]);
        at = next;
    }
    let mut m = committed();
    m.handle(m.next_timeout().unwrap(), SourceEvent::Tick);
    assert_eq!(drain(&mut m), [to_there(SourceToDestination::DoesItRun)]);
    // It ran, and all that is settled: the destination has forgotten the move.
    let resumed = SourceAction::Report(SourceReport::Resumed);
    assert_eq!(there_says(&mut m, DestinationToSource::Unknown), [resumed]);
    assert_eq!(m.next_timeout(), None);
}

#[test]
fn silence_has_limits() {
    let limits = Limits::default();
    type Case = (fn() -> SourceMove, Duration, WhyNot);
    let cases: [Case; 3] = [
        (leasing, limits.lease, WhyNot::HomeSilent(HOME)),
        (proposing, limits.propose, WhyNot::DestinationLost(THERE)),
        (destination_preparing, limits.prepare, WhyNot::DestinationLost(THERE)),
    ];
    for (state, limit, why) in cases {
        let mut m = state();
        m.handle(T + limit - Duration::from_millis(1), SourceEvent::Tick);
        assert!(!drain(&mut m).contains(&failed(why.clone())));
        m.handle(T + limit, SourceEvent::Tick);
        assert!(drain(&mut m).contains(&failed(why)));
    }
}

#[test]
fn only_the_parties_are_heard() {
    let mut m = parked();
    let other = Slot(9);
    assert_eq!(on(&mut m, SourceEvent::FromHome(other, aborted())), []);
    assert_eq!(
        on(
            &mut m,
            SourceEvent::FromDestination(other, DestinationToSource::Resumed)
        ),
        []
    );
    assert_eq!(on(&mut m, SourceEvent::PeerLost(other)), []);
    assert_eq!(
        on(&mut m, SourceEvent::PeerLost(HOME)),
        [],
        "the destination may reach it"
    );
}

#[test]
fn a_restarted_source_asks_and_waits() {
    for stage in [SourceStage::Freezing(vec![claim(106)]), SourceStage::Parked(members())] {
        let mut m = SourceMove::recover(T, record(stage), Limits::default());
        assert_eq!(drain(&mut m), [to_home(SourceToHome::Abort)]);
        let actions = home_says(&mut m, aborted());
        assert_eq!(actions[0], SourceAction::Thaw);
        assert!(actions.contains(&failed(WhyNot::SourceRestarted)));
    }
    let mut m = SourceMove::recover(T, record(image(&[114])), Limits::default());
    assert_eq!(drain(&mut m), [SourceAction::Learn(entries()), SourceAction::MakeImage]);
    let actions = on(&mut m, SourceEvent::Drained(THERE, Pid(114)));
    assert_eq!(actions[0], SourceAction::ForgetImage(Pid(114)));
    assert!(m.is_ended());
}
