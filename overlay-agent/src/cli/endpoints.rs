//! `overlay-agent endpoint`: writes, drains, removes and lists endpoints of services.

use std::{collections::BTreeMap, net::Ipv4Addr, num::NonZeroU16, time::Duration};

use anyhow::{Result, bail};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use serde::Serialize;

use super::{
    StoreQuery,
    query::{print, table},
    service_args::host_name,
    services::{catalog, endpoint_columns, skipped_text},
};
use crate::{
    printable::{LONGEST_NAME, printable},
    service::{
        EndpointName, ServiceName,
        catalog::Skipped,
        input::{check_ports, default_id},
        record::{Endpoint, EndpointState, Endpoints, MAX_WEIGHT, Services},
    },
    store::{Lifetime, Record, Store},
};

const ADD_AFTER_HELP: &str = "\
Examples:
  overlay-agent endpoint add shop/web --address 10.244.1.2
  overlay-agent endpoint add shop/web --address 10.244.1.2 --id blue --port http=8080 --weight 3 --zone a
  overlay-agent endpoint add shop/web --address 10.244.1.2 --store dir:/var/lib/overlay

The record has no lifetime: it is an operator's and stays until `overlay-agent endpoint remove`, whatever happens to the node. \
Endpoints that are to end with their node belong in a file of its agent's --services-dir. Added again, an endpoint gets the new \
values, and takes connections again if it was draining.";

const DRAIN_AFTER_HELP: &str = "\
Examples:
  overlay-agent endpoint drain shop/web/node-a/10-244-1-2
  overlay-agent endpoint drain shop/web/node-a/blue --store dir:/var/lib/overlay

A draining endpoint keeps its connections and gets no new ones. `overlay-agent endpoint list` shows the names. An endpoint that an \
agent keeps in etcd is drained in that node's services file, from which the agent would write it again.";

const REMOVE_AFTER_HELP: &str = "\
Examples:
  overlay-agent endpoint remove shop/web/node-a/10-244-1-2
  overlay-agent endpoint remove not-an-endpoint --store dir:/var/lib/overlay

ENDPOINT is a name as in `overlay-agent endpoint list`, or the key of a record that agents skip, without `endpoints/`. An endpoint \
that an agent keeps is written again while that agent runs, so removing it needs --force.";

const LIST_AFTER_HELP: &str = "\
Examples:
  overlay-agent endpoint list
  overlay-agent endpoint list shop/web -o json

EXPIRES IN is `never` for an operator's record, and the time that is left unless the agent of its node renews it. Records in a \
directory do not expire.";

#[derive(Debug, Subcommand)]
pub(super) enum EndpointCommand {
    /// Write an endpoint of a service
    #[command(args_override_self = true, after_help = ADD_AFTER_HELP)]
    Add(AddArgs),
    /// Keep new connections away from an endpoint
    #[command(args_override_self = true, after_help = DRAIN_AFTER_HELP)]
    Drain(DrainArgs),
    /// Remove an endpoint
    #[command(args_override_self = true, after_help = REMOVE_AFTER_HELP)]
    Remove(RemoveArgs),
    /// List the endpoints, and the records that agents skip
    #[command(args_override_self = true, after_help = LIST_AFTER_HELP)]
    List(ListArgs),
}

#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// Service, for example shop/web
    #[arg(value_name = "NAMESPACE/NAME")]
    service: ServiceName,
    /// Address of the endpoint in the overlay
    #[arg(long, value_name = "IPv4")]
    address: Ipv4Addr,
    /// Identifier on its node [default: the address with hyphens, as 10-244-1-2]
    #[arg(long)]
    id: Option<String>,
    /// Node that runs it [default: this host's name up to the first dot]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Port of the endpoint for a port of the service, where it is not the service's target port; repeatable
    #[arg(long = "port", value_name = "NAME=PORT", value_parser = parse_port)]
    ports: Vec<(String, NonZeroU16)>,
    /// Share of the connections beside the others'; 0 for none
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(..=i64::from(MAX_WEIGHT)))]
    weight: u16,
    /// Zone where it runs
    #[arg(long)]
    zone: Option<String>,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// Endpoint, for example shop/web/node-a/10-244-1-2
    #[arg(value_name = "ENDPOINT")]
    name: EndpointName,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Endpoint, or key of a record
    #[arg(value_name = "ENDPOINT", value_parser = NonEmptyStringValueParser::new())]
    name: String,
    /// Remove the endpoint even if an agent keeps it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only the endpoints of this service
    #[arg(value_name = "NAMESPACE/NAME")]
    service: Option<ServiceName>,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Serialize)]
