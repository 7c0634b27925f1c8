//! Two nodes, one arbiter, and the port that both would like.

use super::*;
use dunlin_proto::endpoint::{Family, Proto};

const ONE: Slot = Slot(1);
const TWO: Slot = Slot(2);

fn http() -> Endpoint {
    Endpoint::port(Proto::Tcp, Family::V4, 80)
}

fn bound() -> BTreeSet<Endpoint> {
    [http()].into()
}

fn nothing() -> BTreeSet<Endpoint> {
    BTreeSet::new()
}

#[test]
fn the_first_to_claim_a_port_has_it_until_it_lets_go() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    assert_eq!(arbiter.claim(ONE, &[http()], now), Verdict::Granted);
    assert_eq!(arbiter.claim(TWO, &[http()], now), Verdict::Taken(ONE));
    assert_eq!(
        arbiter.claim(ONE, &[http()], now),
        Verdict::Granted,
        "to listen on what it has bound"
    );
    arbiter.truth(ONE, &bound(), now);
    assert_eq!(arbiter.claim(TWO, &[http()], now), Verdict::Taken(ONE));
    arbiter.truth(ONE, &nothing(), now);
    assert_eq!(arbiter.claim(TWO, &[http()], now), Verdict::Granted);
    assert_eq!(arbiter.holder(&http()), Some(TWO));
}

#[test]
fn of_a_socket_of_both_families_no_half_is_claimed() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    let six = Endpoint::port(Proto::Tcp, Family::V6, 80);
    arbiter.claim(ONE, &[six], now);
    assert_eq!(arbiter.claim(TWO, &[http(), six], now), Verdict::Taken(ONE));
    assert_eq!(arbiter.holder(&http()), None);
}

#[test]
fn a_claim_stands_while_the_call_may_be_under_way() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], now);
    arbiter.truth(ONE, &nothing(), now + CLAIM_STANDS / 2);
    assert_eq!(arbiter.claim(TWO, &[http()], now), Verdict::Taken(ONE));
    arbiter.truth(ONE, &nothing(), now + CLAIM_STANDS);
    assert_eq!(arbiter.holder(&http()), None, "the bind it was made for has failed");
}

#[test]
fn a_report_from_before_a_claim_takes_nothing_away() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], now);
    arbiter.truth(ONE, &bound(), now);
    let again = now + 2 * CLAIM_STANDS;
    arbiter.claim(ONE, &[http()], again);
    arbiter.truth(ONE, &nothing(), now + CLAIM_STANDS);
    assert_eq!(arbiter.holder(&http()), Some(ONE), "it was closed, and is bound again");
}

#[test]
fn an_arbiter_without_memory_learns_from_reports() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.truth(TWO, &bound(), now);
    assert_eq!(arbiter.claim(ONE, &[http()], now), Verdict::Taken(TWO));
}

#[test]
fn a_port_that_moves_is_on_both_nodes_for_a_moment_and_never_free() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.truth(ONE, &bound(), now);
    arbiter.truth(TWO, &bound(), now);
    assert_eq!(arbiter.contested().next(), Some((http(), ONE, &[TWO].into())));
    arbiter.truth(ONE, &nothing(), now);
    assert_eq!(arbiter.holder(&http()), Some(TWO));
    assert_eq!(arbiter.contested().count(), 0);
    arbiter.truth(ONE, &bound(), now);
    arbiter.truth(ONE, &nothing(), now);
    assert_eq!(
        arbiter.contested().count(),
        0,
        "who lets go of what it does not hold changes nothing"
    );
    assert_eq!(arbiter.holder(&http()), Some(TWO));
}

#[test]
fn a_lost_node_holds_nothing() {
    let (mut arbiter, now) = (Arbiter::default(), Instant::now());
    arbiter.claim(ONE, &[http()], now);
    arbiter.lost(ONE);
    assert_eq!(arbiter.claim(TWO, &[http()], now), Verdict::Granted);
}
