//! `overlay-agent status`, `routes` and `counters`.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use comfy_table::{Table, presets};
use overlay_ebpf::reason::{DropReason, PuntReason};
use serde::{Serialize, de::DeserializeOwned};

use super::{AgentArgs, Output, QueryArgs, datapath};
use crate::{
    control::{self, NoAgent, Query, Responses},
    datapath::{KernelDrops, RungChanges},
    device,
    left::Left,
    netlink::Netlink,
    report::{self, Bypass, CounterList, RouteList, Status},
};

/// The exit code where no agent runs, and what one that has ended left was shown: as of service scripts for a service that does not
/// run.
pub(super) const ABSENT: u8 = 3;

/// Prints the answer to a query, as JSON or by `text`. Where no agent runs and one that has ended left its programs, `left` answers
/// with what they do, and the exit code is [`ABSENT`].
pub(super) async fn query<T: Serialize + DeserializeOwned>(
    args: &QueryArgs,
    query: Query,
    text: fn(&T) -> String,
    left: fn(&Left, &AgentArgs, &NoAgent) -> T,
) -> Result<ExitCode> {
    let error = match control::query::<T>(&args.agent.socket(), query).await {
        Ok(answer) => {
            print(args.output, &answer, text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => error,
    };
    let Some(absent) = error.downcast_ref::<NoAgent>() else { return Err(error) };
    let Some(found) = find_left(&args.agent).await? else { return Err(error) };
    print(args.output, &left(&found, &args.agent, absent), text)?;
    Ok(ExitCode::from(ABSENT))
}

/// Prints the answer of the agent that runs. Fails when there is none.
pub(super) async fn ask<T: Serialize + DeserializeOwned>(
    args: &QueryArgs,
    query: Query,
    text: fn(&T) -> String,
) -> Result<()> {
    let answer = control::query::<T>(&args.agent.socket(), query).await?;
    print(args.output, &answer, text)
}

/// Fails when an agent with another run directory has the device, or what is left cannot be read.
async fn find_left(args: &AgentArgs) -> Result<Option<Left>> {
    let netlink = Netlink::connect()?;
    let found = Left::find(&netlink, &args.device, &args.run_dir).await?;
    // The first process keeps the device of an agent that it is about to start again.
    let holder = device::holders(&args.device).into_iter().find(|pid| *pid != 1);
    match holder.filter(|_| found.is_some()) {
        Some(pid) => bail!(
            "no agent answers at {}, and process {pid} holds the device {}: name its --run-dir if it is an agent",
            args.socket().display(),
            args.device
        ),
        None => Ok(found),
    }
}

/// `status` of what is left.
pub(super) fn left_status(left: &Left, args: &AgentArgs, why: &NoAgent) -> Status {
    left.status(&args.device, why.to_string())
}

/// `routes` of what is left.
pub(super) fn left_routes(left: &Left, _: &AgentArgs, _: &NoAgent) -> RouteList {
    left.routes()
}

/// `counters` of what is left.
pub(super) fn left_counters(left: &Left, _: &AgentArgs, _: &NoAgent) -> CounterList {
    left.counters()
}

/// Prints the state whenever it changes, until the agent ends or the reader of the output does.
pub(super) async fn watch_status(args: &QueryArgs) -> Result<()> {
    let mut responses = Responses::open(&args.agent.socket(), Query::Status, true).await?;
    while let Some(answer) = responses.next::<Status>().await? {
        let open = match (answer, args.output) {
            (Ok(state), Output::Json) => write_line(&serde_json::to_string(&state)?)?,
            (Ok(state), Output::Text) => write_line(&format!("{}\n", status(&state)))?,
            (Err(error), _) => {
                eprintln!("warning: the agent reports: {error}");
                true
            }
        };
        if !open {
            return Ok(());
        }
    }
    bail!("the agent ended")
}

/// Prints an answer in the selected format.
pub(super) fn print<T: Serialize>(output: Output, answer: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    let text = match output {
        Output::Json => serde_json::to_string_pretty(answer)?,
        Output::Text => text(answer),
    };
    write_line(&text).map(drop)
}

/// `false` when the reader has closed its end, as `head` does; that is no error.
pub(super) fn write_line(text: &str) -> Result<bool> {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("write to standard output"),
    }
}

pub(super) fn status(status: &Status) -> String {
    let mut table = table();
    let store = match &status.store.lost {
        Some(_) if status.agent == "absent" => status.store.name.clone(),
        None => status.store.name.clone(),
        Some(why) => format!("{}, which cannot be read: {why}", status.store.name),
    };
    let device = |device: &crate::report::Device| {
        format!("{} (index {}, MTU {})", device.name, device.ifindex, device.mtu)
    };
    // A part that is missing, because the agent starts or lost it, has no line.
    let subnet = status.subnet.zip(status.network).map(|(subnet, network)| format!("{subnet} of {network}"));
    let address = status.public_ip.zip(status.port).map(|(address, port)| format!("{address} port {port}"));
    let other_underlays: Vec<_> = status.other_underlays.iter().map(device).collect();
    let other_underlays = Some(other_underlays.join(", ")).filter(|names| !names.is_empty());
    let routes = match status.slow_routes {
        0 => status.routes.to_string(),
        slow => format!("{}, {slow} on the slow path (`overlay-agent routes` says why)", status.routes),
    };
    let agent = match status.agent.as_str() {
        "absent" => "none".to_owned(),
        _ => format!("{} (process {})", status.version, status.pid),
    };
    let store = if store.is_empty() { "unknown".to_owned() } else { store };
    for (name, value) in [
        ("state", Some([std::slice::from_ref(&status.state), &status.problems].concat().join("; "))),
        ("subnet", subnet),
        ("public address", address),
        ("overlay device", status.device.as_ref().map(device)),
        ("underlay device", status.underlay.as_ref().map(device)),
        ("other underlay devices", other_underlays),
        ("datapath", status.datapath.as_ref().map(datapath::requested)),
        ("egress", status.egress.as_ref().map(datapath::active)),
        ("ingress", status.ingress.as_ref().map(datapath::active)),
        ("frozen since", status.frozen.as_ref().map(frozen_since)),
        ("lease ends", status.frozen.as_ref().map(lease_ends)),
        ("programs", status.frozen.as_ref().map(programs)),
        ("without the agent", status.without_agent.as_ref().map(without_agent)),
        ("bypass", status.bypass.as_ref().map(bypass)),
        ("services", status.services.as_ref().map(services)),
        ("routes", Some(routes)),
        ("store", Some(store)),
        ("packets dropped", Some(status.drops.to_string())),
        ("agent", Some(agent)),
    ] {
        if let Some(value) = value {
            table.add_row([name.to_owned(), value]);
        }
    }
    table.to_string()
}

fn frozen_since(frozen: &report::Frozen) -> String {
    let since = frozen.since.clone().unwrap_or_else(|| "an unknown time".to_owned());
    match frozen.neighbours_stale {
        true => format!("{since}; the kernel looks up neighbours, and nothing skips the host's stack"),
        false => since,
    }
}

fn lease_ends(frozen: &report::Frozen) -> String {
    match (&frozen.lease_ends, frozen.lease_ended, &frozen.since) {
        (Some(end), true, _) => format!("{end}, which has passed"),
        (Some(end), false, _) => end.clone(),
        (None, _, Some(_)) => "never, or it was not confirmed".to_owned(),
        (None, _, None) => "unknown".to_owned(),
    }
}

fn programs(frozen: &report::Frozen) -> String {
    let programs = frozen.programs.iter().map(|program| {
        let device =
            program.device.clone().unwrap_or_else(|| format!("device {}, which is gone", program.ifindex));
        let state = if program.attached { "on" } else { "NOT on" };
        format!("{} {state} {device}", program.program)
    });
    programs.collect::<Vec<_>>().join(", ")
}

fn without_agent(without: &report::WithoutAgent) -> String {
    let verb = if without.forwards { "forwarding goes on" } else { "forwarding stops" };
    format!("{verb} ({})", without.why)
}

fn services(services: &report::Services) -> String {
    let report::Services { services, endpoints, skipped, load_balancer, without_agent, dns, down, ejected } =
        services;
    if *services == 0 {
        return "none yet".to_owned();
    }
    let skipped = match skipped {
        0 => String::new(),
        _ => format!(", {skipped} records left out (`overlay-agent service list` says why)"),
    };
    let dns = dns.map_or_else(|| "no DNS server".to_owned(), |address| format!("DNS at {address}"));
    let down: String = down.iter().map(|why| format!("; down: {why}")).collect();
    let ejected = ejected.iter().map(|ejected| {
        let report::EjectedEndpoint { endpoint, address, protocol, left_s } = ejected;
        let protocol = protocol.name();
        format!("; connections to {endpoint} at {protocol} {address} fail: it gets none for {left_s} s")
    });
    let ejected: String = ejected.collect();
    let without = without_agent.as_ref().map(|without| {
        let verb = if without.forwards { "goes on" } else { "stops" };
        format!(", and {verb} without the agent ({})", without.why)
    });
    let without = without.unwrap_or_default();
    format!(
        "{services} with {endpoints} endpoints{skipped}; load balancing: {load_balancer}{without}; {dns}{down}{ejected}"
    )
}

fn bypass(bypass: &report::Bypass) -> String {
    let Bypass { mode, why, devices, containers, skipped } = bypass;
    let size = match mode.as_str() {
        "off" => String::new(),
        _ => format!(", {containers} containers behind {devices} devices"),
    };
    let skipped: String = skipped.iter().map(|why| format!("; {why}")).collect();
    format!("{mode} ({why}){size}{skipped}")
}

pub(super) fn routes(list: &RouteList) -> String {
    let mut table = table();
    table.set_header(["SUBNET", "PEER", "DEVICE", "LINK ADDRESS", "MTU", "SLOW PATH BECAUSE"]);
    for route in &list.routes {
        table.add_row([
            route.subnet.to_string(),
            route.peer.to_string(),
            route.device.clone().unwrap_or_else(|| "unreachable".to_owned()),
            route.link_address.clone().unwrap_or_default(),
            route.mtu.map_or_else(String::new, |mtu| mtu.to_string()),
            route.slow_path.clone().unwrap_or_default(),
        ]);
    }
    let mut text = table.to_string();
    if !list.skipped.is_empty() {
        let mut skipped = self::table();
        skipped.set_header(["RECORD", "SKIPPED BECAUSE"]);
        for record in &list.skipped {
            skipped.add_row([&record.record, &record.why]);
        }
        text.push_str(&format!("\n\n{skipped}"));
    }
    text
}

pub(super) fn counters(list: &CounterList) -> String {
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
    let punts = reasons(["PUNTED TO THE SLOW PATH", "PACKETS"], &list.punts, punts);
    let drops = reasons(["DROPPED", "PACKETS"], &list.drops, drops);
    let kernel = KernelDrops::DESCRIPTIONS.into_iter();
    let kernel = reasons(["DROPPED BY THE KERNEL", "PACKETS"], &list.kernel, kernel);
    let rungs = reasons(["CHANGES OF THE DATAPATH", ""], &list.rungs, RungChanges::DESCRIPTIONS.into_iter());
    let changes: Vec<_> = list.route_changes.iter().map(|(name, count)| format!("{count} {name}")).collect();
    let changes = match changes.is_empty() {
        true => String::new(),
        false => format!("\n\nroutes in the kernel's map: {}", changes.join(", ")),
    };
    format!("{traffic}\n\n{punts}\n\n{drops}\n\n{kernel}\n\n{rungs}{changes}")
}

/// Lists the reasons that were counted; zeros would hide the counts that matter.
fn reasons<'a>(
    [title, unit]: [&str; 2],
    counts: &BTreeMap<String, u64>,
    known: impl Iterator<Item = (&'a str, &'a str)>,
) -> Table {
    let mut table = table();
    table.set_header([title, unit, ""]);
    table.add_rows(known.filter_map(|(name, text)| {
        let count = counts.get(name).filter(|count| **count > 0)?;
        Some([name.to_owned(), count.to_string(), text.to_owned()])
    }));
    if table.is_empty() {
        table.add_row(["none"]);
    }
    table
}

pub(super) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}
