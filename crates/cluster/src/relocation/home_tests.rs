//! Every transition of the home, by its exact actions.

use super::*;
use crate::table::{Row, Whereabouts};

const HERE: Slot = Slot(1);
const S: Slot = Slot(2);
const D: Slot = Slot(3);
/// The home of a thread that moves along.
const X: Slot = Slot(4);
const ROOT: Pid = Pid(105);
const ID: MoveId = MoveId { source: S, nonce: 7 };
const OTHER: MoveId = MoveId { source: S, nonce: 8 };
const T: Now = Now::from_secs(100);
const M: Modulus = Modulus(8);

/// ROOT is on S, in its first incarnation after a commit.
fn news() -> EntryChange {
    EntryChange {
        pid: ROOT,
        incarnation: arrived(),
        node: S,
        ids: vec![],
        homes: [HERE].into(),
    }
}

/// A home that has learnt it.
fn home() -> Home {
    let mut home = Home::restore(T, M, HERE, Ledger::default());
    home.handle(T, HomeEvent::Learn(vec![news()]));
    assert!(drain(&mut home).contains(&HomeAction::Reserve(vec![ROOT])));
    home
}

fn arrived() -> Incarnation {
    Incarnation(0).after_commit()
}

fn claims() -> Vec<Claim> {
    vec![Claim {
        pid: ROOT,
        incarnation: arrived(),
    }]
}

fn members() -> Vec<Member> {
    vec![Member {
        pid: ROOT,
        incarnation: arrived(),
        ids: vec![Pid(113), Pid(108)],
        images: vec![],
        homes: [HERE, X].into(),
    }]
}

fn entries() -> Vec<EntryChange> {
    crate::relocation::entries_after_commit(&members(), D)
}

fn drain(home: &mut Home) -> Vec<HomeAction> {
    std::iter::from_fn(|| home.poll_action()).collect()
}

fn on(home: &mut Home, event: HomeEvent) -> Vec<HomeAction> {
    home.handle(T, event);
    drain(home)
}

fn s_says(home: &mut Home, move_id: MoveId, word: SourceToHome) -> Vec<HomeAction> {
    on(home, HomeEvent::FromSource(S, move_id, word))
}

fn d_says(home: &mut Home, word: DestinationToHome) -> Vec<HomeAction> {
    on(home, HomeEvent::FromDestination(D, ID, word))
}

fn to_s(move_id: MoveId, word: HomeToSource) -> HomeAction {
    let msg = MoveMsg::HomeToSource(move_id, word);
    HomeAction::Send { to: S, msg }
}

fn to_d(word: HomeToDestination) -> HomeAction {
    let msg = MoveMsg::HomeToDestination(ID, word);
    HomeAction::Send { to: D, msg }
}

fn lease(claims: Vec<Claim>) -> SourceToHome {
    SourceToHome::Lease { destination: D, claims }
}

fn commit() -> DestinationToHome {
    DestinationToHome::Commit { members: members() }
}

fn record(stage: Stage) -> MoveRecord {
    MoveRecord {
        move_id: ID,
        destination: D,
        claims: claims(),
        stage,
    }
}

fn committed_stage(source_knows: bool, destination_done: bool, untold: &[Slot]) -> Stage {
    Stage::Committed {
        entries: entries(),
        source_knows,
        destination_done,
        untold: untold.iter().copied().collect(),
    }
}

fn row(home: &Home) -> Durable {
    Durable::Row(Row::Entry(ROOT, home.table().entry(ROOT).unwrap().clone()))
}

fn raised() -> Vec<Claim> {
    vec![Claim {
        pid: ROOT,
        incarnation: arrived().after_abort(),
    }]
}

fn aborted(raised: Vec<Claim>) -> HomeToSource {
    HomeToSource::Outcome(Outcome::Aborted { raised })
}

const COMMITTED: HomeToSource = HomeToSource::Outcome(Outcome::Committed);

fn leased() -> Home {
    let mut home = home();
    let actions = s_says(&mut home, ID, lease(claims()));
    let persist = HomeAction::Persist(vec![Durable::Move(record(Stage::Leased)), row(&home)]);
    assert_eq!(actions, [persist, to_s(ID, HomeToSource::Leased)]);
    let place = Place::Moving {
        move_id: ID,
        from: S,
        to: D,
    };
    assert_eq!(home.table().whereabouts(ROOT), Whereabouts::Known(place));
    home
}

