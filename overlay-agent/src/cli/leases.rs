//! `overlay-agent leases` and `overlay-agent lease release`: lists the leases in the store and releases one.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use serde::Serialize;

use super::{
    StoreQuery,
    query::{print, table},
};
use crate::{
    config::NetworkConfig,
    lease::LeaseRecord,
    printable::{LONGEST_NAME, printable},
    route::{Subnet, SubnetError},
    route_table,
    store::{LifetimeId, Store},
};

pub(super) const LIST_AFTER_HELP: &str = "\
Examples:
  overlay-agent leases --etcd-endpoints http://192.168.77.10:2379
  overlay-agent leases --store dir:/var/lib/overlay -o json

STATE is `lease` for a record that expires unless its host renews it, `reservation` for a record without expiry, written by \
an operator, and `not routed` with the reason for a record that agents skip. Records in a directory do not expire.";

const RELEASE_AFTER_HELP: &str = "\
Examples:
  overlay-agent lease release 10.244.7.0/24
  overlay-agent lease release 10.244.7.0/24 --force --etcd-endpoints http://192.168.77.10:2379
  overlay-agent lease release not-a-subnet --store dir:/var/lib/overlay

A running agent acquires its subnet again at once, so releasing its lease needs --force, as does releasing a reservation. In \
etcd, a running agent holds an owner key. flanneld has none, and a directory has no owner keys: there, stop the host first.";

#[derive(Debug, Subcommand)]
pub(super) enum LeaseCommand {
    /// Remove the lease of a host that is gone
    #[command(args_override_self = true)]
    Release(ReleaseArgs),
}

#[derive(Debug, Args)]
#[command(after_help = RELEASE_AFTER_HELP)]
pub(super) struct ReleaseArgs {
    /// Subnet, or key of a record as in `leases -o json`
    #[arg(value_name = "SUBNET", value_parser = parse_target)]
    target: String,
    /// Release the lease even if its agent runs or it is a reservation
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Serialize)]
struct LeaseList {
    /// Network of the overlay, if the store has a valid config.
    network: Option<Ipv4Net>,
    /// Why the network is unknown.
    config_problem: Option<String>,
    leases: Vec<Row>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    key: String,
    subnet: Option<Subnet>,
    public_ip: Option<Ipv4Addr>,
    backend_type: Option<String>,
    expires_in_s: Option<u64>,
    /// `lease`, `reservation` or `not routed`.
    state: &'static str,
    /// Why agents skip it.
    reason: Option<String>,
    #[serde(skip)]
    is_reservation: bool,
}

#[derive(Debug, Serialize)]
struct Released {
    #[serde(flatten)]
    row: Row,
    /// The running agent of its host.
    owner: Option<String>,
}

/// The rests of lifetimes.
type Times = BTreeMap<LifetimeId, Duration>;

pub(super) async fn leases(StoreQuery { output, store }: StoreQuery) -> Result<()> {
    let store = store.open().await?;
    let network = network(&store).await?;
    if let Err(problem) = &network {
        eprintln!("warning: {problem}; records outside the network cannot be recognized");
    }
    let (records, times) = with_times(&store, store.list().await?).await?;
    let (network, config_problem) = (network.clone().ok(), network.err());
    let list = LeaseList { network, config_problem, leases: rows(network, &records, &times) };
    print(output, &list, text)
}

