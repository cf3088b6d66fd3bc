//! The demo: verifies traffic on every rung and compares its rates with routing and VXLAN.

mod flanneld;
pub mod kept;
pub mod lane;
pub mod options;
pub mod rates;
pub mod result;
mod services;
mod web;

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Result;

pub use options::Options;

use crate::{
    agent,
    comparison::Comparison,
    demo::{
        lane::{Connection, Lane},
        options::RungPair,
        rates::Rates,
    },
    progress::Progress,
    sandbox::{Kind, Sandbox, remove_kept},
    verify::CHECKS,
};

/// Runs the demo and prints its table. The exit code says whether everything was verified.
pub fn run(options: &Options) -> Result<ExitCode> {
    if services::serve(options)? {
        return Ok(ExitCode::SUCCESS);
    }
    if options.remove {
        println!("removed {} kept demo(s)", remove_kept()?);
        return Ok(ExitCode::SUCCESS);
    }
    let agent = agent::binary()?;
    Sandbox::remove_on_signals()?;
    let sandbox = Sandbox::start(Kind::Demo)?;
    let progress = Progress::start();
    progress.line(&format!(
        "two hosts, a container behind each; underlay: {}; agent: {}",
        options.underlay.name(),
        agent.display()
    ));

    let mut lanes = Vec::new();
    for comparison in [Comparison::Routed, Comparison::Vxlan] {
        lanes.push(verified(&sandbox, Connection::Comparison(comparison), options, &progress));
    }
    for RungPair { a, b } in options.pairs() {
        lanes.push(verified(&sandbox, Connection::Overlay(a, b), options, &progress));
    }
    measure(&mut lanes, options, &progress);
    let in_flannelds_place = flanneld::run(&sandbox, options, &progress);
    if let Err(error) = &in_flannelds_place {
        progress.step("flanneld", "FAILED", &format!("{error:#}"));
    }

    let by_name = services::run(&sandbox, options, &progress);
    if let Err(error) = &by_name {
        progress.step("services", "FAILED", &format!("{error:#}"));
    }

    let parts = [&in_flannelds_place, &by_name].map(|part| part.as_deref().unwrap_or_default());
    result::print(&lanes, options, &parts.join("\n"));
    if let Some(path) = &options.json {
        result::write_json(path, &lanes, options)?;
    }
    let mut failures: Vec<String> = lanes.iter().flat_map(Lane::failures).collect();
    failures.extend(in_flannelds_place.err().map(|error| format!("flanneld: {error:#}")));
    failures.extend(by_name.err().map(|error| format!("services: {error:#}")));
    drop(lanes);
    drop(sandbox);
    if options.keep {
        kept::leave_up(options)?;
    }
    if failures.is_empty() {
        println!("\neverything verified in {:.0} s", progress.seconds());
        return Ok(ExitCode::SUCCESS);
    }
    for failure in &failures {
        eprintln!("failed: {failure}");
    }
    eprintln!("error: {} verification(s) failed", failures.len());
    Ok(ExitCode::FAILURE)
}

/// Builds one lane and runs every check. Failures are recorded in the lane.
fn verified(sandbox: &Arc<Sandbox>, connection: Connection, options: &Options, progress: &Progress) -> Lane {
    let mut lane = Lane::new(connection, options.tcp_bytes());
    let name = lane.name();
    match lane.connect(sandbox, options.underlay) {
        Ok(seen) => progress.step(&name, "connect", &seen),
        Err(error) if connection == Connection::Comparison(Comparison::Vxlan) => {
            // Some kernels lack it, and only the ratios need it.
            progress.step(&name, "connect", &format!("not measured: {error:#}"));
            return lane;
        }
        Err(error) => {
            progress.step(&name, "connect", &format!("FAILED: {error:#}"));
            lane.fail("connect", &error);
            return lane;
        }
    }
    for check in CHECKS {
        match lane.check(check) {
            Ok(seen) => progress.step(&name, check.name, &seen),
            Err(error) => {
                progress.step(&name, check.name, &format!("FAILED: {error:#}"));
                lane.fail(check.name, &error);
            }
        }
    }
    match lane.read_counters() {
        Ok(Some(seen)) => progress.step(&name, "counters", &seen),
        Ok(None) => {}
        Err(error) => {
            progress.step(&name, "counters", &format!("FAILED: {error:#}"));
            lane.fail("counters", &error);
        }
    }
    lane
}

/// Measures all lanes in turn, in several rounds, so that noise on the machine affects all alike.
fn measure(lanes: &mut [Lane], options: &Options, progress: &Progress) {
    for round in 1..=options.rounds() {
        for lane in lanes.iter_mut() {
            let name = lane.name();
            let Some((a, b)) = lane.topology().map(|topology| topology.pods()) else { continue };
            let step = format!("rates, round {round} of {}", options.rounds());
            match Rates::measure(a, b) {
                Ok(rates) => {
                    progress.step(&name, &step, &rates.to_string());
                    lane.add_rates(rates);
                }
                Err(error) => {
                    progress.step(&name, &step, &format!("FAILED: {error:#}"));
                    lane.fail(&step, &error);
                }
            }
        }
    }
}

/// Duration of each measurement, per direction and round. iperf3 measures whole seconds.
pub(crate) const TCP_DURATION: Duration = Duration::from_secs(1);
/// See [`TCP_DURATION`].
pub(crate) const SMALL_DURATION: Duration = Duration::from_millis(400);
/// See [`TCP_DURATION`].
pub(crate) const TRIP_DURATION: Duration = Duration::from_millis(300);