struct Written {
    endpoint: String,
    /// Whether there was no record of it.
    is_new: bool,
    record: Endpoint,
}

#[derive(Debug, Serialize)]
struct EndpointList {
    endpoints: Vec<Row>,
    /// Records that agents skip.
    skipped: Vec<Skipped>,
}

#[derive(Debug, Serialize)]
struct Row {
    service: ServiceName,
    node: String,
    id: String,
    #[serde(flatten)]
    endpoint: Endpoint,
    expires_in_s: Option<u64>,
}

pub(super) async fn run(command: EndpointCommand) -> Result<()> {
    match command {
        EndpointCommand::Add(args) => add(args).await,
        EndpointCommand::Drain(args) => drain(args).await,
        EndpointCommand::Remove(args) => remove(args).await,
        EndpointCommand::List(args) => list(args).await,
    }
}

async fn add(args: AddArgs) -> Result<()> {
    let AddArgs { service, address, id, node, ports, weight, zone, query } = args;
    let node = node.unwrap_or_else(host_name);
    let id = id.unwrap_or_else(|| default_id(address));
    let name = EndpointName::new(service.clone(), &node, &id)?;
    let endpoint = Endpoint {
        overlay_ip: address,
        ports: ports.into_iter().collect::<BTreeMap<_, _>>(),
        weight,
        zone,
        state: EndpointState::Ready,
    };
    endpoint.check().map_err(anyhow::Error::msg)?;
    let store = query.store.open().await?;
    // Fails when there is no such store.
    let endpoints: Vec<Record<Endpoints>> = store.list().await?;
    match store.get::<Services>(&service).await? {
        None => eprintln!(
            "warning: there is no service {service} yet: agents skip the endpoint until it is written"
        ),
        Some(record) => match &record.value {
            Err(error) => eprintln!("warning: the service {service} cannot be used: {error}"),
            Ok(spec) => check_ports(spec, &endpoint).map_err(anyhow::Error::msg)?,
        },
    }
    let known = endpoints.iter().find(|record| record.id.as_ref() == Ok(&name));
    let written = match known {
        Some(known) if known.version.lifetime.id().is_some() => bail!(
            "not written: the agent of the node {node} keeps the endpoint {name}: change that node's services file, or choose another \
             --id or --node"
        ),
        Some(known) => store.replace_record::<Endpoints>(&name, known.version, &endpoint, None, &[]).await?,
        None => store.create_record::<Endpoints>(&name, &endpoint, None, &[]).await?,
    };
    if written.is_none() {
        bail!("the record of {name} changed in the meantime: look at it and try again");
    }
    let written = Written { endpoint: name.to_string(), is_new: known.is_none(), record: endpoint };
    print(query.output, &written, |written| {
        let is_new = if written.is_new { ", which is new" } else { "" };
        format!("wrote {}{is_new}; it stays until it is removed", written.endpoint)
    })
}

async fn drain(DrainArgs { name, query }: DrainArgs) -> Result<()> {
    let store = query.store.open().await?;
    let Some(record) = store.get::<Endpoints>(&name).await? else {
        bail!(missing(&name.to_string(), &store))
    };
    let mut endpoint = match record.value {
        Ok(endpoint) => endpoint,
        Err(error) => bail!("the record of {name} cannot be used: {error}"),
    };
    if record.version.lifetime.id().is_some() {
        bail!(
            "the agent of the node {} keeps {name}: drain it in that node's services file, with `state: draining`",
            name.node
        );
    }
    if endpoint.state != EndpointState::Draining {
        endpoint.state = EndpointState::Draining;
        let written = store.replace_record::<Endpoints>(&name, record.version, &endpoint, None, &[]).await?;
        if written.is_none() {
            bail!("the record of {name} changed in the meantime: look at it and try again");
        }
    }
    let written = Written { endpoint: name.to_string(), is_new: false, record: endpoint };
    print(query.output, &written, |written| format!("{} is draining", written.endpoint))
}

