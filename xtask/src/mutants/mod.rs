//! `cargo xtask mutants`: puts wrong lines into a copy of the code, one at a time, and checks that the tests notice each.

mod change;
mod list;
mod tree;
mod trial;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::setup::{self, Scope};
use crate::step::{self, elapsed};
use crate::{interrupt, workspace};
use change::{Change, Tests};
use trial::{Outcome, Trial};

/// Check that the tests notice wrong code: change one line at a time in a copy of the tree, and run the tests that should fail
///
/// The changes are in xtask/src/mutants/list, each with what goes wrong and the tests that should notice. The copy and its builds
/// are in target/mutants; the tree itself is not touched. First, the unchanged copy has to pass all of these tests. Root is needed:
/// the tests load eBPF programs and create network namespaces. The last line is `mutants: N caught, N survived`. The exit code is
/// 1 if a change survives without a reason in the list, or cannot be made or built.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask mutants --list                  what there is
  cargo xtask mutants                         every change
  cargo xtask mutants --only shell-           those whose names contain `shell-`
  cargo xtask mutants --only mark vlan        those whose names contain `mark` or `vlan`")]
pub(crate) struct Options {
    /// Only changes whose names contain one of these
    #[arg(long, num_args = 1.., value_name = "NAME")]
    only: Vec<String>,
    /// List the changes and make none
    #[arg(long)]
    list: bool,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let changes = selected(&options.only)?;
    if options.list {
        changes.iter().for_each(|change| println!("{change}"));
        return Ok(ExitCode::SUCCESS);
    }
    if !workspace::is_root() {
        bail!("`cargo xtask mutants` loads eBPF programs and creates network namespaces: run it as root");
    }
    let start = Instant::now();
    let trial = Trial::prepare(setup::ensure(Scope::Everything, false)?, &changes)?;
    changes.iter().try_for_each(|change| trial.tree.check(change))?;
    step::headline("mutants: the tests on the unchanged copy");
    prove(&trial, &changes)?;

    step::headline(format_args!("mutants: {} changes", changes.len()));
    let mut tally = Tally::default();
    for (number, change) in (1..).zip(&changes) {
        let begun = Instant::now();
        let outcome = trial.run(change)?;
        tally.add(change, &outcome);
        let (count, verdict) = (changes.len(), outcome.verdict(change));
        println!("{number:>3}/{count} {:<44} {verdict} ({})", change.name, elapsed(begun));
        step::flush();
        interrupt::check()?;
    }
    tally.report(start)
}

fn selected(only: &[String]) -> Result<Vec<&'static Change>> {
    let is_selected = |change: &Change| only.is_empty() || only.iter().any(|part| change.name.contains(part));
    let changes: Vec<_> = list::all().filter(|change| is_selected(change)).collect();
    if changes.is_empty() {
        bail!("no change has a name that contains {}: see --list", only.join(" or "));
    }
    Ok(changes)
}

/// Runs every test that is named, on code without a change.
fn prove(trial: &Trial, changes: &[&Change]) -> Result<()> {
    let mut named: Vec<Tests> = changes.iter().flat_map(|change| change.tests).copied().collect();
    named.sort_unstable();
    named.dedup();
    let mut failed = 0;
    for tests in named {
        let begun = Instant::now();
        let verdict = match trial.run_tests(tests)? {
            Outcome::Survived => "passed".to_owned(),
            Outcome::Caught(failures) => format!("FAILED ({failures})"),
            Outcome::DoesNotBuild => "FAILED (does not build)".to_owned(),
        };
        println!("{verdict}: {tests} ({})", elapsed(begun));
        step::flush();
        if !verdict.starts_with("passed") {
            failed += 1;
            trial.show_log();
        }
    }
    if failed > 0 {
        bail!("{failed} of these tests fail without a change: nothing was changed");
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    caught: usize,
    survived: usize,
    /// Names of changes that survived and should not.
    missed: Vec<&'static str>,
    /// Names of changes that do not build, or that tests notice although the list says why they cannot.
    errors: Vec<&'static str>,
}

impl Tally {
    fn add(&mut self, change: &Change, outcome: &Outcome) {
        match outcome {
            Outcome::Caught(_) => self.caught += 1,
            Outcome::Survived => self.survived += 1,
            Outcome::DoesNotBuild => {}
        }
        match (outcome, change.reason) {
            (Outcome::Caught(_), None) | (Outcome::Survived, Some(_)) => {}
            (Outcome::Survived, None) => self.missed.push(change.name),
            (Outcome::Caught(_), Some(_)) | (Outcome::DoesNotBuild, _) => self.errors.push(change.name),
        }
    }

    /// Prints the summary. The counts are the last line.
    fn report(&self, start: Instant) -> Result<ExitCode> {
        step::headline(format_args!("summary ({})", elapsed(start)));
        for name in &self.missed {
            println!("survived without a reason: {name}");
        }
        for name in &self.errors {
            println!("wrong in the list: {name}");
        }
        println!("mutants: {} caught, {} survived", self.caught, self.survived);
        step::flush();
        let is_good = self.missed.is_empty() && self.errors.is_empty();
        Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn change(reason: Option<&'static str>) -> Change {
        Change { name: "x", file: "a", from: "b", to: "c", wrong: "d", tests: &[], reason }
    }

    #[test]
    fn a_survivor_needs_a_reason_and_a_reason_a_survivor() {
        let (plain, excused) = (change(None), change(Some("why")));
        let caught = || Outcome::Caught("a test".to_owned());
        for (change, outcome, is_good) in [
            (&plain, caught(), true),
            (&plain, Outcome::Survived, false),
            (&plain, Outcome::DoesNotBuild, false),
            (&excused, Outcome::Survived, true),
            (&excused, caught(), false),
            (&excused, Outcome::DoesNotBuild, false),
        ] {
            let mut tally = Tally::default();
            tally.add(change, &outcome);
            assert_eq!(tally.missed.is_empty() && tally.errors.is_empty(), is_good, "{outcome:?}");
        }
    }

    /// Code that moves on takes its changes along.
    #[test]
    fn every_change_fits_the_code_and_has_a_name_of_its_own() {
        let root = workspace::root().unwrap();
        let mut names = HashSet::new();
        for change in list::all() {
            let text = std::fs::read_to_string(root.join(change.file)).unwrap();
            assert_eq!(text.matches(change.from).count(), 1, "{}: `{}`", change.name, change.from);
            assert!(names.insert(change.name) && change.from != change.to, "{}", change.name);
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(selected(&["no such change".to_owned()]).is_err());
        assert_eq!(selected(&[]).unwrap().len(), list::all().count());
    }
}
