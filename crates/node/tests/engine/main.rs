//! The engine, without a daemon around it: real programs move between nests of one machine.

mod rig;
#[path = "../runner/mod.rs"]
mod runner;

use dunlin_proto::control::WaitFor;
use rig::Rig;
use std::time::{Duration, Instant};

const TESTS: &[runner::Test] = &[("a_counter_moves_round", a_counter_moves_round)];

fn main() -> std::process::ExitCode {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|a| a == "init") {
        return dunlin_node::init::main(args.split_off(1));
    }
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let args: Vec<String> = args.into_iter().filter_map(|a| a.into_string().ok()).collect();
    runner::run(TESTS, &args)
}

/// Waits for an event, not for a time.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn a_counter_moves_round() {
    let rig = Rig::up(3);
    let output = rig.work.join("out");
    let script = "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); [ $((i%1000)) = 0 ] && echo $i; done; echo done; exit 7";
    let pid = rig.node("n1").spawn(&["/bin/sh", "-c", script], &output);
    let text = || std::fs::read_to_string(&output).unwrap_or_default();
    until("output", || text().lines().count() > 3);
    let mut from = "n1";
    for to in ["n2", "n3", "n1", "n2", "n1"] {
        let before = text().lines().count();
        match rig.node(from).move_out(pid, to, WaitFor::Drained, true) {
            Ok(reports) => println!("{from} → {to}: {:?}", reports[0]),
            Err(why) => panic!("{from} → {to}: {why}"),
        }
        if !text().contains("done") {
            until("more output", || {
                text().lines().count() > before || text().contains("done")
            });
        }
        from = to;
    }
    until("the end", || text().contains("done"));
    let expected: Vec<String> = (1..=400)
        .map(|i| (i * 1000).to_string())
        .chain(["done".into()])
        .collect();
    assert_eq!(text().lines().collect::<Vec<_>>(), expected);
}