pub(super) async fn release(ReleaseArgs { target, force, query }: ReleaseArgs) -> Result<()> {
    let store = query.store.open().await?;
    let network = network(&store).await?.ok();
    let mut found: Vec<LeaseRecord> = store.list().await?;
    found.retain(|record| selects(&target, record));
    let target = name(&target);
    if found.len() > 1 {
        let keys: Vec<_> = found.iter().map(|record| name(&record.key)).collect();
        bail!("{target} matches more than one record: give one of the keys {}", keys.join(" and "));
    }
    let (found, times) = with_times(&store, found).await?;
    let (Some(record), Some(row)) = (found.first(), rows(network, &found, &times).pop()) else {
        bail!("there is no record of {target} in {}: `overlay-agent leases` lists the records", store.name());
    };
    let owner = match row.public_ip {
        None => Ok(None),
        Some(public_ip) => store.claimant(public_ip).await,
    };
    let owner = owner
        .or_else(|error| if force { Ok(None) } else { Err(error) })
        .context("cannot determine whether the host is alive (--force skips this check)")?;
    if let Some(objection) = objection(&row, owner.as_deref()).filter(|_| !force) {
        bail!("{objection}");
    }
    if !store.remove(record).await? {
        bail!("the record of {target} changed in the meantime: list the leases and try again");
    }
    print(query.output, &Released { row, owner }, |released| {
        let owner = released.owner.as_deref().map(|owner| {
            format!("; its agent ({}) is alive and acquires it again", printable(owner, LONGEST_NAME))
        });
        format!("released {}{}", describe(&released.row), owner.unwrap_or_default())
    })
}

/// Looks up the rests of lifetimes, and leaves out records whose lifetime has ended.
async fn with_times(store: &Store, mut records: Vec<LeaseRecord>) -> Result<(Vec<LeaseRecord>, Times)> {
    let times = store.times_left(&records).await?;
    records.retain(|record| record.version.lifetime.id().is_none_or(|id| times.contains_key(&id)));
    Ok((records, times))
}

/// Whether `target` selects a record: as its subnet, else as its key.
fn selects(target: &str, record: &LeaseRecord) -> bool {
    match target.parse() {
        Ok(subnet) => record.subnet() == Some(subnet),
        Err(_) => record.has_key(target),
    }
}

fn parse_target(text: &str) -> Result<String, String> {
    match text.parse::<Subnet>() {
        Err(error) if error != SubnetError::NotPrefix || text.is_empty() => Err(error.to_string()),
        _ => Ok(text.to_owned()),
    }
}

/// The network, or why it is unknown.
async fn network(store: &Store) -> Result<Result<Ipv4Net, String>> {
    let Some(text) = store.config_text().await? else {
        return Ok(Err(format!("there is no network config at {}", store.config_location())));
    };
    Ok(NetworkConfig::parse(&text).map(|config| config.network).map_err(|error| error.to_string()))
}

/// One row per record, with the reasons from the agents' route table.
fn rows(network: Option<Ipv4Net>, records: &[LeaseRecord], times: &Times) -> Vec<Row> {
    let refusals = route_table::refusals(network, records);
    let row = |(record, reason): (&LeaseRecord, Option<String>)| {
        let left = record.version.lifetime.id().and_then(|id| times.get(&id));
        let is_reservation = record.is_reservation();
        Row {
            key: record.key.to_string(),
            subnet: record.subnet(),
            public_ip: record.holder(),
            backend_type: record.value.as_ref().ok().and_then(|value| value.backend_type.clone()),
            expires_in_s: left.map(Duration::as_secs),
            state: match &reason {
                Some(_) => "not routed",
                None if is_reservation => "reservation",
                None => "lease",
            },
            reason,
            is_reservation,
        }
    };
    records.iter().zip(refusals).map(row).collect()
}

fn text(list: &LeaseList) -> String {
    if list.leases.is_empty() {
        return "no leases".to_owned();
    }
    let mut table = table();
    table.set_header(["SUBNET", "OWNER", "EXPIRES IN", "STATE"]);
    for row in &list.leases {
        let owner = row.public_ip.map_or_else(|| "-".to_owned(), |address| address.to_string());
        let expires = row.expires_in_s.map_or_else(|| "never".to_owned(), human);
        let reason = row.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        table.add_row([subject(row), owner, expires, format!("{}{reason}", row.state)]);
    }
    table.to_string()
}

/// The subnet, or a key that does not name one.
fn subject(row: &Row) -> String {
    row.subnet.map_or_else(|| name(&row.key), |subnet| subnet.to_string())
}

fn name(key: &str) -> String {
    printable(key, LONGEST_NAME)
}

