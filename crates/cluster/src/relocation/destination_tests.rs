//! Every transition of the destination, by its exact actions.

use super::*;
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::{Incarnation, Pid};
use std::time::Duration;

const HERE: Slot = Slot(3);
const HOME: Slot = Slot(2);
const SOURCE: Slot = Slot(1);
const ID: MoveId = MoveId {
    source: SOURCE,
    nonce: 7,
};
const EARLIER: MoveId = MoveId {
    source: Slot(5),
    nonce: 6,
};
const T: Now = Now::from_secs(100);

fn members() -> Vec<Member> {
    vec![Member {
        pid: Pid(106),
        incarnation: Incarnation(0),
        ids: vec![Pid(107)],
        images: vec![EARLIER],
        homes: [HOME, HERE].into(),
    }]
}

fn entries() -> Vec<EntryChange> {
    entries_after_commit(&members(), HERE)
}

fn record(ended: Option<Ending>) -> DestinationRecord {
    DestinationRecord {
        move_id: ID,
        home: HOME,
        members: members(),
        ended,
    }
}

fn drain(machine: &mut DestinationMove) -> Vec<DestinationAction> {
    std::iter::from_fn(|| machine.poll_action()).collect()
}

fn on(machine: &mut DestinationMove, event: DestinationEvent) -> Vec<DestinationAction> {
    machine.handle(T, event);
    drain(machine)
}

fn home_says(machine: &mut DestinationMove, word: HomeToDestination) -> Vec<DestinationAction> {
    on(machine, DestinationEvent::FromHome(HOME, word))
}

fn source_says(machine: &mut DestinationMove, word: SourceToDestination) -> Vec<DestinationAction> {
    on(machine, DestinationEvent::FromSource(SOURCE, word))
}

fn to_home(word: DestinationToHome) -> DestinationAction {
    let msg = MoveMsg::DestinationToHome(ID, word);
    DestinationAction::Send { to: HOME, msg }
}

fn to_source(word: DestinationToSource) -> DestinationAction {
    let msg = MoveMsg::DestinationToSource(ID, word);
    DestinationAction::Send { to: SOURCE, msg }
}

fn commit_please() -> DestinationAction {
    to_home(DestinationToHome::Commit { members: members() })
}

fn checking() -> DestinationMove {
    let mut m = DestinationMove::start(HERE, Limits::default(), ID, HOME, b"what".to_vec());
    assert_eq!(drain(&mut m), [DestinationAction::Check(b"what".to_vec())]);
    m
}

fn accepted() -> DestinationMove {
    let mut m = checking();
    let payload = b"yes".to_vec();
    let accept = to_source(DestinationToSource::Accept { payload });
    assert_eq!(on(&mut m, DestinationEvent::Accepted(b"yes".to_vec())), [accept]);
    m
}

fn preparing() -> DestinationMove {
    let mut m = accepted();
    let payload = b"maps".to_vec();
    let prepare = SourceToDestination::Prepare { payload };
    assert_eq!(
        source_says(&mut m, prepare),
        [DestinationAction::Prepare(b"maps".to_vec())]
    );
    m
}

fn prepared() -> DestinationMove {
    let mut m = preparing();
    let payload = b"go".to_vec();
    let prepared = to_source(DestinationToSource::Prepared { payload });
    assert_eq!(on(&mut m, DestinationEvent::Prepared(b"go".to_vec())), [prepared]);
    m
}

fn essence(members: Vec<Member>) -> SourceToDestination {
    let payload = b"regs".to_vec();
    SourceToDestination::Essence { members, payload }
}

fn rebuilding() -> DestinationMove {
    let mut m = prepared();
    let rebuild = DestinationAction::Rebuild(members(), b"regs".to_vec());
    assert_eq!(source_says(&mut m, essence(members())), [rebuild]);
    m
}

fn asking() -> DestinationMove {
    let mut m = rebuilding();
    let expected = [DestinationAction::Persist(record(None)), commit_please()];
    assert_eq!(on(&mut m, DestinationEvent::Rebuilt), expected);
    m
}

