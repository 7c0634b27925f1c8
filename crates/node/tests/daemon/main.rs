//! Whole daemons on the real kernel, as root: `cargo test -p dunlin-node --test daemon [NAME…]`.
//!
//! This executable is also `dunlin init` and `dunlin node` for the nodes it makes, and a caller of another user, so it has
//! its own main function; it understands as much of the usual test arguments as `cargo test` and `cargo nextest` use.

mod cluster;
mod fixture;
mod life;
#[path = "../runner/mod.rs"]
mod runner;
mod moves;
mod runs;

use runner::Test;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|a| a == "init") {
        return dunlin_node::init::main(args.split_off(1));
    }
    let args: Vec<String> = args.into_iter().filter_map(|a| a.into_string().ok()).collect();
    match args.first().map(String::as_str) {
        Some("node") => return fixture::node_role(&args[1]),
        Some("ask") => return fixture::ask_role(&args[1..]),
        _ => {}
    }
    let tests: Vec<Test> = [runs::TESTS, life::TESTS, cluster::TESTS].concat();
    runner::run(&tests, &args)
    let tests: Vec<Test> = [runs::TESTS, life::TESTS, cluster::TESTS, moves::TESTS].concat();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    if has("--list") {
        if !has("--ignored") {
            tests.iter().for_each(|(name, _)| println!("{name}: test"));
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen = |name: &str, filter: &str| {
        if has("--exact") {
            name == filter
        } else {
            name.contains(filter)
        }
    };
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| chosen(name, f));
    let (mut failed, mut ran) = (0, 0);
    for (name, test) in tests.into_iter().filter(|(name, _)| wanted(name)) {
        ran += 1;
        let ok = catch_unwind(test).is_ok();
        failed += usize::from(!ok);
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
    }
    println!("\ntest result: {ran} run, {failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