fn committed() -> Home {
    let mut home = leased();
    let actions = d_says(&mut home, commit());
    let stage = committed_stage(false, false, &[X]);
    let changed = HomeToHome::EntriesChanged { entries: entries() };
    let expected = [
        HomeAction::Persist(vec![Durable::Move(record(stage)), row(&home)]),
        HomeAction::Reserve(vec![Pid(113)]),
        to_d(HomeToDestination::Granted),
        to_s(ID, COMMITTED),
        HomeAction::Send {
            to: X,
            msg: MoveMsg::HomeToHome(ID, changed),
        },
    ];
    assert_eq!(actions, expected);
    assert_eq!(home.table().whereabouts(ROOT), Whereabouts::Known(Place::At(D)));
    home
}

fn aborted_home() -> Home {
    let mut home = leased();
    let actions = s_says(&mut home, ID, SourceToHome::Abort);
    let stage = Stage::Aborted { raised: raised() };
    let expected = [
        HomeAction::Persist(vec![Durable::Move(record(stage)), row(&home)]),
        to_d(HomeToDestination::Denied),
        to_s(ID, aborted(raised())),
    ];
    assert_eq!(actions, expected);
    assert_eq!(home.table().whereabouts(ROOT), Whereabouts::Known(Place::At(S)));
    home
}

#[test]
fn the_first_to_ask_decides_for_ever() {
    let mut home = committed();
    for _ in 0..3 {
        assert_eq!(s_says(&mut home, ID, SourceToHome::Abort), [to_s(ID, COMMITTED)]);
        assert_eq!(s_says(&mut home, ID, lease(claims())), [to_s(ID, COMMITTED)]);
        assert_eq!(d_says(&mut home, commit()), [to_d(HomeToDestination::Granted)]);
    }
    let mut home = aborted_home();
    for _ in 0..3 {
        assert_eq!(d_says(&mut home, commit()), [to_d(HomeToDestination::Denied)]);
        assert_eq!(
            s_says(&mut home, ID, SourceToHome::Abort),
            [to_s(ID, aborted(raised()))]
        );
        assert_eq!(s_says(&mut home, ID, lease(claims())), [to_s(ID, aborted(raised()))]);
    }
}

#[test]
fn a_commit_is_forgotten_when_all_know() {
    let mut home = committed();
    let update = |s, d, x: &[Slot]| HomeAction::Persist(vec![Durable::Move(record(committed_stage(s, d, x)))]);
    assert_eq!(
        s_says(&mut home, ID, SourceToHome::OutcomeNoted),
        [update(true, false, &[X])]
    );
    assert_eq!(s_says(&mut home, ID, SourceToHome::OutcomeNoted), []);
    let noted = to_d(HomeToDestination::ResumedNoted);
    assert_eq!(
        d_says(&mut home, DestinationToHome::Resumed),
        [update(true, true, &[X]), noted.clone()]
    );
    assert_eq!(
        d_says(&mut home, DestinationToHome::Resumed),
        std::slice::from_ref(&noted)
    );
    // An echo of its question must not make a second copy.
    assert_eq!(d_says(&mut home, commit()), [to_d(HomeToDestination::Denied)]);
    let forgotten = HomeAction::Persist(vec![Durable::MoveForgotten(ID)]);
    let event = HomeEvent::FromHome(X, ID, HomeToHome::EntriesNoted);
    assert_eq!(on(&mut home, event), [forgotten]);
    assert_eq!(home.next_timeout(), None);
    // Abort is presumed from now on; both are beyond believing it.
    assert_eq!(d_says(&mut home, commit()), [to_d(HomeToDestination::Denied)]);
    assert_eq!(d_says(&mut home, DestinationToHome::Resumed), [noted]);
    assert_eq!(s_says(&mut home, ID, SourceToHome::Abort), [to_s(ID, aborted(vec![]))]);
    assert_eq!(home.table().whereabouts(ROOT), Whereabouts::Known(Place::At(D)));
}

#[test]
fn an_abort_is_forgotten_when_the_source_knows() {
    let mut home = aborted_home();
    let forgotten = HomeAction::Persist(vec![Durable::MoveForgotten(ID)]);
    assert_eq!(s_says(&mut home, ID, SourceToHome::OutcomeNoted), [forgotten]);
    assert_eq!(d_says(&mut home, commit()), [to_d(HomeToDestination::Denied)]);
    // A late echo of the lease is in an old incarnation.
    let why = LeaseRefusal::Incarnation {
        pid: ROOT,
        actual: arrived().after_abort(),
    };
    let refused = to_s(ID, HomeToSource::LeaseRefused(why));
    assert_eq!(s_says(&mut home, ID, lease(claims())), [refused]);
}

