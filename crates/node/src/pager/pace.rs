//! How much of the bulk is handled at once while a program faults.
//!
//! Between two steps of the bulk the pager looks for faults. A program that works between its faults gets small steps:
//! it waits for half a step on average. One that faults again as soon as it runs is helped by bandwidth, not by latency:
//! steps grow until the bulk has most of the time. Refuses to know what a step is made of.

use std::time::{Duration, Instant};

/// The smallest and the largest step, in pages.
const STEP_PAGES: (u32, u32) = (8, 64);
/// A program that has not faulted for so long is not waited for.
const CALM: Duration = Duration::from_millis(2);

/// The size of the steps of one family.
#[derive(Debug)]
pub(super) struct Pace {
    step_pages: u32,
    last_fault: Option<Instant>,
    /// How many steps were done since a fault was answered.
    steps: u32,
}

impl Pace {
    pub(super) fn new() -> Pace {
        Pace {
            step_pages: STEP_PAGES.1,
            last_fault: None,
            steps: 0,
        }
    }

    /// A thread waits for a page.
    pub(super) fn fault(&mut self, now: Instant) {
        let calm = self.last_fault.is_none_or(|at| now.duration_since(at) > CALM);
        self.step_pages = if self.steps > 1 || calm {
            STEP_PAGES.0
        } else {
            (self.step_pages * 2).min(STEP_PAGES.1)
        };
        self.last_fault = Some(now);
        self.steps = 0;
    }

    /// A step has been done.
    pub(super) fn stepped(&mut self) {
        self.steps = self.steps.saturating_add(1);
    }

    /// Has the program faulted lately?
    pub(super) fn is_pressed(&self, now: Instant) -> bool {
        self.last_fault.is_some_and(|at| now.duration_since(at) <= CALM)
    }

    /// How many pages to handle before faults are looked at again.
    pub(super) fn step_pages(&self, now: Instant) -> u32 {
        if self.is_pressed(now) {
            self.step_pages
        } else {
            STEP_PAGES.1
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_small_for_who_works_between_faults_and_grow_for_who_does_not() {
        let (mut pace, start) = (Pace::new(), Instant::now());
        let at = |us| start + Duration::from_micros(us);
        assert_eq!(pace.step_pages(at(0)), 64);
        pace.fault(at(10));
        assert_eq!(pace.step_pages(at(20)), 8);
        for us in [30, 60, 90] {
            pace.stepped();
            pace.stepped();
            pace.fault(at(us));
            assert_eq!(pace.step_pages(at(us)), 8, "it has worked while two steps were done");
        }
        for (us, pages) in [(100, 16), (110, 32), (120, 64), (130, 64)] {
            pace.stepped();
            pace.fault(at(us));
            assert_eq!(pace.step_pages(at(us)), pages, "it faults at once");
        }
        assert_eq!(pace.step_pages(at(5000)), 64, "it is calm");
        pace.fault(at(6000));
        assert_eq!(pace.step_pages(at(6000)), 8);
    }
}
