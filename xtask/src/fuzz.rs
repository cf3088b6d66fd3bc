//! `cargo xtask fuzz`: coverage-guided fuzzing of the packet core and of other code that reads foreign bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::setup::{self, Scope};
use crate::step::{self, elapsed};
use crate::workspace;

/// What the compiler adds so that the fuzzer sees which code an input reaches, and what it is compared with: the flags of cargo-fuzz,
/// which stable compilers take, too.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Seconds after which an input counts as a hang.
const HANG: u32 = 10;

/// Last lines of the fuzzer's output that are kept: a failure with its stack, or the statistics.
const LINES: usize = 1000;

/// Lines of the fuzzer's that say nothing about a failure.
const NOISE: [&str; 4] = ["INFO: ", "NOTE: ", "WARNING: Failed to find function", "stat::"];

/// Look for packets, messages and records that are answered wrongly, guided by coverage
///
/// Builds the checks of tests/fuzz with coverage counters and gives them inputs made from the golden packets and from what earlier
/// runs have found (target/fuzz/corpus). An input that fails is written to tests/fuzz/regressions: commit it with the fix, since
/// `cargo xtask test` repeats it from then on. The last line is `fuzz: N runs, M failures`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Time for all targets together; the build is not counted
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = minutes)]
    minutes: f64,
    /// Fuzz only this target; may be repeated
    #[arg(long, value_name = "NAME")]
    target: Vec<Target>,
    /// Check one input instead. Its directory names the target, unless --target does
    #[arg(long, value_name = "FILE", conflicts_with = "minutes")]
    replay: Option<PathBuf>,
}

const EXAMPLES: &str = "Examples:
  cargo xtask fuzz                                  all targets, five minutes in total
  cargo xtask fuzz --minutes 60 --target ingress    an hour for one target
  cargo xtask fuzz --replay tests/fuzz/regressions/ingress/crash-0123";

/// What is fuzzed; the names are those of `overlay_fuzz::Target` and of the directories of inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The packet core's decision about packets that leave
    Egress,
    /// The packet core's decision about frames that arrive
    Ingress,
    /// The tun datapath around the core: rewriting, fragments, unfinished checksums
    Shell,
    /// Fragmentation of any packet to any size
    Fragments,
    /// ICMP errors, as they are built and read
    Icmp,
    /// Lease records
    Lease,
    /// The network config
    Config,
    /// The DNS server's answers to messages
    DnsAnswer,
    /// Responses of upstream DNS servers
    DnsResponse,
    /// The cache of such responses
    DnsCache,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Shell => "shell",
            Self::Fragments => "fragments",
            Self::Icmp => "icmp",
            Self::Lease => "lease",
            Self::Config => "config",
            Self::DnsAnswer => "dns-answer",
            Self::DnsResponse => "dns-response",
            Self::DnsCache => "dns-cache",
        }
    }

    /// Longest input in bytes: of packets, a few longer than an MTU.
    fn longest_input(self) -> usize {
        match self {
            Self::Egress | Self::Ingress | Self::Shell | Self::Fragments | Self::Icmp => 2048,
            Self::Lease | Self::Config | Self::DnsAnswer | Self::DnsResponse | Self::DnsCache => 1024,
        }
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.01..=100_000.0).contains(&minutes) { Ok(minutes) } else { Err("from 0.01 to 100000".to_owned()) }
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if let Some(file) = &options.replay {
        let file = file.canonicalize().with_context(|| format!("cannot find {}", file.display()))?;
        let target = match options.target.as_slice() {
            [] => target_of(&file)?,
            [target] => *target,
            _ => bail!("--replay takes one target"),
        };
        return replay(&build()?, target, &file);
    }
    let mut targets = options.target.clone();
    if targets.is_empty() {
        targets.extend(Target::value_variants());
    }
    let program = build()?;
    let seconds = ((options.minutes * 60.0 / targets.len() as f64) as u64).max(1);
    step::headline(format_args!("fuzz: {} targets, {seconds} s each", targets.len()));
    let mut runs = 0;
    let mut failures = Vec::new();
    for target in targets {
        let outcome = fuzz(&program, target, seconds)?;
        runs += outcome.runs;
        failures.extend(outcome.failure.map(|file| (target, file)));
    }
    for (target, file) in &failures {
        println!("failed: {}: replay it with `cargo xtask fuzz --replay {}`", target.name(), file.display());
    }
    Ok(summary(runs, failures.len()))
}

