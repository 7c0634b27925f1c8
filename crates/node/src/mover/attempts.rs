//! A move is attempted again when what was in its way may be there for a moment only.
//!
//! A program goes on while it is looked at: it closes the journal that was about to be looked for on the other node, a
//! child of a tree ends, another one is forked. Owns the decision whether to ask again; refuses to know how a move is
//! made. Those of a tree that comes and goes faster than it can be looked at are told to hold it still (see
//! [`super::still`]) after [`RUNNING`] attempts. Invariants: what stays in the way is told after [`SAME`] attempts, what goes away by its nature ([`READING`]) after
//! [`LONGEST`]; nothing is asked again after that; a node that does not answer is not asked again.

use super::Mover;
use super::outgoing::{MoveOutcome, Outgoing, Report, failure};
use crate::obstacle::READING;
use dunlin_proto::control::{FailureKind, MoveMode, MoveRequest};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// After so many attempts in a row with the same outcome it is believed.
const SAME: u32 = 6;
/// How long attempts may go on.
const LONGEST: Duration = Duration::from_secs(2);
/// So many attempts look at a tree that runs.
const RUNNING: u32 = 2;
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

impl Mover {
    /// Starts a move of a process that is here. The receiver gets the progress and, last, the outcome.
    pub fn move_out(&self, request: MoveRequest) -> std::io::Result<Receiver<Report>> {
        let (sender, receiver) = channel();
        let mover = self.arc();
        let name = format!("moves-{}", request.pid);
        std::thread::Builder::new().name(name).spawn(move || {
            let mut attempts = Attempts::new();
            loop {
                // Each on a thread of its own: what it still traces at its end, the kernel lets go.
                let attempt = std::thread::scope(|scope| {
                    let (mover, request) = (mover.clone(), request.clone());
                    let name = format!("move-{}", request.pid);
                    let thread = std::thread::Builder::new().name(name);
                    let (still, sender) = (attempts.hold_still(&request), &sender);
                    let attempt = thread.spawn_scoped(scope, move || Outgoing::run(mover, request, still, sender));
                    attempt.map(|attempt| attempt.join())
                });
                let outcome = match attempt {
                    Ok(Ok(Ok(()))) => return,
                    Ok(Ok(Err(outcome))) => outcome,
                    Ok(Err(_)) | Err(_) => {
                        let message = format!(
                            "the move of process {} did not end well: see the daemon's log",
                            request.pid
                        );
                        MoveOutcome::Failed(failure(FailureKind::Other, message, None))
                    }
                };
                let Some(pause) = attempts.next(&outcome) else {
                    let _ = sender.send(Report::Outcome(outcome));
                    return;
                };
                tracing::debug!(pid = %request.pid, ?outcome, "a move is attempted again");
                std::thread::sleep(pause);
            }
        })?;
        Ok(receiver)
    }
}

/// The attempts at one move so far.
pub(super) struct Attempts {
    started: Instant,
    pause: Duration,
    last: String,
    same: u32,
    made: u32,
}

impl Attempts {
    pub(super) fn new() -> Attempts {
        Attempts {
            started: Instant::now(),
            pause: FIRST_PAUSE,
            last: String::new(),
            same: 0,
            made: 0,
        }
    }

    /// Whether the next attempt is to stop the processes before it looks at them.
    pub(super) fn hold_still(&self, request: &MoveRequest) -> bool {
        request.tree && request.mode == MoveMode::Demand && self.made >= RUNNING
    }

    /// How long to wait before the next attempt; `None` if this outcome is the move's.
    pub(super) fn next(&mut self, outcome: &MoveOutcome) -> Option<Duration> {
        self.made += 1;
        let words = match outcome {
            MoveOutcome::Moved(_) => return None,
            MoveOutcome::Failed(failure) if failure.kind != FailureKind::MoveFailed => return None,
            MoveOutcome::Failed(failure) => failure.message.clone(),
            MoveOutcome::Refused(obstacles) => format!("{obstacles:?}"),
        };
        let stays = words == self.last && !words.contains(READING);
        self.same = if stays { self.same + 1 } else { 1 };
        self.last = words;
        if self.same >= SAME || self.started.elapsed() > LONGEST {
            return None;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_proto::control::Failure;

    fn failed(kind: FailureKind, message: &str) -> MoveOutcome {
        MoveOutcome::Failed(Failure {
            kind,
            message: message.into(),
            hint: None,
        })
    }

    #[test]
    fn what_stays_in_the_way_is_believed_and_what_changes_is_not() {
        let mut attempts = Attempts::new();
        let (one, other) = (
            failed(FailureKind::MoveFailed, "a"),
            failed(FailureKind::MoveFailed, "b"),
        );
        for _ in 1..SAME {
            assert!(attempts.next(&one).is_some());
        }
        assert!(attempts.next(&other).is_some());
        for _ in 1..SAME {
            assert!(attempts.next(&one).is_some());
        }
        assert_eq!(attempts.next(&one), None);
    }

    #[test]
    fn a_tree_that_has_changed_twice_is_held_still() {
        let request = |tree, mode| MoveRequest {
            pid: dunlin_proto::ids::Pid(129),
            to: "n2".into(),
            tree,
            mode,
            wait: dunlin_proto::control::WaitFor::Resumed,
            verify: false,
        };
        let mut attempts = Attempts::new();
        for n in 0..RUNNING {
            assert!(!attempts.hold_still(&request(true, MoveMode::Demand)));
            attempts.next(&failed(FailureKind::MoveFailed, &n.to_string()));
        }
        assert!(attempts.hold_still(&request(true, MoveMode::Demand)));
        assert!(!attempts.hold_still(&request(false, MoveMode::Demand)));
        // What goes ahead can only be sent of a program that runs.
        assert!(!attempts.hold_still(&request(true, MoveMode::Precopy)));
    }

    #[test]
    fn a_reader_is_waited_for() {
        let mut attempts = Attempts::new();
        let reading = failed(FailureKind::MoveFailed, READING);
        for _ in 0..2 * SAME {
            assert!(attempts.next(&reading).is_some());
        }
    }

    #[test]
    fn an_answer_and_a_silence_are_final() {
        let mut attempts = Attempts::new();
        assert_eq!(attempts.next(&MoveOutcome::Moved(Vec::new())), None);
        for kind in [FailureKind::Unreachable, FailureKind::NoProcess, FailureKind::Invalid] {
            assert_eq!(attempts.next(&failed(kind, "a")), None);
        }
    }
}