fn running() -> DestinationMove {
    let mut m = asking();
    let expected = [
        DestinationAction::Resume,
        to_source(DestinationToSource::Resumed),
        DestinationAction::Learn(entries()),
        to_home(DestinationToHome::Resumed),
    ];
    assert_eq!(home_says(&mut m, HomeToDestination::Granted), expected);
    assert!(m.is_running());
    m
}

const BEFORE_ASKING: [fn() -> DestinationMove; 5] = [checking, accepted, preparing, prepared, rebuilding];

#[test]
fn a_move_goes_through() {
    let mut m = running();
    assert_eq!(home_says(&mut m, HomeToDestination::Granted), [], "resumed once");
    assert_eq!(home_says(&mut m, HomeToDestination::Denied), [], "too late");
    let runs = source_says(&mut m, SourceToDestination::DoesItRun);
    assert_eq!(runs, [to_source(DestinationToSource::Resumed)]);
    m.handle(m.next_timeout().unwrap(), DestinationEvent::Tick);
    assert_eq!(drain(&mut m), [to_home(DestinationToHome::Resumed)]);
    assert_eq!(
        home_says(&mut m, HomeToDestination::ResumedNoted),
        [DestinationAction::Forget]
    );
    assert!(m.is_ended() && m.next_timeout().is_none());
}

#[test]
fn it_may_refuse() {
    let mut m = checking();
    let refuse = to_source(DestinationToSource::Refuse { obstacles: vec![] });
    assert_eq!(on(&mut m, DestinationEvent::Refused(vec![])), [refuse]);
    assert!(m.is_ended());
}

#[test]
fn before_it_has_asked_it_destroys_and_never_asks() {
    for state in BEFORE_ASKING {
        let silently = [DestinationAction::Destroy];
        for event in [
            DestinationEvent::PeerLost(SOURCE),
            DestinationEvent::FromSource(SOURCE, SourceToDestination::Cancel),
            DestinationEvent::FromHome(HOME, HomeToDestination::Denied),
        ] {
            let mut m = state();
            assert_eq!(on(&mut m, event.clone()), silently, "{event:?}");
            assert!(m.is_ended());
            // The engine's late success changes nothing.
            assert_eq!(on(&mut m, DestinationEvent::Rebuilt), []);
        }
        let mut m = state();
        let why = "verify".to_owned();
        let told = [
            DestinationAction::Destroy,
            to_source(DestinationToSource::Failed { why: why.clone() }),
        ];
        assert_eq!(on(&mut m, DestinationEvent::Failed(why)), told);
        let mut m = state();
        assert_eq!(home_says(&mut m, HomeToDestination::Granted), [], "it has not asked");
    }
}

#[test]
fn having_asked_it_waits_for_the_home_alone() {
    let mut m = asking();
    for event in [
        DestinationEvent::PeerLost(SOURCE),
        DestinationEvent::PeerLost(HOME),
        DestinationEvent::FromSource(SOURCE, SourceToDestination::Cancel),
        DestinationEvent::FromHome(SOURCE, HomeToDestination::Granted),
        DestinationEvent::FromHome(SOURCE, HomeToDestination::Denied),
        DestinationEvent::Failed("late".into()),
    ] {
        assert_eq!(on(&mut m, event.clone()), [], "{event:?}");
    }
    for _ in 0..20 {
        m.handle(m.next_timeout().unwrap(), DestinationEvent::Tick);
        assert_eq!(drain(&mut m), [commit_please()]);
    }
    let denied = [DestinationAction::Destroy, DestinationAction::Forget];
    assert_eq!(home_says(&mut m, HomeToDestination::Denied), denied);
    assert!(m.is_ended());
}

#[test]
fn silence_has_limits() {
    let limits = Limits::default();
    for (state, limit) in [
        (accepted as fn() -> DestinationMove, limits.propose),
        (prepared, limits.precopy),
    ] {
        let mut m = state();
        m.handle(T + limit - Duration::from_millis(1), DestinationEvent::Tick);
        assert_eq!(drain(&mut m), []);
        m.handle(T + limit, DestinationEvent::Tick);
        assert_eq!(drain(&mut m)[0], DestinationAction::Destroy);
    }
}

