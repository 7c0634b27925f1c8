//! The nest on the real kernel, as root: `cargo test -p dunlin-node --test nest [NAME…]`.
//!
//! This executable is also `dunlin init` for the nests it makes, so it has its own main function; it understands as much
//! of the usual test arguments as `cargo test` and `cargo nextest` use.

mod daemon;
mod fixture;
mod forks;
mod programs;
#[path = "../runner/mod.rs"]
mod runner;
mod surrogates;

use runner::Test;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    if args.first().is_some_and(|a| a == "init") {
        return dunlin_node::init::main(args.split_off(1));
    }
    let args: Vec<String> = args.into_iter().filter_map(|a| a.into_string().ok()).collect();
    if args.first().is_some_and(|a| a == "threads") {
        return forks::threads_role();
    }
    // `… run CMD…`: a program in a nest of its own, for measurements by hand.
    if args.first().is_some_and(|a| a == "run") {
        let argv: Vec<&str> = args[1..].iter().map(String::as_str).collect();
        let (output, status) = fixture::Fixture::new().run(&argv);
        print!("{output}");
        return if status == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    let tests: Vec<Test> = [programs::TESTS, forks::TESTS, daemon::TESTS, surrogates::TESTS].concat();
    runner::run(&tests, &args)
}