#[test]
fn leases_are_refused_for_a_reason() {
    let pid = ROOT;
    let with = |pid, incarnation| vec![Claim { pid, incarnation }];
    let unknown = Pid(121);
    let cases = [
        (home(), lease(vec![]), LeaseRefusal::Invalid),
        (home(), lease([claims(), claims()].concat()), LeaseRefusal::Invalid),
        (
            home(),
            SourceToHome::Lease {
                destination: S,
                claims: claims(),
            },
            LeaseRefusal::Invalid,
        ),
        (home(), lease(with(Pid(106), arrived())), LeaseRefusal::NotHome),
        (
            home(),
            lease(with(unknown, arrived())),
            LeaseRefusal::Unknown { pid: unknown },
        ),
        (
            home(),
            lease(with(pid, Incarnation(0))),
            LeaseRefusal::Incarnation { pid, actual: arrived() },
        ),
        (leased(), lease(claims()), LeaseRefusal::Busy { pid, move_id: ID }),
        (committed(), lease(claims()), LeaseRefusal::NotThere { pid, at: D }),
    ];
    for (mut home, word, why) in cases {
        assert_eq!(
            s_says(&mut home, OTHER, word),
            [to_s(OTHER, HomeToSource::LeaseRefused(why))]
        );
    }
    // Only the source itself may ask.
    assert_eq!(on(&mut home(), HomeEvent::FromSource(D, ID, lease(claims()))), []);
}

#[test]
fn there_is_a_bound_on_open_moves() {
    let mut home = Home::restore(T, M, HERE, Ledger::default());
    for nonce in 0..=MAX_MOVES as u64 {
        let move_id = MoveId { source: HERE, nonce };
        let claim = Claim {
            pid: Pid(105 + 8 * nonce as i32),
            incarnation: Incarnation(0),
        };
        home.handle(T, HomeEvent::FromSource(HERE, move_id, lease(vec![claim])));
        let refused = MoveMsg::HomeToSource(move_id, HomeToSource::LeaseRefused(LeaseRefusal::TooManyMoves));
        let is_refused = drain(&mut home).contains(&HomeAction::Send { to: HERE, msg: refused });
        assert_eq!(is_refused, nonce == MAX_MOVES as u64);
    }
}

#[test]
fn a_commit_of_something_else_is_an_abort() {
    let mut root_is_not_first = members();
    root_is_not_first.insert(
        0,
        Member {
            pid: Pid(106),
            ..members().remove(0)
        },
    );
    let twice = [members(), members()].concat();
    let mut stale = members();
    stale[0].incarnation = Incarnation(0);
    for bad in [vec![], root_is_not_first, twice, stale] {
        let mut home = leased();
        let actions = d_says(&mut home, DestinationToHome::Commit { members: bad });
        assert!(actions.contains(&to_d(HomeToDestination::Denied)));
        assert!(actions.contains(&to_s(ID, aborted(raised()))));
    }
    // Another node than the destination is denied, and decides nothing.
    let mut home = leased();
    let actions = on(&mut home, HomeEvent::FromDestination(X, ID, commit()));
    let msg = MoveMsg::HomeToDestination(ID, HomeToDestination::Denied);
    assert_eq!(actions, [HomeAction::Send { to: X, msg }]);
    assert!(d_says(&mut home, commit()).contains(&to_d(HomeToDestination::Granted)));
}

#[test]
fn what_was_forked_since_the_lease_comes_along() {
    let mut home = Home::restore(T, M, S, Ledger::default());
    let claim = |pid| Claim {
        pid: Pid(pid),
        incarnation: Incarnation(0),
    };
    // S is the home here; 106 has ended before the freeze, 122 was forked since.
    s_says(&mut home, ID, lease(vec![claim(114), claim(106)]));
    let member = |pid| home.table().member(Pid(pid), vec![], vec![]);
    let members = vec![member(114), member(122)];
    assert!(d_says(&mut home, DestinationToHome::Commit { members }).contains(&to_d(HomeToDestination::Granted)));
    let at = |pid| home.table().whereabouts(Pid(pid));
    assert_eq!([at(114), at(122)], [Whereabouts::Known(Place::At(D)); 2]);
    assert_eq!(at(106), Whereabouts::Known(Place::At(S)));
}

