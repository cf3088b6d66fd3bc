//! The report: how it was measured, tables, plots, and where an eBPF rung is slower than the kernel's own ways.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path, time::SystemTime};

use anyhow::{Context, Result};
use nix::sys::utsname::uname;

use super::{
    metric::Metric,
    plot::chart,
    results::{Cell, Results},
    selection::Selection,
    system::System,
    tables::{baselines, digits},
};
use crate::{bench::spread::Spread, topology::Underlay};

/// What the tables do not say.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// The command line.
    command: String,
    date: String,
    kernel: String,
    cpu: String,
    /// Processes that wanted a CPU when the run started: the average of the minute before.
    load: String,
    pub(super) rounds: u32,
    pub(super) underlays: Vec<Underlay>,
    /// Frames per second of the sender of fwd64 alone, by the underlay's name.
    pub(super) sender_alone: BTreeMap<&'static str, f64>,
}

impl Setting {
    /// Describes this machine and this run.
    ///
    /// # Errors
    ///
    /// When `/proc/cpuinfo`, `/proc/loadavg` or the kernel's version cannot be read.
    pub(super) fn read(rounds: u32, underlays: &[Underlay]) -> Result<Self> {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let kernel = uname().context("read the kernel's version")?;
        let load = fs::read_to_string("/proc/loadavg").context("read /proc/loadavg")?;
        let cpus = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
        Ok(Self {
            command: format!("cargo xtask bench {}", arguments.join(" ")),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            kernel: format!("{} {}", kernel.sysname().display(), kernel.release().display()),
            cpu: cpu(&cpus),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            rounds,
            underlays: underlays.to_vec(),
            sender_alone: BTreeMap::new(),
        })
    }
}

/// Number and model of the CPUs in `/proc/cpuinfo`.
fn cpu(text: &str) -> String {
    let count = text.lines().filter(|line| line.starts_with("processor")).count();
    let model =
        text.lines().filter(|line| line.starts_with("model name")).find_map(|line| line.split_once(": "));
    format!("{count} x {}", model.map_or("a model that the kernel does not name", |(_, name)| name))
}

/// Writes `datapath.md` and its plots to a directory, which is created if need be.
///
/// # Errors
///
/// When a file cannot be written.
pub(super) fn write(
    directory: &Path,
    results: &Results,
    selection: &Selection,
    setting: &Setting,
) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    for underlay in &setting.underlays {
        for metric in &selection.metrics {
            let svg = chart(results, &selection.systems, *underlay, *metric);
            write(&plot_name(*underlay, *metric), &svg)?;
        }
    }
    write("datapath.md", &text(results, selection, setting))
}

fn plot_name(underlay: Underlay, metric: Metric) -> String {
    format!("datapath-{}-{metric}.svg", underlay.name())
}

fn text(results: &Results, selection: &Selection, setting: &Setting) -> String {
    let mut text = String::from("# Datapath: measurements\n\n");
    let Setting { command, date, kernel, cpu, load, rounds, .. } = setting;
    let lines = [
        format!("Command: `{command}`"),
        format!("Date: {date}"),
        format!("Kernel: {kernel}"),
        format!("CPU: {cpu}"),
        format!("Load average of the minute before: {load}"),
        format!("Rounds: {rounds}; each measures every system once, every other round in reverse order"),
    ];
    for line in lines {
        let _ = writeln!(text, "- {line}");
    }
    text.push_str(
        "\nTopology: pod A - host A - host B - pod B, four network namespaces of this machine, all systems up at the same time. \
         Underlay `virtual`: a veth pair with all offloads, as between virtual machines of one machine. `wire`: the same with \
         frames of MTU size and finished checksums, as a cable carries them. Other programs on the machine are part of every \
         value.\n",
    );
    text.push_str(&where_slower(results, selection, setting));
    for underlay in &setting.underlays {
        text.push_str(&underlay_tables(results, selection, *underlay));
    }
    text.push_str(&methods(results, selection, setting));
    let failures = results.failures();
    if !failures.is_empty() {
        text.push_str("\n## Failed measurements\n\n```text\n");
        for failure in failures {
            let _ = writeln!(text, "{failure}");
        }
        text.push_str("```\n");
    }
    text
}

