//! Programs that check themselves, moved round a lab while they run: each looks at one family of promises, all the
//! time, and says "ok" or the first difference. The programs and what each covers: `programs/*.c`.

mod support;

use dunlin_lab::harness::{Ended, Run};
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::ExitStatus;
use dunlin_proto::ids::Pid;
use support::{Workshop, journey, lives, spec_in};

/// A program under test in its lab.
struct Traveller {
    lab: Lab,
    workshop: Workshop,
    run: Run,
}

impl Traveller {
    #[track_caller]
    fn start(name: &str, arguments: &[&str]) -> Traveller {
        let workshop = Workshop::new(name);
        let binary = workshop.compile(&format!("{name}.c"));
        let lab = Lab::up(name, &Options::default());
        let stop = workshop.path("stop");
        let mut argv = vec![binary.to_str().unwrap(), stop.to_str().unwrap()];
        argv.extend(arguments);
        let run = lab.node("n1").run_as(spec_in(&workshop.subdir("cwd"), &argv));
        run.until_says("ready\n");
        Traveller { lab, workshop, run }
    }

    /// Lets it end: all that it found must have been as it should.
    #[track_caller]
    fn end(self) {
        self.workshop.file("stop", "");
        let Ended { status, stdout, stderr } = self.run.wait();
        let said: Vec<&str> = stdout.lines().filter(|l| !l.starts_with("round ")).collect();
        assert_eq!(status, ExitStatus::Code(0), "it said {said:?} {stderr}");
        assert!(said.last().is_some_and(|l| l.starts_with("ok ")), "it said {said:?}");
    }

    /// The PIDs that it printed as `child PID`.
    fn children(&self) -> Vec<Pid> {
        let said = self.run.stdout();
        let numbers = said.lines().filter_map(|l| l.strip_prefix("child "));
        numbers.map(|n| Pid(n.parse().unwrap())).collect()
    }
}

/// Tells what a program said, of a test that fails.
struct Said<'a>(&'a Run);

impl Drop for Said<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.0.stdout();
            let said: Vec<&str> = said.lines().filter(|l| !l.starts_with("round ")).collect();
            eprintln!("it said {said:?}");
        }
    }
}

/// The whole journey, then once more with source and destination compared in full.
#[track_caller]
fn travels(name: &str, arguments: &[&str]) {
    let traveller = Traveller::start(name, arguments);
    let said = Said(&traveller.run);
    journey(&traveller.lab, traveller.run.pid, false, || lives(&traveller.run));
    let report = support::verified(&traveller.lab, traveller.run.pid, "n3");
    assert!(report.verified_pages.is_some_and(|n| n > 0), "{report:#?}");
    lives(&traveller.run);
    drop(said);
    traveller.end();
}

#[test]
fn signals_stay_pending_masked_and_handled() {
    travels("signals", &[]);
}

#[test]
fn timers_keep_their_numbers_however_high() {
    travels("numbers", &[]);
}

#[test]
fn timers_tick_and_sleeps_are_neither_cut_nor_lengthened() {
    // Not compared in full at the end: that takes long, and the kernel's select(2) counts no time while it is frozen.
    let traveller = Traveller::start("timers", &[]);
    journey(&traveller.lab, traveller.run.pid, false, || lives(&traveller.run));
    traveller.end();
}

#[test]
fn registers_hold_what_they_held() {
    travels("xstate", &[]);
}

#[test]
fn threads_keep_their_locks_names_and_storage() {
    travels("threads", &[]);
}

#[test]
fn blocked_calls_stay_blocked() {
    travels("blocked", &["without-child"]);
}

#[test]
fn an_address_space_matches_its_model_while_pages_are_away() {
    travels("memory", &["128"]);
}

#[test]
fn an_address_space_matches_its_model_from_another_seed() {
    travels("memory", &["32", "20260707"]);
}

#[test]
fn descriptors_keep_offsets_flags_and_deleted_files() {
    travels("files", &[]);
}

#[test]
fn numbers_that_are_another_file_at_every_moment_are_the_right_one() {
    travels("reopen", &[]);
}

#[test]
fn event_loops_lose_nothing() {
    travels("waits", &[]);
}

#[test]
fn socket_pairs_keep_what_is_on_its_way() {
    travels("pairs", &[]);
}

#[test]
fn blocking_writes_are_never_cut_short() {
    travels("sends", &[]);
}

#[test]
fn a_tree_keeps_its_socket_pairs() {
    let traveller = Traveller::start("pairs", &["tree"]);
    journey(&traveller.lab, traveller.run.pid, true, || lives(&traveller.run));
    traveller.end();
}

#[test]
fn limits_names_and_scheduling_come_along() {
    travels("attributes", &[]);
}

#[test]
fn an_ordinary_user_gains_nothing() {
    travels("credentials", &["nobody"]);
}

#[test]
fn kept_capabilities_are_kept_and_no_others() {
    travels("credentials", &["caps"]);
}

#[test]
fn a_program_under_its_own_filter_stays_under_it() {
    travels("credentials", &["seccomp"]);
}

#[test]
fn a_parent_at_home_waits_for_stops_and_kills_its_moved_children() {
    let traveller = Traveller::start("family", &[]);
    let children = traveller.children();
    assert_eq!(children.len(), 4);
    for child in children {
        journey(&traveller.lab, child, false, || lives(&traveller.run));
    }
    traveller.end();
}

#[test]
fn a_moved_parent_waits_for_the_children_it_left_behind() {
    let traveller = Traveller::start("family", &[]);
    journey(&traveller.lab, traveller.run.pid, false, || lives(&traveller.run));
    traveller.end();
}

#[test]
fn parent_and_children_go_different_ways() {
    let traveller = Traveller::start("family", &[]);
    let children = traveller.children();
    for (process, node) in [
        (children[0], "n2"),
        (traveller.run.pid, "n3"),
        (children[1], "n3"),
        (children[0], "n3"),
        (traveller.run.pid, "n2"),
        (children[2], "n2"),
        (children[0], "n1"),
        (traveller.run.pid, "n1"),
    ] {
        traveller.lab.move_process(process, node);
        lives(&traveller.run);
    }
    traveller.end();
}

#[test]
fn a_family_moves_as_a_tree() {
    let traveller = Traveller::start("family", &[]);
    journey(&traveller.lab, traveller.run.pid, true, || lives(&traveller.run));
    traveller.end();
}

#[test]
fn a_tree_keeps_the_file_offset_that_it_shares() {
    let traveller = Traveller::start("files", &["shared"]);
    journey(&traveller.lab, traveller.run.pid, true, || lives(&traveller.run));
    traveller.end();
}

#[test]
fn a_tree_keeps_its_pipes_and_the_child_it_waits_for() {
    let traveller = Traveller::start("blocked", &[]);
    journey(&traveller.lab, traveller.run.pid, true, || lives(&traveller.run));
    traveller.end();
}
