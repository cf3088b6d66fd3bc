//! Services: connections to virtual addresses beside direct ones, the DNS server beside others, and an agent with very many services.
//!
//! In reading order: [`options`], [`scene`] (hosts, agents, services), [`servers`] and [`clients`], [`traffic`], [`dns`], [`scale`],
//! [`bars`] (what the results have to reach).

mod bars;
mod clients;
mod dns;
mod options;
mod scale;
mod scene;
mod servers;
mod traffic;

use std::{process::ExitCode, sync::Arc};

use anyhow::Result;
use serde::Serialize;

pub(super) use options::Options;

use self::{bars::Bar, options::Part, scene::Scene};
use super::{open_json, write_json};
use crate::{
    agent,
    progress::Progress,
    sandbox::{Kind, Sandbox},
};

/// The output of `--json`. Parts that were not measured are missing.
#[derive(Debug, Default, Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<Vec<traffic::Row>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns: Option<dns::Results>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<scale::Results>,
}

/// Runs the benchmark. The exit code is 1 when a measurement fails, and with `--check` when a bar is missed.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let json = options.json.as_deref().map(open_json).transpose()?;
    let agent = agent::binary()?;
    Sandbox::remove_on_signals()?;
    let sandbox = Sandbox::start(Kind::Bench)?;
    let progress = Progress::start();
    progress
        .line(&format!("two hosts, a container behind each, underlay: virtual; agent: {}", agent.display()));
    let mut run = Run::default();
    if options.includes(Part::Traffic) || options.includes(Part::Dns) {
        let result = run.on_scene(&sandbox, options, &progress);
        run.note("traffic and DNS", result);
    }
    if options.includes(Part::Scale) {
        let result = run.scale(&sandbox, options, &progress);
        run.note("scale", result);
    }
    drop(sandbox);
    run.print();
    if let Some(file) = json {
        write_json(file, &run.report)?;
    }
    Ok(run.exit_code(options.check, progress.seconds()))
}

/// What has been measured so far.
#[derive(Default)]
struct Run {
    report: Report,
    bars: Vec<Bar>,
    tables: Vec<String>,
    failures: Vec<String>,
}

impl Run {
    fn on_scene(&mut self, sandbox: &Arc<Sandbox>, options: &Options, progress: &Progress) -> Result<()> {
        let scene = Scene::start(sandbox)?;
        progress.line("agents run, every system was seen to take its way");
        if options.includes(Part::Traffic) {
            let results = traffic::measure(&scene, options.rounds, progress)?;
            self.report.rows = Some(results.rows());
            self.tables.push(results.table());
            self.bars.extend(results.bars());
        }
        if options.includes(Part::Dns) {
            let results = dns::measure(sandbox, &scene, options.rounds, progress)?;
            self.tables.push(results.table());
            self.bars.extend(results.bars());
            self.report.dns = Some(results);
        }
        Ok(())
    }

    fn scale(&mut self, sandbox: &Arc<Sandbox>, options: &Options, progress: &Progress) -> Result<()> {
        let results = scale::measure(sandbox, options, progress)?;
        self.tables.push(results.table());
        self.bars.extend(results.bars());
        self.report.scale = Some(results);
        Ok(())
    }

    /// A part that fails does not keep the others from being measured.
    fn note(&mut self, part: &str, result: Result<()>) {
        if let Err(error) = result {
            self.failures.push(format!("{part}: {error:#}"));
        }
    }

    fn print(&self) {
        for table in &self.tables {
            println!("\n{table}");
        }
        if !self.bars.is_empty() {
            println!("\n{}", bars::summary(&self.bars).0);
            println!(
                "Ratios are medians of the ratios of each round; `rounds` has the smallest and the largest. Round trips and both ends \
                 of\nconnect_p50 on one CPU, both ends of streams and HTTP on one each; agents where the kernel puts them."
            );
        }
    }

    fn exit_code(&self, check: bool, seconds: f64) -> ExitCode {
        for failure in &self.failures {
            eprintln!("failed: {failure}");
        }
        let (_, missed) = bars::summary(&self.bars);
        println!("\n{} of {} bars ok in {seconds:.0} s", self.bars.len() - missed, self.bars.len());
        if self.failures.is_empty() && (missed == 0 || !check) {
            return ExitCode::SUCCESS;
        }
        if !self.failures.is_empty() {
            eprintln!("error: {} part(s) failed", self.failures.len());
        }
        ExitCode::FAILURE
    }
}
