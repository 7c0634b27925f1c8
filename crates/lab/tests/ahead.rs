//! Memory that is sent ahead of the freeze: whatever a program writes meanwhile, it never meets an old page.

mod support;

use dunlin_lab::harness::{NotMoved, Run, request};
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::{ExitStatus, MoveMode, MoveReport, MoveRequest};
use support::{Workshop, lives, spec_in};

/// `writer.c` writes, drops, grows and maps all the time, and holds its memory against a model.
fn writer(name: &str, megabytes: &str) -> (Lab, Workshop, Run) {
    let workshop = Workshop::new(name);
    let binary = workshop.compile("writer.c");
    let lab = Lab::up(name, &Options::default());
    let stop = workshop.path("stop");
    let argv = [binary.to_str().unwrap(), stop.to_str().unwrap(), megabytes];
    let run = lab.node("n1").run_as(spec_in(&workshop.subdir("cwd"), &argv));
    run.until_says("ready\n");
    (lab, workshop, run)
}

#[track_caller]
fn moves(lab: &Lab, run: &Run, to: &str, mode: MoveMode, verify: bool) -> MoveReport {
    let asked = MoveRequest {
        mode,
        verify,
        ..request(run.pid, to)
    };
    let mut reports = support::moved(lab, &asked).unwrap_or_else(|e| panic!("{mode:?} to {to}: {e:#?}"));
    lives(run);
    reports.remove(0)
}

#[track_caller]
fn ends_well(workshop: &Workshop, run: Run) {
    workshop.file("stop", "");
    let ended = run.wait();
    assert_eq!(ended.status, ExitStatus::Code(0), "{} {}", ended.stdout, ended.stderr);
}

#[test]
fn what_is_written_while_it_is_sent_ahead_is_never_stale() {
    let (lab, workshop, run) = writer("ahead", "64");
    use MoveMode::{Demand, Hybrid, Precopy};
    for (to, mode) in [
        ("n2", Precopy),
        ("n3", Hybrid),
        ("n1", Precopy),
        ("n2", Demand),
        ("n1", Hybrid),
    ] {
        let report = moves(&lab, &run, to, mode, true);
        assert!(report.verified_pages.is_some_and(|n| n > 0), "{report:#?}");
        assert_eq!(report.mode, mode);
    }
    for (to, mode) in [("n2", Hybrid), ("n3", Precopy), ("n1", Hybrid)] {
        moves(&lab, &run, to, mode, false);
    }
    ends_well(&workshop, run);
}

#[test]
fn a_program_that_waits_for_nothing_after_a_precopy() {
    let (lab, workshop, run) = writer("ahead-all", "32");
    let report = moves(&lab, &run, "n2", MoveMode::Precopy, false);
    assert_eq!(report.pages_faulted, 0, "{report:#?}");
    ends_well(&workshop, run);
}

/// The destination's daemon dies while memory is sent there: the program runs on where it was, and moves when it can.
#[test]
fn a_destination_lost_while_memory_is_sent_ahead_leaves_it_at_the_source() {
    let (lab, workshop, run) = writer("ahead-lost", "256");
    for (mib, mode) in [(8, MoveMode::Precopy), (48, MoveMode::Hybrid)] {
        let asked = MoveRequest {
            mode,
            ..request(run.pid, "n2")
        };
        let before = lab.received_bytes("n2");
        let outcome = std::thread::scope(|scope| {
            let moving = scope.spawn(|| lab.move_as(asked));
            // Any part of it will do that is not all.
            lab.until_received("n2", before + (mib << 20));
            lab.signal_daemon("n2", 9);
            moving.join().unwrap()
        });
        lab.start_daemon("n2");
        assert!(matches!(outcome, Err(NotMoved::Failed(_))), "{outcome:#?}");
        lives(&run);
        moves(&lab, &run, "n3", mode, true);
        moves(&lab, &run, "n1", mode, false);
    }
    ends_well(&workshop, run);
}
