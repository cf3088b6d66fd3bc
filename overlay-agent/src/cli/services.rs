//! `overlay-agent service`: lists the services in the store, shows one, writes and removes them; `top` is in a file of its own.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use ipnet::Ipv4Net;
use serde::Serialize;

use super::{
    StoreQuery,
    config::read_input,
    query::{print, table},
    top,
};
use crate::{
    config::NetworkConfig,
    printable::{LONGEST_NAME, LONGEST_REASON, printable},
    service::{
        Catalog, ServiceName,
        catalog::{Endpoint, Service, Skipped},
        input::{self, LONGEST_INPUT},
        record::{self, EndpointState, Endpoints, Services, Vip, Vips},
        route::Route,
        vip,
    },
    store::{Record, Store, StoreError},
};

const LIST_AFTER_HELP: &str = "\
Examples:
  overlay-agent service list --etcd-endpoints http://192.168.77.10:2379
  overlay-agent service list --store dir:/var/lib/overlay -o json

ENDPOINTS is the number of endpoints that are ready, of all. Records that agents skip are listed with the reason.";

const SHOW_AFTER_HELP: &str = "\
Examples:
  overlay-agent service show shop/web
  overlay-agent service show shop/web --store dir:/var/lib/overlay -o json";

const SET_AFTER_HELP: &str = "\
Examples:
  overlay-agent service set web.yaml
  overlay-agent service set '{name: shop/web, ports: [{name: http, port: 80, target_port: 8080}]}'
  overlay-agent service set - --store dir:/var/lib/overlay < services.json

The input is one service with its name, or a map of services by their names:
  shop/web:
    ports: [{name: http, port: 80, protocol: tcp, target_port: 8080, app: http}]
    vip: 10.251.0.10                         # without: agents assign an address of the pool
    headless: false                          # true: no address, DNS answers with the endpoints
    lb: {policy: round_robin}                # random, least_conn, source_hash, maglev
    affinity: {client_ip: true, ttl_s: 600}
    locality: any                            # prefer_node, prefer_zone, local_only
    health: {kind: http, path: /healthz}     # or kind: tcp; interval_ms, timeout_ms, fall, rise, slow_start_s
  shop/front:
    ports:
      - {name: http, port: 80, app: http, routes: [{host: '*.shop.example', path_prefix: /api, service: shop/web, port: http}]}
  bank/db: {ports: [{name: pg, port: 5432}]}

Input that cannot be used is refused as a whole: then no service is written. Endpoints are written with `overlay-agent endpoint`.";

const REMOVE_AFTER_HELP: &str = "\
Examples:
  overlay-agent service remove shop/web
  overlay-agent service remove not-a-service --store dir:/var/lib/overlay

NAME is NAMESPACE/NAME, or the key of a record that agents skip, without `services/`. The virtual address is kept from other \
services for two minutes. Endpoints stay in the store.";