async fn remove(RemoveArgs { name, force, query }: RemoveArgs) -> Result<()> {
    let store = query.store.open().await?;
    let endpoints: Vec<Record<Endpoints>> = store.list().await?;
    let Some(record) = endpoints.iter().find(|record| record.has_key(&name)) else {
        bail!(missing(&name, &store))
    };
    let shown = printable(&record.key, 2 * LONGEST_NAME);
    if matches!(record.version.lifetime, Lifetime::Limited(_)) && !force {
        bail!(
            "not removed: an agent keeps {shown} and would write it again: change its node's services file; --force removes it anyway"
        );
    }
    if !store.remove(record).await? {
        bail!("the record of {shown} changed in the meantime: look at it and try again");
    }
    print(query.output, &serde_json::json!({ "key": &*record.key }), |_| format!("removed {shown}"))
}

async fn list(ListArgs { service, query }: ListArgs) -> Result<()> {
    let store = query.store.open().await?;
    let records: Vec<Record<Endpoints>> = store.list().await?;
    let times = store.times_left(&records).await?;
    let left = |record: &Record<Endpoints>| {
        record.version.lifetime.id().and_then(|id| times.get(&id)).map(Duration::as_secs)
    };
    let is_wanted = |name: &EndpointName| service.as_ref().is_none_or(|service| *service == name.service);
    let rows = records.iter().filter_map(|record| {
        let (name, endpoint) = (record.id.as_ref().ok()?, record.value.as_ref().ok()?);
        is_wanted(name).then(|| Row {
            service: name.service.clone(),
            node: name.node.to_string(),
            id: name.id.to_string(),
            endpoint: endpoint.clone(),
            expires_in_s: left(record),
        })
    });
    let rows: Vec<Row> = rows.collect();
    let prefix = match &service {
        Some(service) => format!("endpoints/{service}/"),
        None => "endpoints/".to_owned(),
    };
    let mut skipped = catalog(&store).await?.skipped;
    skipped.retain(|skipped| skipped.key.starts_with(&prefix));
    print(query.output, &EndpointList { endpoints: rows, skipped }, list_text)
}

fn list_text(list: &EndpointList) -> String {
    let mut text = "no endpoints".to_owned();
    if !list.endpoints.is_empty() {
        let mut table = table();
        table.set_header(["ENDPOINT", "ADDRESS", "PORTS", "WEIGHT", "STATE", "ZONE", "EXPIRES IN"]);
        for Row { service, node, id, endpoint, expires_in_s } in &list.endpoints {
            let name = format!("{service}/{node}/{id}");
            let expires = expires_in_s.map_or_else(|| "never".to_owned(), |left| format!("{left} s"));
            table.add_row([[name].as_slice(), &endpoint_columns(endpoint), &[expires]].concat());
        }
        text = table.to_string();
    }
    format!("{text}{}", skipped_text(&list.skipped))
}

fn missing(name: &str, store: &Store) -> String {
    let name = printable(name, 2 * LONGEST_NAME);
    format!("there is no endpoint {name} in {}: `overlay-agent endpoint list` lists them", store.name())
}

fn parse_port(text: &str) -> Result<(String, NonZeroU16), String> {
    let parsed = text.split_once('=').and_then(|(name, port)| Some((name.to_owned(), port.parse().ok()?)));
    parsed.ok_or_else(|| "expected NAME=PORT, for example http=8080".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_a_name_and_a_number() {
        assert_eq!(parse_port("http=8080").unwrap().1.get(), 8080);
        for bad in ["http", "8080", "http=", "http=0", "http=65536"] {
            assert!(parse_port(bad).unwrap_err().contains("http=8080"), "{bad}");
        }
    }
}
