//! Whole clusters of pure machines under random faults, from one seed each.
//!
//! `world` is the cluster, `shared` its network and clock, `chaos` what goes on and goes wrong; `node` is one machine: what
//! survives there, the `programs`, and the daemon that drives the cluster's state machines (`driver`); `oracle` and `checks` are
//! the promises, looked at after every step that could break one. A failure prints its
//! seed; `DUNLIN_SEED=n cargo test -p dunlin-cluster --test simulation one_seed -- --nocapture` shows every step of it.
//! That the oracle bites is shown by `Mutation`: one rule of the protocol is broken in the driver, and some seed must tell.

mod chaos;
mod checks;
mod driver;
mod node;
mod oracle;
mod programs;
mod rng;
mod shared;
mod world;

use oracle::Mutation;
use world::{Census, World};

/// So many clusters are simulated in each run; `DUNLIN_SEEDS` in the environment makes it more.
const SEEDS: u64 = 1500;

/// Each mutation must be caught within so many seeds.
const MUTATION_SEEDS: u64 = 2000;

#[test]
fn never_two_never_none() {
    let mut sum = Census::default();
    let seeds = number("DUNLIN_SEEDS").unwrap_or(SEEDS);
    for seed in 0..seeds {
        match World::new(seed, Mutation::None).run() {
            Ok(census) => sum.add(&census),
            Err(violation) => panic!("DUNLIN_SEED={seed}: {violation}"),
        }
    }
    println!("{seeds} clusters: {sum:?}");
    // A simulation in which nothing happens proves nothing.
    assert!(sum.is_rich(), "too little happened: {sum:?}");
}

#[test]
fn without_faults_every_move_takes_place() {
    let mut sum = Census::default();
    for seed in 0..300 {
        match World::without_faults(seed).run() {
            Ok(census) => sum.add(&census),
            Err(violation) => panic!("without faults, seed {seed}: {violation}"),
        }
    }
    assert!(sum.committed > 1000, "too little happened: {sum:?}");
    assert_eq!((sum.lost, sum.failed_moves), (0, 0), "{sum:?}");
}

#[test]
fn one_seed() {
    let Some(seed) = number("DUNLIN_SEED") else {
        // Nothing asked for: the same seed twice must be the same story.
        let story = || World::new(7, Mutation::None).run().map_err(|v| v.to_string());
        assert_eq!(story(), story());
        return;
    };
    let result = World::new(seed, Mutation::None).telling().run();
    println!("{result:?}");
    assert!(result.is_ok());
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|s| s.parse().ok())
}

/// Some seed catches the mutation, with a violation that names it.
fn is_caught(mutation: Mutation, expected: &str) {
    for seed in 0..MUTATION_SEEDS {
        if let Err(violation) = World::new(seed, mutation).run() {
            println!("{mutation:?} is caught by seed {seed}: {violation}");
            assert!(violation.to_string().contains(expected), "seed {seed}: {violation}");
            return;
        }
    }
    panic!("{mutation:?} is not caught by {MUTATION_SEEDS} seeds");
}

#[test]
fn a_source_that_thaws_before_the_home_has_recorded_the_abort_is_caught() {
    is_caught(Mutation::ThawOnAsking, "thawed");
}

#[test]
fn a_destination_that_resumes_before_the_grant_is_caught() {
    is_caught(Mutation::ResumeOnAsking, "resumed");
}

#[test]
fn a_destination_that_destroys_while_it_asks_is_caught() {
    is_caught(Mutation::DestroyWhileAsking, "may run");
}

#[test]
fn a_source_that_makes_an_image_of_an_undecided_copy_is_caught() {
    is_caught(Mutation::ImageOnAsking, "may run");
}

#[test]
fn a_home_that_forgets_its_decisions_is_caught() {
    is_caught(Mutation::HomeForgetsDecisions, "");
}

#[test]
fn a_source_that_does_not_record_the_freeze_is_caught() {
    is_caught(Mutation::SourceKeepsNoRecord, "");
}

#[test]
fn a_destination_that_does_not_record_its_question_is_caught() {
    is_caught(Mutation::DestinationKeepsNoRecord, "");
}

#[test]
fn a_restarted_destination_that_takes_what_waits_for_running_is_caught() {
    is_caught(Mutation::WaitingIsTakenForRunning, "");
}

#[test]
fn a_restarted_destination_that_ends_what_waits_is_caught() {
    is_caught(Mutation::WaitingIsDestroyed, "may run");
}

#[test]
fn an_image_forgotten_at_the_resume_is_caught() {
    is_caught(Mutation::ForgetImageOnResume, "needs pages");
}

#[test]
fn ids_that_are_not_reserved_are_caught() {
    is_caught(Mutation::NothingReserved, "");
}
