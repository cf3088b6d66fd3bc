//! `overlay-agent service top`: the traffic of services through this node, refreshed each second.

use std::{
    collections::BTreeMap,
    io::IsTerminal as _,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::Result;
use clap::{Args, builder::NonEmptyStringValueParser};
use comfy_table::CellAlignment;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    Output, QueryArgs,
    query::{print, table, write_line},
};
use crate::{
    control::{self, Query},
    service::{
        ServiceName, dns,
        latency::Latencies,
        proxy::HttpCounts,
        record::{EndpointState, Protocol},
        traffic::{EndpointTraffic, ServiceTraffic, Traffic, TrafficCounts},
    },
};

pub(super) const AFTER_HELP: &str = "\
Examples:
  overlay-agent service top
  overlay-agent service top shop --limit 5
  overlay-agent service top shop/web --interval 10
  overlay-agent service top --once -o json

The services with the most new connections per second come first, and so do the endpoints of each. All other numbers are those \
since the agent's start. P50 and P99 are the times in which TCP connections were established: of the interval if it had some, else of \
all. FAILED counts connections that an endpoint refused, reset or did not answer, REFUSED calls without a usable endpoint. Bytes are \
those that pass the proxy: the eBPF programs see connections and no payload, and an endpoint of several services has the connections of \
all of them in each.";

#[derive(Clone, Debug, Args)]
pub(super) struct TopArgs {
    /// Only the services of a namespace, or one service
    #[arg(value_name = "NAMESPACE[/NAME]", value_parser = NonEmptyStringValueParser::new())]
    filter: Option<String>,
    /// Most services, and most endpoints of each; 0 for all
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    limit: usize,
    /// Seconds between two readings of the counters
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3600))]
    interval: u32,
    /// Print one table, or one JSON document, after one interval; without, JSON is one object per line
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    query: QueryArgs,
}

/// The traffic within an interval. The JSON names are stable: scripts read them.
#[derive(Debug, PartialEq, Serialize)]
struct Top {
    /// Length of the interval.
    seconds: f64,
    /// The busiest first.
    services: Vec<ServiceRow>,
    /// Services that the filter permits and the limit does not.
    more_services: usize,
    dns: Option<DnsRow>,
    uncounted: Option<String>,
    proxy_refused: u64,
}

#[derive(Debug, PartialEq, Serialize)]
struct ServiceRow {
    name: ServiceName,
    vip: Option<Ipv4Addr>,
    #[serde(flatten)]
    rates: Rates,
    /// Requests through the proxy, in all.
    http: HttpCounts,
    /// The busiest first.
    endpoints: Vec<EndpointRow>,
    more_endpoints: usize,
}

#[derive(Debug, PartialEq, Serialize)]
struct EndpointRow {
    protocol: Protocol,
    address: SocketAddrV4,
    endpoint: Option<String>,
    state: Option<EndpointState>,
    #[serde(flatten)]
    rates: Rates,
}

/// Totals since the agent's start, and what was added within the interval.
#[derive(Debug, PartialEq, Serialize)]
struct Rates {
    connections: u64,
    connections_per_second: f64,
    picks: u64,
    picks_per_second: f64,
    failures: u64,
    failures_per_second: f64,
    refused: u64,
    refused_per_second: f64,
    open: u64,
    bytes_to_endpoints: u64,
    bytes_to_endpoints_per_second: f64,
    bytes_to_clients: u64,
    bytes_to_clients_per_second: f64,
    /// Of all connections; `null` without any.
    latency: Option<Quantiles>,
    /// Of those of the interval; `null` without any.
    recent_latency: Option<Quantiles>,
}

/// Times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Quantiles {
    p50_us: f64,
    p99_us: f64,
}

#[derive(Debug, PartialEq, Serialize)]
struct DnsRow {
    queries_per_second: f64,
    #[serde(flatten)]
    counters: dns::Counters,
}

/// Prints the traffic until the agent ends or the reader of the output does.
pub(super) async fn top(args: TopArgs) -> Result<()> {
    let socket = args.query.agent.socket();
    let read = || control::query::<Traffic>(&socket, Query::Traffic);
    let mut ticks = interval(Duration::from_secs(args.interval.into()));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let (mut before, mut read_at) = (read().await?, Instant::now());
    let is_terminal = std::io::stdout().is_terminal();
    loop {
        ticks.tick().await;
        let (now, now_at) = (read().await?, Instant::now());
        let top = Top::new(&before, &now, now_at - read_at, args.filter.as_deref(), args.limit);
        (before, read_at) = (now, now_at);
        if args.once {
            return print(args.query.output, &top, text);
        }
        let open = match args.query.output {
            Output::Json => write_line(&serde_json::to_string(&top)?)?,
            // Moves the cursor home and erases what is below it (ECMA-48).
            Output::Text if is_terminal => write_line(&format!("\x1b[H\x1b[J{}", text(&top)))?,
            Output::Text => write_line(&format!("{}\n", text(&top)))?,
        };
        if !open {
            return Ok(());
        }
    }
}

