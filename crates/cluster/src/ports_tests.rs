//! Two nodes, one arbiter, and the port that both would like.

use super::*;
use dunlin_proto::endpoint::{Family, Proto};

const ONE: Slot = Slot(1);
const TWO: Slot = Slot(2);

fn http() -> Endpoint {
    Endpoint::port(Proto::Tcp, Family::V4, 80)
}

fn holding(node: Slot, open: bool) -> Holding {
    Holding { node, open }
}

fn bound(open: bool) -> BTreeMap<Endpoint, bool> {
    BTreeMap::from([(http(), open)])
}

fn nothing() -> BTreeMap<Endpoint, bool> {
    BTreeMap::new()
}

#[test]
fn the_first_to_claim_a_port_has_it_until_it_lets_go() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    assert_eq!(arbiter.claim(ONE, &[http()], false, now), Verdict::Granted);
    assert_eq!(arbiter.claim(TWO, &[http()], true, now), Verdict::Taken(ONE));
    arbiter.release(TWO, http());
    assert_eq!(arbiter.claim(TWO, &[http()], true, now), Verdict::Taken(ONE));
    arbiter.release(ONE, http());
    assert_eq!(arbiter.claim(TWO, &[http()], true, now), Verdict::Granted);
    assert_eq!(arbiter.table(), BTreeMap::from([(http(), holding(TWO, true))]));
}

#[test]
fn of_a_socket_of_both_families_no_half_is_claimed() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    let six = Endpoint::port(Proto::Tcp, Family::V6, 80);
    arbiter.claim(ONE, &[six], true, now);
    assert_eq!(arbiter.claim(TWO, &[http(), six], true, now), Verdict::Taken(ONE));
    assert_eq!(arbiter.table().len(), 1);
}

#[test]
fn to_listen_on_what_was_bound_opens_it() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], false, now);
    let version = arbiter.version();
    arbiter.claim(ONE, &[http()], true, now);
    assert!(arbiter.version() > version);
    assert_eq!(arbiter.table()[&http()], holding(ONE, true));
    let version = arbiter.version();
    arbiter.claim(ONE, &[http()], true, now);
    assert_eq!(arbiter.version(), version, "nothing has changed");
}

#[test]
fn a_claim_stands_while_the_call_may_be_under_way() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], true, now);
    arbiter.truth(ONE, &nothing(), now + CLAIM_STANDS / 2);
    assert_eq!(arbiter.claim(TWO, &[http()], true, now), Verdict::Taken(ONE));
    arbiter.truth(ONE, &nothing(), now + CLAIM_STANDS);
    assert!(arbiter.table().is_empty(), "the bind it was made for has failed");
}

#[test]
fn a_report_from_before_a_claim_or_a_move_takes_nothing_away() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], true, now);
    arbiter.truth(ONE, &bound(true), now + CLAIM_STANDS);
    let moved = now + 2 * CLAIM_STANDS;
    arbiter.moved(ONE, http(), TWO, moved);
    arbiter.truth(TWO, &nothing(), moved - CLAIM_STANDS);
    assert_eq!(arbiter.table()[&http()].node, TWO);
    arbiter.truth(ONE, &bound(true), moved - CLAIM_STANDS);
    assert_eq!(
        arbiter.table()[&http()].node,
        TWO,
        "the copy that stays for a moment contests nothing for good"
    );
    arbiter.truth(ONE, &nothing(), moved + CLAIM_STANDS);
    arbiter.truth(TWO, &bound(true), moved + CLAIM_STANDS);
    assert_eq!(arbiter.table()[&http()], holding(TWO, true));
    assert_eq!(arbiter.contested().count(), 0);
}

#[test]
fn closed_ports_are_seen_to_be_closed() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], true, now);
    arbiter.truth(ONE, &bound(true), now + CLAIM_STANDS);
    arbiter.truth(ONE, &bound(false), now + CLAIM_STANDS);
    assert_eq!(arbiter.table()[&http()], holding(ONE, false), "it stopped listening");
    arbiter.truth(ONE, &nothing(), now + 2 * CLAIM_STANDS);
    assert!(arbiter.table().is_empty());
}

#[test]
fn an_arbiter_without_memory_learns_from_reports() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.truth(TWO, &bound(true), now);
    assert_eq!(arbiter.claim(ONE, &[http()], true, now), Verdict::Taken(TWO));
}

#[test]
fn words_about_a_move_that_come_in_the_wrong_order_are_made_up_for_by_reports() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    let three = Slot(3);
    arbiter.claim(ONE, &[http()], true, now);
    arbiter.truth(ONE, &bound(true), now);
    arbiter.moved(TWO, http(), three, now);
    assert_eq!(arbiter.table()[&http()].node, ONE);
    arbiter.moved(ONE, http(), TWO, now);
    let later = now + CLAIM_STANDS;
    arbiter.truth(three, &bound(true), later);
    assert_eq!(arbiter.contested().count(), 1);
    arbiter.truth(TWO, &nothing(), later);
    assert_eq!(arbiter.table()[&http()], holding(three, true));
    assert_eq!(arbiter.contested().count(), 0);
}

#[test]
fn a_lost_node_holds_nothing() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], true, now);
    arbiter.lost(ONE);
    assert_eq!(arbiter.claim(TWO, &[http()], true, now), Verdict::Granted);
}

#[test]
fn a_copy_follows_and_never_goes_back() {
    let mut copy = Copy::default();
    let first = BTreeMap::from([(http(), holding(ONE, true))]);
    let changes = copy.update(1, first.clone(), false);
    assert_eq!(changes.set, [(http(), holding(ONE, true))]);
    let second = BTreeMap::from([(http(), holding(TWO, true))]);
    assert_eq!(copy.update(2, second, false).set, [(http(), holding(TWO, true))]);
    assert_eq!(copy.update(1, first, false), Changes::default());
    assert_eq!(copy.table()[&http()].node, TWO);
    assert_eq!(copy.update(3, BTreeMap::new(), false).cleared, [http()]);
    let anew = BTreeMap::from([(http(), holding(ONE, false))]);
    assert_eq!(copy.update(1, anew, true).set, [(http(), holding(ONE, false))]);
}
