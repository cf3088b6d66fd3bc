//! `cargo xtask ci`: everything that must hold before a change is merged, in one run.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::step::{self, elapsed};
use crate::{test, tidy, workspace};

/// Runs every check and then every test; a failed check does not keep the others from running.
pub(crate) fn run() -> Result<ExitCode> {
    let mut failed = Vec::new();
    let mut check = |name: &'static str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let start = Instant::now();
        step::headline(name);
        match work() {
            Ok(()) => println!("ok: {name} ({})", elapsed(start)),
            Err(error) => {
                crate::interrupt::check()?;
                println!("FAILED: {name} ({}): {error:#}", elapsed(start));
                failed.push(name);
            }
        }
        Ok(())
    };

    check("format", &mut || cargo(&["fmt", "--all", "--", "--check"], &mut |_| ()))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    check("clippy", &mut || cargo(&clippy, &mut |_| ()))?;
    check("tidy", &mut tidy::check)?;
    check("docs", &mut || {
        cargo(&["doc", "--workspace", "--no-deps"], &mut |command| {
            command.env("RUSTDOCFLAGS", "-D warnings");
        })
    })?;

    step::headline("test");
    if !failed.is_empty() {
        println!("failed before the tests: {}", failed.join(", "));
    }
    let code = test::run(&test::Options::default())?;
    Ok(if failed.is_empty() { code } else { ExitCode::FAILURE })
}

fn cargo(arguments: &[&str], adjust: &mut dyn FnMut(&mut Command)) -> Result<()> {
    let mut command = workspace::cargo()?;
    adjust(command.args(arguments));
    if let Err(error) = step::stream(&mut command) {
        bail!("{error:#}");
    }
    Ok(())
}