impl Top {
    fn new(before: &Traffic, now: &Traffic, time: Duration, filter: Option<&str>, limit: usize) -> Self {
        let seconds = time.as_secs_f64();
        let limit = if limit == 0 { usize::MAX } else { limit };
        let is_wanted = |service: &&ServiceTraffic| {
            filter.is_none_or(|filter| {
                let name = service.name.to_string();
                name == filter || name.split('/').next() == Some(filter)
            })
        };
        let earlier: BTreeMap<_, _> =
            before.services.iter().map(|service| (&service.name, service)).collect();
        // The order is stable: with equal numbers, by name.
        let mut services: Vec<_> = now
            .services
            .iter()
            .filter(is_wanted)
            .map(|service| ServiceRow::new(earlier.get(&service.name).copied(), service, seconds, limit))
            .collect();
        services.sort_by(|a, b| b.rates.order(&a.rates));
        let more_services = services.len().saturating_sub(limit);
        services.truncate(limit);
        let dns = now.dns.map(|counters| {
            let earlier = before.dns.unwrap_or_default().queries;
            DnsRow { queries_per_second: per_second(earlier, counters.queries, seconds), counters }
        });
        let (uncounted, proxy_refused) = (now.uncounted.clone(), now.proxy_refused);
        Self { seconds, services, more_services, dns, uncounted, proxy_refused }
    }
}

impl ServiceRow {
    fn new(before: Option<&ServiceTraffic>, now: &ServiceTraffic, seconds: f64, limit: usize) -> Self {
        let earlier = |endpoint: &EndpointTraffic| {
            let known = before?.endpoints.iter();
            let known = known.filter(|known| known.protocol == endpoint.protocol);
            known.clone().find(|known| known.address == endpoint.address).map(|known| &known.counts)
        };
        let rows = now.endpoints.iter().map(|endpoint| EndpointRow {
            protocol: endpoint.protocol,
            address: endpoint.address,
            endpoint: endpoint.endpoint.clone(),
            state: endpoint.state,
            rates: Rates::new(earlier(endpoint), &endpoint.counts, seconds),
        });
        let mut endpoints: Vec<_> = rows.collect();
        endpoints.sort_by(|a, b| b.rates.order(&a.rates));
        let more_endpoints = endpoints.len().saturating_sub(limit);
        endpoints.truncate(limit);
        let rates = Rates::new(before.map(|before| &before.counts), &now.counts, seconds);
        Self { name: now.name.clone(), vip: now.vip, rates, http: now.http, endpoints, more_endpoints }
    }
}

impl Rates {
    /// What is new counts from 0 on.
    fn new(before: Option<&TrafficCounts>, now: &TrafficCounts, seconds: f64) -> Self {
        let before = before.copied().unwrap_or_default();
        let rate = |value: fn(&TrafficCounts) -> u64| per_second(value(&before), value(now), seconds);
        Self {
            connections: now.connections,
            connections_per_second: rate(|counts| counts.connections),
            picks: now.picks,
            picks_per_second: rate(|counts| counts.picks),
            failures: now.failures,
            failures_per_second: rate(|counts| counts.failures),
            refused: now.refused,
            refused_per_second: rate(|counts| counts.refused),
            open: now.open,
            bytes_to_endpoints: now.bytes_to_endpoints,
            bytes_to_endpoints_per_second: rate(|counts| counts.bytes_to_endpoints),
            bytes_to_clients: now.bytes_to_clients,
            bytes_to_clients_per_second: rate(|counts| counts.bytes_to_clients),
            latency: Quantiles::of(&now.latency),
            recent_latency: Quantiles::of(&now.latency.since(&before.latency)),
        }
    }

    /// By new connections, then by all.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let rates = self.connections_per_second.total_cmp(&other.connections_per_second);
        rates.then(self.connections.cmp(&other.connections))
    }
}

impl Quantiles {
    fn of(latencies: &Latencies) -> Option<Self> {
        Some(Self { p50_us: latencies.quantile(0.5)?, p99_us: latencies.quantile(0.99)? })
    }
}

