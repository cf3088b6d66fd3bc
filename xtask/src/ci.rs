//! `cargo xtask ci`: every check and every test that a change has to pass before it is merged.

use std::panic::resume_unwind;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::Result;

use crate::step::{self, elapsed};
use crate::{interrupt, test, tidy, workspace};

/// Runs all checks, even after one failed, and then all tests. The last line is the count of the tests.
///
/// The eBPF programs are built beside the checks: most of the time, either keeps one CPU busy.
pub(crate) fn run() -> Result<ExitCode> {
    test::require_root()?;
    thread::scope(|scope| {
        let object = scope.spawn(test::ebpf_object);
        let failed = checks()?;
        step::headline("test");
        if !failed.is_empty() {
            println!("failed before the tests: {}", failed.join(", "));
        }
        let object = || object.join().unwrap_or_else(|panic| resume_unwind(panic));
        let code = test::run_with(&test::Options::default(), object)?;
        Ok(if failed.is_empty() { code } else { ExitCode::FAILURE })
    })
}

/// Runs the checks. Returns the names of those that failed.
fn checks() -> Result<Vec<&'static str>> {
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        let start = Instant::now();
        step::headline(name);
        match check() {
            Ok(()) => println!("ok: {name} ({})", elapsed(start)),
            Err(error) => {
                interrupt::check()?;
                println!("FAILED: {name} ({}): {error:#}", elapsed(start));
                failed.push(name);
            }
        }
    }
    Ok(failed)
}

type Check = (&'static str, fn() -> Result<()>);

const CHECKS: [Check; 5] = [
    ("format", || cargo(&["fmt", "--all", "--", "--check"])),
    ("clippy", || cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])),
    // Demo and benchmarks are built alone, without the features of crates that only the tests need.
    ("demo and benchmarks", || cargo(&["check", "--package", "overlay-tests", "--bins"])),
    ("docs", || cargo(&["doc", "--workspace", "--no-deps"])),
    ("tidy", tidy::check),
];

fn cargo(arguments: &[&str]) -> Result<()> {
    // rustdoc alone reads the variable.
    step::stream(workspace::cargo()?.args(arguments).env("RUSTDOCFLAGS", "-D warnings"))
}