#[test]
fn a_destination_that_lost_its_copy_is_told_what_that_means() {
    let mut home = leased();
    let actions = d_says(&mut home, DestinationToHome::Gone);
    assert!(actions.contains(&to_s(ID, aborted(raised()))));
    let noted = |committed| to_d(HomeToDestination::GoneNoted { committed });
    assert_eq!(actions.last(), Some(&noted(false)));

    let mut home = committed();
    assert_eq!(d_says(&mut home, DestinationToHome::Gone), [noted(true)]);
    assert_eq!(
        d_says(&mut home, DestinationToHome::Gone),
        [noted(true)],
        "until it has taken over"
    );
    let mut unknown = Home::restore(T, M, HERE, Ledger::default());
    assert_eq!(d_says(&mut unknown, DestinationToHome::Gone), [noted(false)]);
}

#[test]
fn everyone_is_reminded() {
    let mut home = leased();
    home.handle(home.next_timeout().unwrap(), HomeEvent::Tick);
    assert_eq!(drain(&mut home), [to_s(ID, HomeToSource::StillMoving)]);
    let mut home = committed();
    home.handle(home.next_timeout().unwrap(), HomeEvent::Tick);
    let actions = drain(&mut home);
    assert_eq!(actions[..2], [to_d(HomeToDestination::Granted), to_s(ID, COMMITTED)]);
    assert_eq!(actions.len(), 3);
}

#[test]
fn an_end_is_told_on_and_noted() {
    let mut home = committed();
    let incarnation = arrived().after_commit();
    let ending = Ending::Lost;
    let notice = Notice::Ended {
        pid: ROOT,
        incarnation,
        ending,
    };
    let noted = HomeAction::Send {
        to: D,
        msg: MoveMsg::Noted(notice),
    };
    let expected = [
        HomeAction::EndSurrogate(ROOT, ending),
        HomeAction::Release(vec![ROOT, Pid(113)]),
        HomeAction::Persist(vec![Durable::Row(Row::Grave(ROOT, incarnation))]),
        noted.clone(),
    ];
    assert_eq!(on(&mut home, HomeEvent::Ended(D, ROOT, incarnation, ending)), expected);
    assert_eq!(on(&mut home, HomeEvent::Ended(D, ROOT, incarnation, ending)), [noted]);
}

#[test]
fn another_home_takes_the_news_and_notes_it() {
    let mut home = Home::restore(T, M, X, Ledger::default());
    let changed = HomeToHome::EntriesChanged { entries: entries() };
    let actions = on(&mut home, HomeEvent::FromHome(HERE, ID, changed.clone()));
    let noted = HomeAction::Send {
        to: HERE,
        msg: MoveMsg::HomeToHome(ID, HomeToHome::EntriesNoted),
    };
    let expected = [
        HomeAction::Persist(vec![row(&home)]),
        HomeAction::Reserve(vec![Pid(108)]),
        noted.clone(),
    ];
    assert_eq!(actions, expected);
    assert_eq!(on(&mut home, HomeEvent::FromHome(HERE, ID, changed)), [noted]);
}

/// A ledger of all that was made durable, up to (and with) the `cut`-th thing of the last batch.
fn ledger(batches: &[Vec<Durable>], cut: usize) -> Ledger {
    let mut ledger = Ledger::default();
    for (i, batch) in batches.iter().enumerate() {
        let upto = if i + 1 == batches.len() { cut } else { batch.len() };
        batch[..upto].iter().cloned().for_each(|durable| ledger.apply(durable));
    }
    ledger
}

#[test]
fn a_decision_of_which_only_the_record_survived_is_whole() {
    let mut home = Home::restore(T, M, HERE, Ledger::default());
    let mut batches = Vec::new();
    let mut run = |home: &mut Home, event| {
        home.handle(T, event);
        for action in drain(home) {
            if let HomeAction::Persist(batch) = action {
                batches.push(batch);
            }
        }
        batches.clone()
    };
    run(&mut home, HomeEvent::Learn(vec![news()]));
    let at_lease = run(&mut home, HomeEvent::FromSource(S, ID, lease(claims())));
    let at_commit = run(&mut home, HomeEvent::FromDestination(D, ID, commit()));
    for (batches, place) in [
        (
            at_lease,
            Place::Moving {
                move_id: ID,
                from: S,
                to: D,
            },
        ),
        (at_commit, Place::At(D)),
    ] {
        let before = Home::restore(T, M, HERE, ledger(&batches, 0));
        assert_ne!(before.table().whereabouts(ROOT), Whereabouts::Known(place));
        for cut in 1..=batches.last().unwrap().len() {
            let restored = Home::restore(T, M, HERE, ledger(&batches, cut));
            assert_eq!(
                restored.table().whereabouts(ROOT),
                Whereabouts::Known(place),
                "cut at {cut}"
            );
        }
    }
}
