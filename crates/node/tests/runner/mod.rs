//! A test runner for executables that are also roles of dunlin: as much of the usual arguments as `cargo test` and
//! `cargo nextest` use.

use std::panic::catch_unwind;
use std::process::ExitCode;

/// A test and its name.
pub type Test = (&'static str, fn());

/// Runs the tests that the arguments name, or lists them.
pub fn run(tests: &[Test], args: &[String]) -> ExitCode {
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
    for (name, test) in tests.iter().filter(|(name, _)| wanted(name)) {
        ran += 1;
        let ok = catch_unwind(test).is_ok();
        failed += usize::from(!ok);
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored",
        ran - failed
    );
    ExitCode::from(u8::from(failed > 0))
}
