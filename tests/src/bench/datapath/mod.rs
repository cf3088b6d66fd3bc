//! The datapath beside the alternatives: throughput, packets per second, latency and CPU time, container to container.
//!
//! In reading order: [`options`] and [`selection`] say what to measure, [`system`] connects a topology, [`measure`] measures it,
//! [`results`] has the values and compares them, [`tables`] prints them, [`report`] and [`plot`] write them down.

mod measure;
mod metric;
mod options;
mod plot;
mod report;
mod results;
mod selection;
mod system;
mod tables;

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Result;
use serde_json::json;

pub(super) use options::Options;

use self::{
    measure::{Durations, Measured, measure},
    metric::{Measurement, Metric},
    report::Setting,
    results::Results,
    selection::Selection,
    system::{Connected, System},
};
use super::{open_json, write_json};
use crate::{
    agent,
    progress::Bar,
    sandbox::{Kind, Sandbox},
    topology::Underlay,
    traffic::rate::sender_alone,
};

/// About how long it takes to connect a system.
const CONNECT: Duration = Duration::from_millis(2000);
/// How long the sender of fwd64 is measured alone.
const SENDER_ALONE: Duration = Duration::from_millis(200);

/// Runs the benchmark. The exit code is 1 when a measurement failed.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let json = options.json.as_deref().map(open_json).transpose()?;
    let selection = Selection::new(&options.only);
    agent::binary()?;
    Sandbox::remove_on_signals()?;
    let sandbox = Sandbox::start(Kind::Bench)?;
    let mut run = Run::new(&sandbox, options, &selection)?;
    for underlay in options.underlays() {
        run.underlay(*underlay);
        run.bar.print(&format!("\n{}\n", tables::tables(&run.results, &selection, *underlay)));
    }
    let Run { results, setting, bar, .. } = run;
    bar.finish();
    if let Some(file) = json {
        write_json(file, &json!({"rows": results.rows()}))?;
    }
    if let Some(directory) = &options.report {
        report::write(directory, &results, &selection, &setting)?;
        println!("report: {}", directory.join("datapath.md").display());
    }
    let failures = results.failures();
    for failure in &failures {
        eprintln!("failed: {failure}");
    }
    if failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("error: {} measurement(s) failed", failures.len());
    Ok(ExitCode::FAILURE)
}

/// A run of the benchmark.
struct Run<'a> {
    sandbox: &'a Arc<Sandbox>,
    selection: &'a Selection,
    measurements: Vec<Measurement>,
    durations: Durations,
    rounds: u32,
    bar: Bar,
    results: Results,
    setting: Setting,
}

impl<'a> Run<'a> {
    fn new(sandbox: &'a Arc<Sandbox>, options: &Options, selection: &'a Selection) -> Result<Self> {
        let (rounds, durations) = (options.rounds(), Durations::new(options.quick));
        let measurements = selection.measurements();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let round: Duration = measurements.iter().map(|measurement| durations.expected(*measurement)).sum();
        let system = CONNECT + round * rounds;
        let bar = Bar::start(system * count(selection.systems.len()) * count(options.underlays().len()));
        let setting = Setting::read(rounds, options.underlays())?;
        Ok(Self {
            sandbox,
            selection,
            measurements,
            durations,
            rounds,
            bar,
            results: Results::default(),
            setting,
        })
    }

    /// Connects all systems over one kind of underlay, then measures each once in every round.
    fn underlay(&mut self, underlay: Underlay) {
        let mut connected = Vec::new();
        for system in &self.selection.systems {
            self.bar.step(&format!("{} {system}: connect", underlay.name()));
            match system.connect(self.sandbox, underlay) {
                Ok(topology) => connected.push((*system, topology)),
                Err(error) => {
                    for metric in &self.selection.metrics {
                        self.results.fail(underlay, *system, *metric, &format!("connect: {error:#}"));
                    }
                    self.bar.print(&format!("{} {system}: failed: connect: {error:#}", underlay.name()));
                    let skipped: Duration = self
                        .measurements
                        .iter()
                        .map(|measurement| self.durations.expected(*measurement))
                        .sum();
                    self.bar.advance(skipped * self.rounds);
                }
            }
            self.bar.advance(CONNECT);
        }
        if self.measurements.contains(&Measurement::Forwarding)
            && let Some((_, topology)) = connected.first()
            && let Ok(rate) = sender_alone(topology.pods().0, SENDER_ALONE)
        {
            self.setting.sender_alone.insert(underlay.name(), rate);
        }
        for round in 1..=self.rounds {
            for measurement in self.measurements.clone() {
                // The systems in turn, so that noise on the machine affects all alike, and in every other round the last one first.
                let mut systems: Vec<&(System, Connected)> = connected.iter().collect();
                if round % 2 == 0 {
                    systems.reverse();
                }
                for (system, topology) in systems {
                    self.measure(underlay, *system, topology, measurement, round);
                }
            }
        }
    }

    fn measure(
        &mut self,
        underlay: Underlay,
        system: System,
        topology: &Connected,
        measurement: Measurement,
        round: u32,
    ) {
        let step =
            format!("{} round {round} of {}: {} {system}", underlay.name(), self.rounds, measurement.name());
        self.bar.step(&step);
        let (a, b) = topology.pods();
        match measure(measurement, a, b, &self.durations) {
            Ok(measured) => {
                let values = measured
                    .values
                    .iter()
                    .map(|(metric, value)| format!("{metric} {} {}", tables::digits(*value), metric.unit()));
                self.bar.done(&format!("{step}: {}", values.collect::<Vec<_>>().join(", ")));
                self.add(underlay, system, round, &measured);
            }
            Err(error) => {
                self.bar.print(&format!("{step}: failed: {error:#}"));
                for metric in self.chosen(|metric| metric.measurement() == measurement) {
                    self.results.fail(underlay, system, metric, &format!("round {round}: {error:#}"));
                }
            }
        }
        self.bar.advance(self.durations.expected(measurement));
    }

    fn add(&mut self, underlay: Underlay, system: System, round: u32, measured: &Measured) {
        for (metric, value) in &measured.values {
            if self.selection.metrics.contains(metric) {
                self.results.add(underlay, system, *metric, round, *value);
                if measured.without_loss {
                    self.results.without_loss(underlay, system, *metric);
                }
            }
        }
    }

    fn chosen(&self, is: impl Fn(&Metric) -> bool) -> Vec<Metric> {
        self.selection.metrics.iter().copied().filter(is).collect()
    }
}
