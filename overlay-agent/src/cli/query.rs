//! `overlay-agent status`, `routes` and `counters`.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Write as _},
};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use overlay_ebpf::reason::{DropReason, PuntReason};
use serde::{Serialize, de::DeserializeOwned};

use super::{Output, QueryArgs};
use crate::{
    control::{self, Question},
    report::{CounterList, RouteList, Status},
};

pub(super) async fn query(args: &QueryArgs, question: Question) -> Result<()> {
    match question {
        Question::Status => show(args, question, status).await,
        Question::Routes => show(args, question, routes).await,
        Question::Counters => show(args, question, counters).await,
    }
}

async fn show<T: Serialize + DeserializeOwned>(
    args: &QueryArgs,
    question: Question,
    text: fn(&T) -> String,
) -> Result<()> {
    let answer: T = control::ask(&control::path(&args.agent.run_dir, &args.agent.device), question).await?;
    print(args.output, &answer, text)
}

/// Prints an answer in the form that was asked for.
pub(super) fn print<T: Serialize>(output: Output, answer: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match output {
        Output::Json => serde_json::to_string_pretty(answer)?,
        Output::Text => text(answer),
    };
    match writeln!(std::io::stdout(), "{text}") {
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("write to standard output"),
    }
}

fn status(status: &Status) -> String {
    let mut table = table();
    let store = match &status.store.lost {
        None => status.store.name.clone(),
        Some(why) => format!("{}, which cannot be read: {why}", status.store.name),
    };
    let device = |device: &crate::report::Device| {
        format!("{} (index {}, MTU {})", device.name, device.ifindex, device.mtu)
    };
    let rung = |choice: &crate::datapath::Choice| {
        format!("{} ({})", format!("{:?}", choice.rung).to_lowercase(), choice.why)
    };
    for (name, value) in [
        ("state", [std::slice::from_ref(&status.state), &status.problems].concat().join("; ")),
        ("subnet", format!("{} of {}", status.subnet, status.network)),
        ("public address", format!("{} port {}", status.public_ip, status.port)),
        ("overlay device", device(&status.device)),
        ("underlay device", device(&status.underlay)),
        ("egress", rung(&status.egress)),
        ("ingress", rung(&status.ingress)),
        ("routes", status.routes.to_string()),
        ("store", store),
        ("packets dropped", status.drops.to_string()),
        ("agent", format!("{} (process {})", status.version, status.pid)),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    table.to_string()
}

fn routes(list: &RouteList) -> String {
    let mut table = table();
    table.set_header(["SUBNET", "PEER"]);
    for route in &list.routes {
        table.add_row([route.subnet.to_string(), route.peer.to_string()]);
    }
    let mut text = table.to_string();
    if !list.skipped.is_empty() {
        let mut skipped = self::table();
        skipped.set_header(["RECORD", "WHY IT IS NO ROUTE"]);
        for record in &list.skipped {
            skipped.add_row([&record.record, &record.why]);
        }
        text.push_str(&format!("\n\n{skipped}"));
    }
    text
}

fn counters(list: &CounterList) -> String {
    let mut traffic = table();
    traffic.set_header(["", "FAST PATH", "", "SLOW PATH", ""]);
    let value = |name: String| list.traffic.get(&name).copied().unwrap_or_default();
    for direction in ["egress", "ingress"] {
        let mut row = vec![direction.to_owned()];
        for path in ["fast", "slow"] {
            row.push(format!("{} packets", value(format!("{direction}_{path}_packets"))));
            row.push(format!("{} bytes", value(format!("{direction}_{path}_bytes"))));
        }
        traffic.add_row(row);
    }
    let punts = PuntReason::ALL.iter().map(|reason| (reason.name(), reason.describe()));
    let drops = DropReason::ALL.iter().map(|reason| (reason.name(), reason.describe()));
    format!(
        "{traffic}\n\n{}\n\n{}",
        reasons("HANDED TO THE SLOW PATH", &list.punts, punts),
        reasons("DROPPED", &list.drops, drops)
    )
}

/// Only what happened: a long list of zeros hides the one that matters.
fn reasons(
    title: &str,
    counts: &BTreeMap<String, u64>,
    known: impl Iterator<Item = (&'static str, &'static str)>,
) -> String {
    let mut table = table();
    table.set_header([title, "PACKETS", ""]);
    let mut nothing = true;
    for (name, text) in known {
        if let Some(count) = counts.get(name).filter(|count| **count > 0) {
            nothing = false;
            table.add_row([name, &count.to_string(), text]);
        }
    }
    if nothing {
        table.add_row(["none"]);
    }
    table.to_string()
}

pub(super) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}
