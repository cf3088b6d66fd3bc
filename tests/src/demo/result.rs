//! Output of the demo: the table, next steps, and the results as JSON.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    comparison::Comparison,
    demo::{
        lane::{Connection, Lane},
        options::Options,
        rates::Rates,
    },
    table::{Row, render},
};

const TITLES: [&str; 11] = [
    "rung A/B",
    "TCP A>B\nGbit/s",
    "TCP B>A\nGbit/s",
    "TCP\nx vxlan",
    "small A>B\nkpps",
    "small B>A\nkpps",
    "small\nx vxlan",
    "round trip\nus",
    "packets\nfast / slow",
    "drops",
    "verified",
];

/// Prints the table, the output of the other parts, and next steps.
pub fn print(lanes: &[Lane], options: &Options, others: &str) {
    let vxlan = vxlan_rates(lanes);
    let rows: Vec<Row> = lanes.iter().map(|lane| row(lane, vxlan.as_ref())).collect();
    println!("\n{}", render(&TITLES, &rows));
    println!(
        "Underlay: {}. Rates container to container: one TCP stream, 64-byte UDP from one thread, one byte each way over TCP; \
         median\nof {} round(s). Packets and drops: of the verified traffic, both hosts; a packet of many segments counts once. \
         Verified: ping\nwith its TTL, UDP of every size, in fragments and segmented, {} MiB over TCP each way by SHA-256; each \
         host to host and\ncontainer to container.",
        options.underlay.name(),
        options.rounds(),
        options.tcp_bytes() >> 20,
    );
    println!("\n{others}\n{NEXT}");
}

const NEXT: &str = "
Next steps:
  cargo xtask demo --underlay wire     the same over frames of MTU size, as on a cable
  cargo xtask demo --keep              leave two hosts running, with status, routes and counters of their agents
  cargo xtask test                     every test
  README.md, ARCHITECTURE.md           use on real hosts, and the design";

/// Writes the table's numbers.
pub fn write_json(path: &Path, lanes: &[Lane], options: &Options) -> Result<()> {
    let vxlan = vxlan_rates(lanes);
    let rows: Vec<serde_json::Value> = lanes.iter().map(|lane| json_row(lane, vxlan.as_ref())).collect();
    let report = json!({
        "underlay": options.underlay.name(),
        "rounds": options.rounds(),
        "tcp_bytes": options.tcp_bytes(),
        "rows": rows,
    });
    let text = serde_json::to_string_pretty(&report).context("format the results")?;
    fs::write(path, text + "\n").with_context(|| format!("write the results to {}", path.display()))
}

fn json_row(lane: &Lane, vxlan: Option<&Rates>) -> serde_json::Value {
    let rates = lane.rates();
    let ratio = |of: fn(&Rates, &Rates) -> f64| Some(of(rates.as_ref()?, vxlan?));
    json!({
        "name": lane.name(),
        "rates": rates,
        "tcp_to_vxlan": ratio(Rates::tcp_ratio),
        "small_to_vxlan": ratio(Rates::kpps_ratio),
        "packets_fast": lane.fast(),
        "packets_slow": lane.slow(),
        "drops": lane.drops(),
        "failures": lane.failures(),
    })
}

fn vxlan_rates(lanes: &[Lane]) -> Option<Rates> {
    lanes.iter().find(|lane| lane.connection() == Connection::Comparison(Comparison::Vxlan))?.rates()
}

fn row(lane: &Lane, vxlan: Option<&Rates>) -> Row {
    let rates = lane.rates();
    let rate = |of: fn(&Rates) -> f64, digits: usize| {
        rates.as_ref().map_or_else(nothing, |rates| format!("{:.digits$}", of(rates)))
    };
    let ratio = |of: fn(&Rates, &Rates) -> f64| {
        rates.as_ref().zip(vxlan).map_or_else(nothing, |(rates, vxlan)| format!("{:.2}", of(rates, vxlan)))
    };
    let packets = lane.fast().zip(lane.slow());
    let cells = vec![
        lane.name(),
        rate(|rates| rates.tcp_there, 1),
        rate(|rates| rates.tcp_back, 1),
        ratio(Rates::tcp_ratio),
        rate(|rates| rates.kpps_there, 0),
        rate(|rates| rates.kpps_back, 0),
        ratio(Rates::kpps_ratio),
        rate(|rates| rates.trip, 1),
        packets.map_or_else(nothing, |(fast, slow)| format!("{fast} / {slow}")),
        lane.drops().map_or_else(nothing, |drops| drops.to_string()),
        lane.verified(),
    ];
    Row { cells }
}

fn nothing() -> String {
    "-".to_owned()
}
