//! `cargo xtask test`: runs all tests and prints a summary; its last line is the counts.

mod part;
pub(crate) mod tally;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::setup::{self, Scope};
use crate::step::{self, elapsed};
use crate::{build, interrupt, workspace};
use build::{Built, OBJECT_VARIABLE};
use part::Part;
use tally::Tally;

/// Run all tests, or the selected parts, and print one summary
///
/// Without --unit, --programs, --etcd or --e2e, all four parts run. All but unit need root: they load eBPF programs, create
/// network namespaces and run servers, and are set up and built first. The last line is `N passed, N failed, N skipped`.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// Unit tests of all crates; needs neither root nor a BPF compiler
    #[arg(long)]
    unit: bool,
    /// Golden packets through the packet core, the tun shell and the loaded kernel programs
    #[arg(long)]
    programs: bool,
    /// The etcd store against real etcd servers on loopback
    #[arg(long)]
    etcd: bool,
    /// End-to-end tests in network namespaces
    #[arg(long)]
    e2e: bool,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    run_with(options, ebpf_object)
}

/// Sets up and builds the eBPF programs.
pub(crate) fn ebpf_object() -> Result<PathBuf> {
    build::build_ebpf(&setup::ensure(Scope::Everything, false)?)
}

/// As [`run`], with the object that `object` returns.
pub(crate) fn run_with(options: &Options, object: impl FnOnce() -> Result<PathBuf>) -> Result<ExitCode> {
    let parts = selected(options);
    let needs_root = parts.iter().any(|part| part.needs_root());
    if needs_root {
        require_root()?;
    }

    let mut total = Tally::default();
    let mut lines = Vec::new();
    let built = if needs_root {
        match object().and_then(|object| prepare(object, &parts)) {
            Ok(built) => Some(built),
            Err(error) => {
                interrupt::check()?;
                println!("FAILED: set-up and build: {error:#}");
                total.add("build", &Tally::of_failure("set-up and build"));
                None
            }
        }
    } else {
        None
    };

    for part in parts {
        if part.needs_root() && built.is_none() {
            lines.push(format!("{:<9} not run, because the build failed", part.name()));
            continue;
        }
        let start = Instant::now();
        step::headline(format_args!("test: {}", part.title()));
        let tally = part::run(part, options.filter.as_deref(), built.as_ref())?;
        interrupt::check()?;
        lines.push(format!("{:<9} {} ({})", part.name(), tally.counts(), elapsed(start)));
        total.add(part.name(), &tally);
    }
    report(&lines, &total, options.filter.as_deref())
}

fn selected(options: &Options) -> Vec<Part> {
    let all = !options.unit && !options.programs && !options.etcd && !options.e2e;
    let parts = [
        (Part::Unit, options.unit),
        (Part::Programs, options.programs),
        (Part::Etcd, options.etcd),
        (Part::EndToEnd, options.e2e),
    ];
    parts.into_iter().filter(|(_, chosen)| all || *chosen).map(|(part, _)| part).collect()
}

/// What tests that need root run.
struct Prepared {
    built: Built,
    /// For the end-to-end tests.
    next_agent: Option<PathBuf>,
}

/// Fails where not all tests can run.
pub(crate) fn require_root() -> Result<()> {
    if !workspace::is_root() {
        bail!(
            "all parts but unit load eBPF programs, create network namespaces or run servers: run the tests as root, or \
             only `cargo xtask test --unit`"
        );
    }
    Ok(())
}

/// Builds the agent and, beside it, the test programs: each alone leaves CPUs idle while its last crates are compiled.
fn prepare(object: PathBuf, parts: &[Part]) -> Result<Prepared> {
    let built = thread::scope(|scope| {
        let path = object.clone();
        let agent = scope.spawn(|| build::agent(object));
        // The part whose programs do not build reports it.
        let _ = build_tests(parts, &path);
        agent.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    let next_agent = match parts.contains(&Part::EndToEnd) {
        true => Some(build::build_next(&setup::ensure(Scope::Everything, false)?)?),
        false => None,
    };
    Ok(Prepared { built, next_agent })
}

/// Builds all test programs of the parts at once.
fn build_tests(parts: &[Part], object: &Path) -> Result<()> {
    let mut cargo = workspace::cargo()?;
    cargo.args(["test", "--workspace", "--no-run"]).args(parts.iter().flat_map(|part| part.programs()));
    step::stream(cargo.env(OBJECT_VARIABLE, object))
}

/// Prints the summary. The counts are the last line.
fn report(lines: &[String], total: &Tally, filter: Option<&str>) -> Result<ExitCode> {
    step::headline("summary");
    for line in lines {
        println!("{line}");
    }
    for failure in &total.failures {
        println!("failed: {failure}");
    }
    if total.is_empty() {
        match filter {
            Some(filter) => eprintln!("error: no test has a name that contains `{filter}`"),
            None => eprintln!("error: no test ran"),
        }
    }
    println!("{}", total.counts());
    step::flush();
    Ok(if total.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_selection_means_all_parts() {
        assert_eq!(selected(&Options::default()), [Part::Unit, Part::Programs, Part::Etcd, Part::EndToEnd]);
    }

    #[test]
    fn selected_parts_run_in_order() {
        let options = Options { e2e: true, unit: true, ..Options::default() };
        assert_eq!(selected(&options), [Part::Unit, Part::EndToEnd]);
    }
}