#[derive(Debug, Subcommand)]
pub(super) enum ServiceCommand {
    /// List the services: virtual address, ports and endpoints, and the records that agents skip
    #[command(args_override_self = true, after_help = LIST_AFTER_HELP)]
    List(StoreQuery),
    /// Show one service with its endpoints
    #[command(args_override_self = true, after_help = SHOW_AFTER_HELP)]
    Show(ShowArgs),
    /// Write services from YAML or JSON
    #[command(args_override_self = true, after_help = SET_AFTER_HELP)]
    Set(SetArgs),
    /// Remove a service
    #[command(args_override_self = true, after_help = REMOVE_AFTER_HELP)]
    Remove(RemoveArgs),
    /// Show the connections, failures and connect times of services through this node, from the running agent
    #[command(args_override_self = true, after_help = top::AFTER_HELP)]
    Top(top::TopArgs),
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Service, for example shop/web
    #[arg(value_name = "NAMESPACE/NAME")]
    name: ServiceName,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// Services: a file, - for standard input, or YAML or JSON that begins with a brace
    #[arg(value_name = "FILE|-|JSON", value_parser = NonEmptyStringValueParser::new())]
    input: String,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Service, or key of a record
    #[arg(value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    name: String,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Serialize)]
struct ServiceList {
    services: Vec<Row>,
    /// Records that agents skip.
    skipped: Vec<Skipped>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: ServiceName,
    vip: Option<Ipv4Addr>,
    headless: bool,
    ports: Vec<record::Port>,
    /// Endpoints that take new connections.
    ready: usize,
    endpoints: usize,
}

#[derive(Debug, Serialize)]
struct Shown {
    name: ServiceName,
    vip: Option<Ipv4Addr>,
    service: record::Service,
    endpoints: Vec<ShownEndpoint>,
    /// Records of it that agents skip.
    skipped: Vec<Skipped>,
}

#[derive(Debug, Serialize)]
struct ShownEndpoint {
    node: String,
    id: String,
    #[serde(flatten)]
    endpoint: record::Endpoint,
}

#[derive(Debug, Serialize)]
struct Written {
    name: ServiceName,
    change: WrittenChange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum WrittenChange {
    Created,
    Replaced,
    Unchanged,
}

#[derive(Debug, Serialize)]
struct Removed {
    key: String,
    /// Endpoints of it that stay in the store.
    endpoints: usize,
}

pub(super) async fn run(command: ServiceCommand) -> Result<()> {
    match command {
        ServiceCommand::List(query) => list(query).await,
        ServiceCommand::Show(args) => show(args).await,
        ServiceCommand::Set(args) => set(args).await,
        ServiceCommand::Remove(args) => remove(args).await,
        ServiceCommand::Top(args) => top::top(args).await,
    }
}

async fn list(StoreQuery { output, store }: StoreQuery) -> Result<()> {
    let Catalog { services, skipped } = catalog(&store.open().await?).await?;
    let list = ServiceList { services: services.values().map(|service| Row::of(service)).collect(), skipped };
    print(output, &list, list_text)
}

async fn show(ShowArgs { name, query }: ShowArgs) -> Result<()> {
    let store = query.store.open().await?;
    let Catalog { services, mut skipped } = catalog(&store).await?;
    let (key, inside) = (format!("services/{name}"), format!("endpoints/{name}/"));
    skipped.retain(|skipped| skipped.key == key || skipped.key.starts_with(&inside));
    let Some(service) = services.get(&name) else {
        match skipped.iter().find(|skipped| skipped.key == key) {
            Some(skipped) => {
                bail!("the service {name} cannot be used: {}", printable(&skipped.reason, LONGEST_REASON))
            }
            None => bail!(
                "there is no service {name} in {}: `overlay-agent service list` lists them",
                store.name()
            ),
        }
    };
    let endpoints = service.endpoints.iter().map(|Endpoint { name, spec, .. }| ShownEndpoint {
        node: name.node.to_string(),
        id: name.id.to_string(),
        endpoint: spec.clone(),
    });
    let endpoints = endpoints.collect();
    let shown = Shown { name, vip: service.vip, service: service.spec.clone(), endpoints, skipped };
    print(query.output, &shown, shown_text)
}

async fn set(SetArgs { input, query }: SetArgs) -> Result<()> {
    let (source, text) = read_input("services", &input, LONGEST_INPUT)?;
    let services = input::parse_services(&text).context(source)?;
    let store = query.store.open().await?;
    // Fails when there is no such store.
    let existing: Vec<Record<Services>> = store.list().await?;
    let config = store.config_text().await?.and_then(|text| NetworkConfig::parse(&text).ok());
    let has_services = config.as_ref().is_none_or(|config| config.services.is_some());
    let pool = config.and_then(|config| config.services).map(|services| services.pool);
    check_wanted(&store, &services, pool).await?;
    let mut written = Vec::new();
    for (name, service) in services {
        let known = existing.iter().find(|record| record.id.as_ref() == Ok(&name));
        let change = write(&store, &name, &service, known).await.with_context(|| {
            let done: Vec<_> = written.iter().map(|Written { name, .. }| name.to_string()).collect();
            match done.is_empty() {
                true => "nothing was written".to_owned(),
                false => format!("only {} were written", done.join(", ")),
            }
        })?;
        written.push(Written { name, change });
    }
    if !has_services {
        eprintln!(
            "warning: the network config has no key Services, so agents ignore services: add it with `overlay-agent config set`, for \
             example \"Services\":{{}}, and restart the agents"
        );
    }
    print(query.output, &written, |written| {
        let line = |Written { name, change }: &Written| match change {
            WrittenChange::Created => format!("wrote {name}, which is new"),
            WrittenChange::Replaced => format!("wrote {name}"),
            WrittenChange::Unchanged => format!("{name} is as it was"),
        };
        written.iter().map(line).collect::<Vec<_>>().join("\n")
    })
}

async fn write(
    store: &Store,
    name: &ServiceName,
    service: &record::Service,
    known: Option<&Record<Services>>,
) -> Result<WrittenChange> {
    let (written, change) = match known {
        Some(known) if known.value.as_ref() == Ok(service) => return Ok(WrittenChange::Unchanged),
        Some(known) => {
            let written = store.replace_record::<Services>(name, known.version, service, None, &[]).await?;
            (written, WrittenChange::Replaced)
        }
        None => (store.create_record::<Services>(name, service, None, &[]).await?, WrittenChange::Created),
    };
    match written {
        Some(_) => Ok(change),
        None => bail!("the record of {name} changed in the meantime: look at it and try again"),
    }
}

/// Refuses wanted addresses that the services could not have.
async fn check_wanted(
    store: &Store,
    services: &std::collections::BTreeMap<ServiceName, record::Service>,
    pool: Option<Ipv4Net>,
) -> Result<()> {
    let mut wanted: std::collections::BTreeMap<Ipv4Addr, &ServiceName> = std::collections::BTreeMap::new();
    for (name, service) in services {
        let Some(vip) = service.vip else { continue };
        if let Some(other) = wanted.insert(vip, name) {
            bail!("not written: {other} and {name} both want the virtual address {vip}");
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    // Agents report what they cannot use; here, the pool is only a hint.
    let vips: Vec<Record<Vips>> = store.list().await?;
    for (vip, name) in wanted {
        if let Some(pool) = pool.filter(|pool| !vip::is_usable(*pool, vip)) {
            bail!(
                "not written: {name} wants {vip}, which is no usable address of the pool {pool} (Services.Pool of the network config)"
            );
        }
        let holder =
            vips.iter().find(|record| record.id == Ok(vip)).and_then(|record| record.value.as_ref().ok());
        if let Some(Vip::Held(holder)) = holder.filter(|holder| **holder != Vip::Held(name.clone())) {
            bail!("not written: {holder} holds the virtual address {vip} that {name} wants");
        }
    }
    Ok(())
}

async fn remove(RemoveArgs { name, query }: RemoveArgs) -> Result<()> {
    let store = query.store.open().await?;
    let services: Vec<Record<Services>> = store.list().await?;
    let shown = printable(&name, LONGEST_NAME);
    let Some(record) = services.iter().find(|record| record.has_key(&name)) else {
        bail!("there is no service {shown} in {}: `overlay-agent service list` lists them", store.name());
    };
    if !store.remove(record).await? {
        bail!("the record of {shown} changed in the meantime: look at it and try again");
    }
    let endpoints: Vec<Record<Endpoints>> = store.list().await?;
    let of_it = |endpoint: &&Record<Endpoints>| {
        endpoint.id.as_ref().is_ok_and(|id| record.id.as_ref() == Ok(&id.service))
    };
    let removed = Removed { key: record.key.to_string(), endpoints: endpoints.iter().filter(of_it).count() };
    print(query.output, &removed, |removed| match removed.endpoints {
        0 => format!("removed {shown}"),
        count => format!("removed {shown}; {count} endpoints of it stay in the store"),
    })
}

/// The catalog of what is stored.
pub(super) async fn catalog(store: &Store) -> Result<Catalog, StoreError> {
    // The services come last: nothing is found then that belongs to a service of which the list knows nothing.
    let (endpoints, vips) = (store.list().await?, store.list().await?);
    Ok(Catalog::new(&store.list().await?, &vips, &endpoints, &Catalog::default()))
}

impl Row {
    fn of(service: &Service) -> Self {
        let Service { name, spec, vip, endpoints } = service;
        let is_ready =
            |endpoint: &&Endpoint| endpoint.spec.state == EndpointState::Ready && endpoint.spec.weight > 0;
        Self {
            name: name.clone(),
            vip: *vip,
            headless: spec.headless,
            ports: spec.ports.clone(),
            ready: endpoints.iter().filter(is_ready).count(),
            endpoints: endpoints.len(),
        }
    }
}

fn address(vip: Option<Ipv4Addr>, headless: bool) -> String {
    match vip {
        Some(vip) => vip.to_string(),
        None if headless => "headless".to_owned(),
        None => "none yet".to_owned(),
    }
}

/// A port: `http 80/tcp -> 8080`.
fn port(port: &record::Port) -> String {
    let target = port.target_port.map(|target| format!(" -> {target}")).unwrap_or_default();
    format!("{} {}/{}{target}", port.name, port.port, port.protocol.name())
}

/// A route: `*.shop.example/api -> shop/web, port http`.
fn route(route: &Route) -> String {
    let host = route.host.as_deref().unwrap_or("any host");
    let prefix = route.path_prefix.as_deref().unwrap_or_default();
    format!("{host}{prefix} -> {}", route.describe())
}

fn ports(ports: &[record::Port]) -> String {
    ports.iter().map(port).collect::<Vec<_>>().join(", ")
}

fn list_text(list: &ServiceList) -> String {
    let mut text = "no services".to_owned();
    if !list.services.is_empty() {
        let mut table = table();
        table.set_header(["SERVICE", "ADDRESS", "PORTS", "ENDPOINTS"]);
        for row in &list.services {
            let endpoints = format!("{}/{}", row.ready, row.endpoints);
            table.add_row([
                row.name.to_string(),
                address(row.vip, row.headless),
                ports(&row.ports),
                endpoints,
            ]);
        }
        text = table.to_string();
    }
    format!("{text}{}", skipped_text(&list.skipped))
}

/// A table of records that agents skip, behind an empty line.
pub(super) fn skipped_text(skipped: &[Skipped]) -> String {
    if skipped.is_empty() {
        return String::new();
    }
    let mut table = table();
    table.set_header(["RECORD", "SKIPPED BECAUSE"]);
    for Skipped { key, reason } in skipped {
        table.add_row([printable(key, 2 * LONGEST_NAME), printable(reason, LONGEST_REASON)]);
    }
    format!("\n\n{table}")
}

fn shown_text(shown: &Shown) -> String {
    let Shown { name, vip, service, endpoints, skipped } = shown;
    let mut facts = table();
    // As they are written in records.
    let json = |value: serde_json::Result<serde_json::Value>| match value {
        Ok(serde_json::Value::String(text)) => text,
        value => value.map(|value| value.to_string()).unwrap_or_default(),
    };
    facts.add_row(["service", &name.to_string()]);
    facts.add_row(["address", &address(*vip, service.headless)]);
    facts.add_row(["ports", &ports(&service.ports)]);
    for port in &service.ports {
        for route in &port.routes {
            facts.add_row([&format!("route of {}", port.name), &self::route(route)]);
        }
    }
    let lb = service.lb.as_ref().map(|lb| json(serde_json::to_value(lb)));
    facts.add_row(["load balancing", lb.as_deref().unwrap_or("the network's default")]);
    if let Some(affinity) = service.affinity.filter(|affinity| affinity.client_ip) {
        facts.add_row(["affinity", &format!("client address, {} s", affinity.ttl_s)]);
    }
    facts.add_row(["locality", &json(serde_json::to_value(service.locality))]);
    if let Some(health) = &service.health {
        facts.add_row(["health check", &json(serde_json::to_value(health))]);
    }
    let mut text = facts.to_string();
    if endpoints.is_empty() {
        text.push_str("\n\nno endpoints");
    } else {
        let mut table = table();
        table.set_header(["NODE", "ID", "ADDRESS", "PORTS", "WEIGHT", "STATE", "ZONE"]);
        for ShownEndpoint { node, id, endpoint } in endpoints {
            table.add_row([[node.clone(), id.clone()].as_slice(), &endpoint_columns(endpoint)].concat());
        }
        text.push_str(&format!("\n\n{table}"));
    }
    format!("{text}{}", skipped_text(skipped))
}

/// Address, ports, weight, state and zone.
pub(super) fn endpoint_columns(endpoint: &record::Endpoint) -> [String; 5] {
    let ports: Vec<_> = endpoint.ports.iter().map(|(name, port)| format!("{name}={port}")).collect();
    [
        endpoint.overlay_ip.to_string(),
        if ports.is_empty() { "-".to_owned() } else { printable(&ports.join(" "), LONGEST_REASON) },
        endpoint.weight.to_string(),
        format!("{:?}", endpoint.state).to_lowercase(),
        endpoint.zone.as_deref().map_or_else(|| "-".to_owned(), |zone| printable(zone, LONGEST_NAME)),
    ]
}
