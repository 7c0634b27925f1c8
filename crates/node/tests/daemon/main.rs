//! Whole daemons on the real kernel, as root: `cargo test -p dunlin-node --test daemon [NAME…]`.
//!
//! This executable is also `dunlin init` and `dunlin node` for the nodes it makes, and a caller of another user, so it has
//! its own main function; it understands as much of the usual test arguments as `cargo test` and `cargo nextest` use.

mod cluster;
mod fixture;
mod life;
mod moves;
#[path = "../runner/mod.rs"]
mod runner;
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
    let tests: Vec<Test> = [runs::TESTS, life::TESTS, cluster::TESTS, moves::TESTS].concat();
    runner::run(&tests, &args)
}