#[test]
fn an_impossible_essence_is_refused() {
    let mut many = members();
    many[0].ids = vec![Pid(107); MAX_IDS + 1];
    for bad in [vec![], many] {
        let mut m = prepared();
        assert_eq!(source_says(&mut m, essence(bad))[0], DestinationAction::Destroy);
    }
}

#[test]
fn words_out_of_turn_change_nothing() {
    let mut m = checking();
    assert_eq!(source_says(&mut m, essence(members())), []);
    let payload = vec![];
    assert_eq!(source_says(&mut m, SourceToDestination::Prepare { payload }), []);
    assert_eq!(source_says(&mut m, SourceToDestination::DoesItRun), []);
    let mut m = rebuilding();
    assert_eq!(source_says(&mut m, essence(members())), [], "rebuilt once");
}

#[test]
fn after_a_restart_it_tells_what_it_found() {
    let limits = Limits::default();
    let mut m = DestinationMove::recover(T, HERE, limits, record(None), Found::Running);
    let told = [DestinationAction::Learn(entries()), to_home(DestinationToHome::Resumed)];
    assert_eq!(drain(&mut m), told);
    assert!(m.is_running());

    let lost = Found::Ended(Ending::Lost);
    let mut m = DestinationMove::recover(T, HERE, limits, record(None), lost);
    assert_eq!(drain(&mut m), [to_home(DestinationToHome::Gone)]);
    assert_eq!(
        home_says(&mut m, HomeToDestination::Granted),
        [],
        "there is nothing to run"
    );
    m.handle(m.next_timeout().unwrap(), DestinationEvent::Tick);
    assert_eq!(drain(&mut m), [to_home(DestinationToHome::Gone)]);
    let word = HomeToDestination::GoneNoted { committed: false };
    assert_eq!(home_says(&mut m, word), [DestinationAction::Forget]);
}

#[test]
fn a_loss_is_told_to_everyone() {
    let ending = Ending::Exited(ExitStatus::Code(3));
    let ended = Notice::Ended {
        pid: Pid(106),
        incarnation: Incarnation(0).after_commit(),
        ending,
    };
    let drained = |move_id| Notice::Drained { move_id, pid: Pid(106) };
    let post = |to, notice| DestinationAction::Post { to, notice };
    let told = vec![
        post(HOME, ended),
        post(HERE, ended),
        post(EARLIER.source, drained(EARLIER)),
        post(SOURCE, drained(ID)),
        to_home(DestinationToHome::Resumed),
    ];
    let limits = Limits::default();
    let mut m = DestinationMove::recover(T, HERE, limits, record(None), Found::Ended(ending));
    drain(&mut m);
    let actions = home_says(&mut m, HomeToDestination::GoneNoted { committed: true });
    assert_eq!(actions[0], DestinationAction::Persist(record(Some(ending))));
    assert_eq!(actions[1..], told);
    assert_eq!(
        home_says(&mut m, HomeToDestination::ResumedNoted),
        [DestinationAction::Forget]
    );
    // A restart in the middle of telling tells all again.
    let mut m = DestinationMove::recover(T, HERE, limits, record(Some(ending)), Found::Ended(Ending::Lost));
    assert_eq!(drain(&mut m), told);
}

#[test]
fn a_copy_that_waits_after_a_restart_asks_again() {
    let limits = Limits::default();
    for granted in [true, false] {
        let mut m = DestinationMove::recover(T, HERE, limits, record(None), Found::Waiting);
        let first = m.poll_action();
        assert!(
            matches!(
                &first,
                Some(DestinationAction::Send {
                    to: HOME,
                    msg: MoveMsg::DestinationToHome(_, DestinationToHome::Commit { .. })
                })
            ),
            "{first:?}"
        );
        assert_eq!(m.poll_action(), None, "it neither runs nor goes before the answer");
        let word = if granted {
            HomeToDestination::Granted
        } else {
            HomeToDestination::Denied
        };
        m.handle(T, DestinationEvent::FromHome(HOME, word));
        let next = m.poll_action();
        assert_eq!(next == Some(DestinationAction::Resume), granted);
        assert_eq!(next == Some(DestinationAction::Destroy), !granted);
    }
}