fn methods(results: &Results, selection: &Selection, setting: &Setting) -> String {
    let mut text = String::from("\n## Method\n\nMetrics, all from pod A to pod B:\n\n");
    for metric in &selection.metrics {
        let _ = writeln!(text, "- {metric} ({}): {}.", metric.unit(), metric.method());
    }
    text.push_str("\nSystems:\n\n");
    for system in &selection.systems {
        let _ = writeln!(text, "- {system}: {}.", system.description());
    }
    text.push_str(
        "\nRatios are medians of the ratios of each round, with the smallest and the largest in brackets. A ratio above 1 is a \
         higher rate, or a longer time.\n",
    );
    if selection.metrics.contains(&Metric::Fwd64) {
        text.push_str(&sender(results, setting));
    }
    text
}

/// What the sender of fwd64 has to do with its values.
fn sender(results: &Results, setting: &Setting) -> String {
    let mut text = String::new();
    for underlay in &setting.underlays {
        let without_loss = results.cells.iter().filter(|cell| {
            (cell.underlay, cell.metric) == (*underlay, Metric::Fwd64)
                && cell.without_loss as usize * 2 > cell.rounds()
        });
        let names: Vec<&str> = without_loss.map(|cell| cell.system.name()).collect();
        if let Some(alone) = setting.sender_alone.get(underlay.name()) {
            let _ = write!(
                text,
                "\nfwd64, {}: the sender and its link to the host alone reach {} kpps.",
                underlay.name(),
                digits(alone / 1e3)
            );
        }
        if !names.is_empty() {
            let _ = write!(
                text,
                " Without loss: {}. There the kernel forwards each packet in the sender's system call, on one CPU: the CPU that both \
                 share is the limit, and the sender's time is part of the rate.",
                names.join(", ")
            );
        }
        text.push('\n');
    }
    text
}

fn underlay_tables(results: &Results, selection: &Selection, underlay: Underlay) -> String {
    let mut text = format!("\n## Underlay `{}`\n\nMedian (smallest to largest):\n\n", underlay.name());
    let with_unit = |metric: &Metric| format!("{metric}, {}", metric.unit());
    let value = |cell: &Cell| cell.spread().map(|spread| range(&spread));
    text.push_str(&table(results, selection, underlay, &with_unit, &value));
    for baseline in baselines(selection) {
        let _ = write!(text, "\nRatio to {baseline}:\n\n");
        let ratio = |cell: &Cell| results.ratio(cell, baseline).map(|ratio| range(&ratio));
        text.push_str(&table(results, selection, underlay, &Metric::to_string, &ratio));
    }
    text.push('\n');
    for metric in &selection.metrics {
        let _ = writeln!(text, "![{metric}, {}]({})", underlay.name(), plot_name(underlay, *metric));
    }
    text
}

fn table(
    results: &Results,
    selection: &Selection,
    underlay: Underlay,
    title: &dyn Fn(&Metric) -> String,
    value: &dyn Fn(&Cell) -> Option<String>,
) -> String {
    let titles = selection.metrics.iter().map(|metric| format!(" {} |", title(metric)));
    let mut text =
        format!("| |{}\n|---|{}\n", titles.collect::<String>(), "---:|".repeat(selection.metrics.len()));
    for system in &selection.systems {
        let _ = write!(text, "| {system} |");
        for metric in &selection.metrics {
            let cell = results.get(underlay, *system, *metric);
            let failed = cell.is_some_and(|cell| cell.failure.is_some());
            let missing = if failed { "failed" } else { "-" };
            let _ = write!(text, " {} |", cell.and_then(value).unwrap_or_else(|| missing.to_owned()));
        }
        text.push('\n');
    }
    text
}

fn range(spread: &Spread) -> String {
    format!("{} ({} to {})", digits(spread.median), digits(spread.min), digits(spread.max))
}