/// Describes a record: `10.244.7.0/24, a lease of 192.168.77.7 with 3 h left`.
fn describe(row: &Row) -> String {
    let subject = subject(row);
    match (row.public_ip, row.is_reservation, row.expires_in_s) {
        (None, true, _) => format!("{subject}, a reservation that names no holder"),
        (None, false, _) => format!("{subject}, a lease that names no holder"),
        (Some(holder), true, _) => format!("{subject}, a reservation for {holder}"),
        (Some(holder), false, None) => format!("{subject}, a lease of {holder}"),
        (Some(holder), false, Some(left)) => {
            format!("{subject}, a lease of {holder} with {} left", human(left))
        }
    }
}

/// Reasons not to release a record.
fn objection(row: &Row, owner: Option<&str>) -> Option<String> {
    let reserved = row.is_reservation.then(|| "an operator wrote it and it does not expire".to_owned());
    let alive = owner.map(|owner| {
        let owner = printable(owner, LONGEST_NAME);
        format!("its agent ({owner}) is alive and would acquire it again at once: stop that agent first")
    });
    let why: Vec<_> = reserved.into_iter().chain(alive).collect();
    (!why.is_empty())
        .then(|| format!("not released: {}: {}; --force releases it anyway", describe(row), why.join("; ")))
}

/// A time in its two largest units.
fn human(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lease, store::Version};

    fn record(key: &str, value: &str) -> LeaseRecord {
        LeaseRecord::parse(key, value.as_bytes(), Version::default())
    }

    #[test]
    fn every_record_has_a_row_and_a_skipped_one_a_reason() {
        let host = Ipv4Addr::new(192, 168, 77, 2);
        let records = [
            record("10.5.2.0-24", &lease::value(host)),
            record("10.5.3.0-24", r#"{"PublicIP":"192.168.77.3","BackendType":"vxlan"}"#),
            record("\u{1b}[31mred", "{}"),
        ];
        let rows = rows(Some("10.5.0.0/16".parse().unwrap()), &records, &Times::new());
        let list = LeaseList { network: None, config_problem: None, leases: rows };
        let text = text(&list);
        assert!(text.contains("vxlan") && !text.contains('\u{1b}'), "{text}");
        let json = serde_json::to_value(&list.leases).unwrap();
        let first = serde_json::json!({
            "key": "10.5.2.0-24",
            "subnet": "10.5.2.0/24",
            "public_ip": host,
            "backend_type": null,
            "expires_in_s": null,
            "state": "lease",
            "reason": null,
        });
        assert_eq!(json[0], first);
        assert_eq!((&json[1]["state"], &json[1]["backend_type"]), (&"not routed".into(), &"vxlan".into()));
    }

    #[test]
    fn times_have_two_units() {
        assert_eq!([0, 61, 86_399].map(human), ["0 s", "1 min 1 s", "23 h 59 min"]);
    }

    #[test]
    fn a_target_is_a_subnet_or_a_key() {
        for target in ["10.5.2.0/24", "junk"] {
            assert_eq!(parse_target(target).as_deref(), Ok(target));
        }
        assert!(parse_target("10.5.2.1/24").unwrap_err().contains("10.5.2.0/24"));
        let dual_stack = record("10.5.2.0-24&2001:cafe::-64", "");
        assert!(selects("10.5.2.0/24", &dual_stack), "whatever its key says beside it");
        assert!(selects("10.5.2.0-24&2001:cafe::-64", &dual_stack));
    }

    #[test]
    fn a_living_host_keeps_its_lease() {
        let record = record("10.5.2.0-24", &lease::value(Ipv4Addr::new(192, 168, 77, 2)));
        let row = rows(None, std::slice::from_ref(&record), &Times::new()).pop().unwrap();
        assert_eq!(objection(&row, None), None);
        let text = objection(&row, Some("on host b")).unwrap();
        assert!(text.contains("on host b") && text.contains("192.168.77.2"), "{text}");
    }
}