/// Prints the last line and returns the exit code.
fn summary(runs: u64, failures: usize) -> ExitCode {
    let counted = |count: u64, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    println!("fuzz: {}, {}", counted(runs, "run"), counted(failures as u64, "failure"));
    step::flush();
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the fuzzing of one target found.
struct Outcome {
    runs: u64,
    failure: Option<PathBuf>,
}

/// Builds the program with coverage counters and returns its path.
fn build() -> Result<PathBuf> {
    // For the C++ compiler that builds libFuzzer.
    setup::ensure(Scope::Everything, false)?;
    step::headline("build: the fuzzing program (with coverage counters, optimised)");
    // A separate directory: other flags would invalidate the main one each time.
    let directory = directory()?;
    let mut cargo = workspace::cargo()?;
    cargo.args(["build", "--profile", "fuzz", "--package", "overlay-fuzz", "--features", "libfuzzer"]);
    // With a target, the flags are not those of build scripts, which have no fuzzer to link with.
    cargo.args(["--bin", "fuzz", "--target", &host()?, "--target-dir"]).arg(&directory);
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", COVERAGE);
    step::stream(&mut cargo)?;
    Ok(directory.join(host()?).join("fuzz/fuzz"))
}

/// The compiler's name for this machine, which is also that of a directory.
fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = step::output(Command::new(rustc).arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}

fn directory() -> Result<PathBuf> {
    Ok(workspace::target_dir()?.join("fuzz"))
}

/// Fuzzes one target, and prints what it came to.
fn fuzz(program: &Path, target: Target, seconds: u64) -> Result<Outcome> {
    let name = target.name();
    let directory = directory()?;
    let [corpus, seeds] = ["corpus", "seeds"].map(|kind| directory.join(kind).join(name));
    let found = workspace::root()?.join("tests/fuzz/regressions").join(name);
    for directory in [&corpus, &found] {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let mut command = Command::new(program);
    command.env("OVERLAY_FUZZ_TARGET", name).env("OVERLAY_FUZZ_SEEDS", &seeds).env("RUST_BACKTRACE", "0");
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={}", target.longest_input()));
    command.arg(format!("-timeout={HANG}")).arg(format!("-report_slow_units={HANG}"));
    command.arg(format!("-artifact_prefix={}/", found.display())).arg("-print_final_stats=1");
    command.args([&corpus, &seeds, &found]);
    let start = Instant::now();
    let ended = step::watch(name, &mut command, LINES)?;
    let runs = ended.lines.iter().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let runs = runs.and_then(|runs| runs.trim().parse().ok());
    let failure = ended.lines.iter().find_map(|line| line.split_once("Test unit written to "));
    let failure = failure.map(|(_, path)| PathBuf::from(path));
    if failure.is_some() || !ended.status.success() {
        let is_about_failure =
            |line: &&String| !is_progress(line) && !NOISE.iter().any(|start| line.starts_with(start));
        for line in ended.lines.iter().filter(is_about_failure) {
            println!("  | {line}");
        }
    }
    let Some(runs) = runs else { bail!("the fuzzing of {name} ended without a count ({})", ended.status) };
    if failure.is_none() && !ended.status.success() {
        bail!("the fuzzing of {name} ended without an input ({})", ended.status);
    }
    let outcome = if failure.is_some() { "FAILED" } else { "ok" };
    let coverage = ended.lines.iter().rev().find_map(|line| coverage(line)).unwrap_or("no coverage");
    println!("{outcome}: {name}: {runs} runs, {coverage} ({})", elapsed(start));
    Ok(Outcome { runs, failure })
}

/// Whether a line of libFuzzer's is a report of progress: `#1048576 pulse cov: 512 ft: 2100 ...`.
fn is_progress(line: &str) -> bool {
    line.starts_with('#') && line.contains("cov: ")
}

/// The covered edges, the features (edges with their counts) and the corpus in such a line.
fn coverage(line: &str) -> Option<&str> {
    let (_, behind) = line.split_at_checked(line.find("cov: ").filter(|_| is_progress(line))?)?;
    let end = ["lim:", "exec/s:"].into_iter().filter_map(|word| behind.find(word)).min();
    behind.get(..end.unwrap_or(behind.len())).map(str::trim_end)
}

/// Checks one input, with all output.
fn replay(program: &Path, target: Target, file: &Path) -> Result<ExitCode> {
    let mut command = Command::new(program);
    command.env("OVERLAY_FUZZ_TARGET", target.name()).arg(format!("-timeout={HANG}")).arg(file);
    // It must not be written a second time.
    command.arg("-exact_artifact_path=/dev/null").env("RUST_BACKTRACE", "1");
    step::flush();
    let mut child = step::spawn(&mut command)?;
    let attended = crate::interrupt::attend(child.id());
    let status = child.wait().context("cannot wait for the fuzzing program")?;
    drop(attended);
    crate::interrupt::check()?;
    Ok(summary(1, usize::from(!status.success())))
}

/// The target whose inputs are in the file's directory.
fn target_of(file: &Path) -> Result<Target> {
    let directory = file.parent().and_then(Path::file_name).unwrap_or_default();
    let target = Target::value_variants().iter().copied().find(|target| directory == target.name());
    target.with_context(|| format!("the directory of {} is no target's: add --target", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_an_input_names_its_target() {
        let target = target_of(Path::new("/a/regressions/ingress/crash-01")).unwrap();
        assert_eq!(target, Target::Ingress);
        assert!(target_of(Path::new("/tmp/crash-01")).is_err());
    }

    #[test]
    fn every_target_has_a_directory_of_inputs_and_no_other_has() {
        let inputs = workspace::root().unwrap().join("tests/fuzz/regressions");
        let mut found: Vec<_> = fs::read_dir(inputs)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut names: Vec<_> = Target::value_variants().iter().map(|target| target.name()).collect();
        found.sort();
        names.sort_unstable();
        assert_eq!(found, names);
    }

    #[test]
    fn coverage_is_read_from_lines_of_progress_only() {
        let line = "#1048576\tpulse  cov: 512 ft: 2100 corp: 300/20Kb lim: 4096 exec/s: 50000 rss: 40Mb";
        assert_eq!(coverage(line), Some("cov: 512 ft: 2100 corp: 300/20Kb"));
        assert_eq!(coverage("#8\tDONE   cov: 5 ft: 6 corp: 1/2b exec/s: 4"), Some("cov: 5 ft: 6 corp: 1/2b"));
        assert_eq!(coverage("INFO: cov: none"), None);
    }
}