/// The growth of a counter. One that begins again grows from 0.
fn per_second(before: u64, now: u64, seconds: f64) -> f64 {
    let growth = now.checked_sub(before).unwrap_or(now);
    if seconds > 0.0 { growth as f64 / seconds } else { 0.0 }
}

fn text(top: &Top) -> String {
    let mut lines = Vec::new();
    if let Some(why) = &top.uncounted {
        lines.push(format!("TCP connections by eBPF are not counted, their attempts are shown: {why}"));
    }
    if top.proxy_refused > 0 {
        lines
            .push(format!("the proxy refused {} connections because there were too many", top.proxy_refused));
    }
    lines.extend(top.dns.as_ref().map(dns_line));
    if top.services.is_empty() {
        lines.push("no services".to_owned());
        return lines.join("\n");
    }
    let mut table = table();
    table.set_header([
        "SERVICE",
        "CONN/S",
        "TOTAL",
        "FAILED",
        "REFUSED",
        "OPEN",
        "P50",
        "P99",
        "TO ENDPOINT",
        "TO CLIENT",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for service in &top.services {
        let vip = service.vip.map_or_else(|| "no address".to_owned(), |vip| vip.to_string());
        table.add_row(row(format!("{} ({vip})", service.name), &service.rates));
        for endpoint in &service.endpoints {
            table.add_row(row(endpoint_name(endpoint), &endpoint.rates));
        }
        if service.more_endpoints > 0 {
            table.add_row([format!("  {} more", service.more_endpoints)]);
        }
    }
    if !lines.is_empty() {
        lines.push(String::new());
    }
    lines.push(table.to_string());
    lines.extend(top.services.iter().filter(|service| service.http.requests > 0).map(http_line));
    if top.more_services > 0 {
        lines.push(format!("{} more services: raise --limit", top.more_services));
    }
    lines.join("\n")
}

fn dns_line(dns: &DnsRow) -> String {
    let DnsRow { queries_per_second, counters } = dns;
    format!(
        "DNS: {queries_per_second:.1} queries/s, {} in all: {} without such a name, {} failed, {} to upstream servers, {} from the cache",
        counters.queries, counters.no_name, counters.failed, counters.forwarded, counters.cache_hits
    )
}

fn http_line(ServiceRow { name, http, .. }: &ServiceRow) -> String {
    format!(
        "HTTP {name}: {} requests, {} without an answer of an endpoint, {} sent again; responses: {} 1xx, {} 2xx, {} 3xx, {} 4xx, {} 5xx",
        http.requests,
        http.failures,
        http.retries,
        http.status_1xx,
        http.status_2xx,
        http.status_3xx,
        http.status_4xx,
        http.status_5xx
    )
}

/// `  tcp 10.244.2.2:8080 node-b/1, draining`.
fn endpoint_name(row: &EndpointRow) -> String {
    let name = row.endpoint.as_deref().unwrap_or("removed");
    let state = match row.state {
        None | Some(EndpointState::Ready) => String::new(),
        Some(state) => format!(", {}", format!("{state:?}").to_lowercase()),
    };
    format!("  {} {} {name}{state}", row.protocol.name(), row.address)
}

fn row(name: String, rates: &Rates) -> [String; 10] {
    let latency = rates.recent_latency.or(rates.latency);
    let time = |value: fn(&Quantiles) -> f64| {
        latency.as_ref().map_or_else(|| "-".to_owned(), |all| microseconds(value(all)))
    };
    [
        name,
        format!("{:.1}", rates.connections_per_second),
        rates.connections.to_string(),
        rates.failures.to_string(),
        rates.refused.to_string(),
        rates.open.to_string(),
        time(|all| all.p50_us),
        time(|all| all.p99_us),
        bytes(rates.bytes_to_endpoints),
        bytes(rates.bytes_to_clients),
    ]
}

/// A time in two or three digits: `85 us`, `1.2 ms`.
fn microseconds(time: f64) -> String {
    match time {
        time if time < 1e3 => format!("{time:.0} us"),
        time if time < 1e6 => format!("{:.1} ms", time / 1e3),
        time => format!("{:.1} s", time / 1e6),
    }
}

fn bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    if bytes == 0 {
        return "-".to_owned();
    }
    let mut unit = "B";
    for larger in units {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    match unit {
        "B" => format!("{bytes} B"),
        _ => format!("{value:.1} {unit}"),
    }
}

#[cfg(test)]
#[path = "top_tests.rs"]
mod tests;
