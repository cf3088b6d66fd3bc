//! The fuzzing program: libFuzzer's `main` with one of the targets, which `cargo xtask fuzz` names in environment variables.

#![no_main]

use std::{env, sync::OnceLock};

use overlay_fuzz::Target;

/// The chosen target.
static TARGET: OnceLock<Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: start(), |input: &[u8]| {
    if let Some(target) = TARGET.get() {
        target.check(input);
    }
});

/// Reads the variables and writes the seeds, before libFuzzer reads its directories.
fn start() {
    let name = env::var("OVERLAY_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = Target::ALL.iter().copied().find(|target| target.name() == name) else {
        eprintln!("OVERLAY_FUZZ_TARGET is `{name}`, no target: start the program by `cargo xtask fuzz`");
        std::process::exit(2);
    };
    if let Some(directory) = env::var_os("OVERLAY_FUZZ_SEEDS")
        && let Err(error) = overlay_fuzz::seeds::write(target, directory.as_ref())
    {
        eprintln!("cannot write seeds: {error}");
        std::process::exit(2);
    }
    TARGET.get_or_init(|| target);
}
