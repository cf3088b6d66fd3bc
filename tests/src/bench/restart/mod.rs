//! What kills, restarts, upgrades and changes of the rung of an agent cost the traffic that passes meanwhile.
//!
//! In reading order: [`options`], [`event`] (what happens), [`results`] (the rows).

mod event;
mod options;
mod results;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

pub(super) use options::Options;

use self::{
    event::{Context, Event},
    results::Row,
};
use super::{open_json, write_json};
use crate::{
    agent::{self, Agent, Rung},
    cpu::{self, OneCpu},
    pair::Pair,
    progress::Progress,
    sandbox::{Kind, Sandbox},
    topology::{PodOffload, Topology, Underlay},
    traffic::numbered::{self, Numbered},
};

/// Traffic before and after an event.
const AROUND: Duration = Duration::from_millis(300);
/// Programs and maps stay when the agent ends.
const KEEP: [&str; 2] = ["--on-exit", "keep"];

/// The output of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// Runs the benchmark. The exit code is 1 when a measurement fails, and with `--check` when packets were lost or reordered.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let json = options.json.as_deref().map(open_json).transpose()?;
    let binary = agent::binary()?;
    Sandbox::remove_on_signals()?;
    let sandbox = Sandbox::start(Kind::Bench)?;
    let progress = Progress::start();
    progress.line(&format!(
        "two hosts, a pod behind each, underlay: virtual; four flows of 20,000 packets/s; agent: {}",
        binary.display()
    ));
    let upgrade_to = match &options.upgrade_to {
        Some(file) => file.canonicalize().with_context(|| format!("find the agent {}", file.display()))?,
        None => copy(&binary, &sandbox)?,
    };
    let binaries = Binaries { upgrade_to, next: agent::next_binary()? };
    let rows = measure(&sandbox, options, &binaries, &progress)?;
    drop(sandbox);
    let (table, bars, missed) = results::summary(&rows);
    println!("\n{table}");
    println!(
        "Sums of {} rounds; outage: the longest time between two arrivals in a flow, less its sender's interval.",
        options.rounds
    );
    if let Some(file) = json {
        write_json(file, &Report { rows })?;
    }
    println!("\n{} of {bars} bars ok in {:.0} s", bars - missed, progress.seconds());
    Ok(if missed > 0 && options.check { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Other agents than the one that is measured.
struct Binaries {
    /// With maps of the same version.
    upgrade_to: PathBuf,
    /// With maps of another one.
    next: PathBuf,
}

/// As a package manager does: the same path is another file, and this is that file.
fn copy(binary: &Path, sandbox: &Sandbox) -> Result<PathBuf> {
    let path = sandbox.new_directory("upgrade")?.join("overlay-agent");
    fs::copy(binary, &path).with_context(|| format!("copy {} to {}", binary.display(), path.display()))?;
    Ok(path)
}

/// Every event on every rung in each round, in turn: what disturbs the machine for a while disturbs all alike.
fn measure(
    sandbox: &Arc<Sandbox>,
    options: &Options,
    binaries: &Binaries,
    progress: &Progress,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut scenes = Vec::new();
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        scenes.push(Scene::start(sandbox, rung).with_context(|| format!("start agents on {}", rung.name()))?);
        rows.extend(options.events().into_iter().map(|event| ((event, rung), Row::new(event, rung))));
    }
    progress.line("agents run on every rung");
    for round in 1..=options.rounds {
        for ((event, rung), row) in &mut rows {
            let scene =
                scenes.iter_mut().find(|scene| scene.rung == *rung).context("every rung has agents")?;
            let flows = scene
                .measure(*event, binaries)
                .with_context(|| format!("round {round}: {} on {}", event.name(), rung.name()))?;
            row.add(&flows);
        }
        progress.line(&format!("round {round} of {}", options.rounds));
    }
    // The table is read by event.
    rows.sort_by_key(|((event, _), _)| Event::ALL.iter().position(|other| other == event));
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// Two hosts with agents on one rung.
struct Scene {
    rung: Rung,
    arguments: Vec<String>,
    /// The agent to which events happen; `None` after one failed.
    agent: Option<Agent>,
    // Behind the agent, which needs their namespaces to clean up.
    _other: Agent,
    topology: Topology,
}

impl Scene {
    fn start(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Self> {
        let all = OneCpu::last()?;
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let pair = Pair::start_with(sandbox, topology, rung, rung, &KEEP)?;
        drop(all);
        let mut arguments = pair.store.arguments(&pair.topology.a, rung);
        arguments.extend(KEEP.map(str::to_owned));
        let Pair { a, b, topology, .. } = pair;
        Ok(Self { rung, arguments, agent: Some(a), _other: b, topology })
    }

    /// Lets an event happen while pods and hosts send.
    fn measure(&mut self, event: Event, binaries: &Binaries) -> Result<Vec<Numbered>> {
        let agent = self.agent.take().context("an earlier event left no agent")?;
        let Binaries { upgrade_to, next } = binaries;
        let context = Context { arguments: &self.arguments, upgrade_to, next, rung: self.rung };
        let ((pod_a, pod_b), (host_a, host_b)) = (self.topology.pods(), self.topology.hosts());
        let ends = [(pod_a, pod_b), (pod_b, pod_a), (host_a, host_b), (host_b, host_a)];
        let for_agents = cpu::last()?;
        let _for_traffic = OneCpu::enter()?;
        let (agent, flows) = numbered::flows(&ends, || {
            cpu::stay_on(&for_agents)?;
            thread::sleep(AROUND);
            let agent = event.happen(agent, &context)?;
            thread::sleep(AROUND);
            Ok(agent)
        })?;
        self.agent = Some(agent);
        Ok(flows)
    }
}