/// The metrics at which an eBPF rung is behind routing or VXLAN.
fn where_slower(results: &Results, selection: &Selection, setting: &Setting) -> String {
    let mut text = String::from("\n## Where an eBPF rung is slower than routing or VXLAN\n\n");
    let start = text.len();
    let rungs = || selection.systems.iter().copied().filter(|system| system.is_ebpf());
    for underlay in &setting.underlays {
        for baseline in [System::ROUTED, System::VXLAN] {
            for system in rungs() {
                let cell = |metric: &Metric| results.get(*underlay, system, *metric);
                let slower: Vec<String> = (selection.metrics.iter().filter_map(cell))
                    .filter_map(|cell| slower(cell.metric, &results.ratio(cell, baseline)?))
                    .collect();
                if !slower.is_empty() {
                    let name = underlay.name();
                    let _ = writeln!(text, "- {name}: {system} against {baseline}: {}.", slower.join("; "));
                }
            }
        }
    }
    if text.len() == start {
        let nothing = match rungs().next() {
            Some(_) => "Nowhere in these measurements.",
            None => "No eBPF rung was measured.",
        };
        let _ = writeln!(text, "{nothing}");
    }
    text
}

/// Describes a ratio on the wrong side of 1.
fn slower(metric: Metric, ratio: &Spread) -> Option<String> {
    let is_behind = |ratio: f64| if metric.more_is_better() { ratio < 1.0 } else { ratio > 1.0 };
    if !is_behind(ratio.median) {
        return None;
    }
    let best = if metric.more_is_better() { ratio.max } else { ratio.min };
    let note = if is_behind(best) { "" } else { ", not in every round" };
    Some(format!("{metric} x {}{note}", range(ratio)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::datapath::results::tests::{TC, sample};

    fn report() -> String {
        let systems = vec![System::ROUTED, System::VXLAN, System::Proxy, TC];
        let selection = Selection { metrics: vec![Metric::Tcp1, Metric::RrP50], systems };
        let mut setting = Setting::read(2, &[Underlay::Virtual]).unwrap();
        setting.sender_alone.insert("virtual", 1.5e6);
        text(&sample(), &selection, &setting)
    }

    #[test]
    fn what_is_slower_is_said() {
        let text = report();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).map(str::to_owned);
        assert_eq!(
            line("- virtual: tc against routed"),
            Some(
                "- virtual: tc against routed: tcp1 x 0.80 (0.80 to 0.80); rr_p50 x 1.10 (1.10 to 1.10)."
                    .to_owned()
            )
        );
        // tc is ahead of VXLAN in both.
        assert_eq!(line("- virtual: tc against vxlan"), None);
    }

    #[test]
    fn ratios_on_both_sides_of_one_are_no_rule() {
        let ratio = |min, median, max| Spread { median, min, max };
        assert_eq!(slower(Metric::Tcp1, &ratio(1.01, 1.1, 1.2)), None);
        assert!(slower(Metric::Tcp1, &ratio(0.8, 0.9, 1.1)).unwrap().ends_with("not in every round"));
        assert!(slower(Metric::RrP50, &ratio(0.9, 1.1, 1.2)).unwrap().ends_with("not in every round"));
        assert!(slower(Metric::RrP50, &ratio(1.1, 1.2, 1.3)).unwrap().ends_with("1.30)"));
    }

    #[test]
    fn tables_and_failures_are_in_the_report() {
        let text = report();
        assert!(text.contains("| tc | 12.0 (8.00 to 16.0) |"), "{text}");
        assert!(text.contains("| proxy | failed | failed |"), "{text}");
        assert!(text.contains("virtual proxy tcp1, rr_p50: no byte arrived"), "{text}");
        assert!(text.contains("(datapath-virtual-tcp1.svg)"), "{text}");
    }

    #[test]
    fn the_cpus_are_counted() {
        let text = "processor\t: 0\nmodel name\t: X 1\n\nprocessor\t: 1\nmodel name\t: X 1\n";
        assert_eq!(cpu(text), "2 x X 1");
        assert!(cpu("processor : 0\n").starts_with("1 x a model"));
    }
}
