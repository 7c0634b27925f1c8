//! The steps of a freeze, and how long each took: what `dunlin move --json` shows as `phases_us`.
//!
//! Owns a clock for each OS thread, because a move has one at its source and one at its destination. Refuses to know what a
//! step is. Invariants: the steps of one side leave no time out between [`begin`] and [`take`]; a mark takes no lock, and no
//! memory that [`begin`] has not set aside.

use dunlin_proto::control::{Side, Step};
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// So many kinds of steps have room.
const ROOM: usize = 64;

struct Clock {
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

thread_local! {
    static CLOCK: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// Starts this thread's clock at a moment that has just passed, if it does not run yet.
pub fn begin(at: Instant) {
    if CLOCK.with_borrow(Option::is_some) {
        return;
    }
    let clock = Clock {
        last: at,
        steps: Vec::with_capacity(ROOM),
    };
    CLOCK.with_borrow_mut(|own| *own = Some(clock));
}

/// Whatever was done since the last mark was this. What comes again is added.
pub fn mark(step: &'static str) {
    CLOCK.with_borrow_mut(|clock| {
        let Some(clock) = clock else { return };
        let now = Instant::now();
        let took = now - std::mem::replace(&mut clock.last, now);
        let has_room = clock.steps.len() < ROOM;
        match clock.steps.iter_mut().find(|(name, _)| *name == step) {
            Some((_, so_far)) => *so_far += took,
            None if has_room => clock.steps.push((step, took)),
            None => {}
        }
    });
}

/// Stops the clock: all steps, in the order in which they came first.
pub fn take(side: Side) -> Vec<Step> {
    let clock = CLOCK.with_borrow_mut(Option::take);
    let steps = clock.map_or(Vec::new(), |clock| clock.steps);
    let step = |(name, took): (&'static str, Duration)| Step {
        side,
        name: name.to_owned(),
        us: took.as_nanos() as f64 / 1e3,
    };
    steps.into_iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_left_out_and_what_comes_again_is_added() {
        let began = Instant::now();
        begin(began);
        ["one", "two", "one"].into_iter().for_each(mark);
        let steps = take(Side::Source);
        let until = began.elapsed();
        let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, ["one", "two"]);
        let sum: f64 = steps.iter().map(|step| step.us).sum();
        assert!(sum > 0.0 && sum <= until.as_nanos() as f64 / 1e3);
        mark("nobody asked");
        assert!(take(Side::Source).is_empty());
    }
}
