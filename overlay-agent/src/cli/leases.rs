//! `overlay-agent leases` and `overlay-agent lease release`: lists the leases in the store and releases one.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use serde::Serialize;

use super::{
    Output,
    query::{print, table},
    store::{Claim, Store},
    store_args::StoreArgs,
};
use crate::{
    config::NetworkConfig,
    printable::{LONGEST_NAME, printable},
    route_table,
};

const LIST_AFTER_HELP: &str = "\
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

#[derive(Debug, Args)]
#[command(after_help = LIST_AFTER_HELP)]
pub(super) struct LeasesArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    store: StoreArgs,
}

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
    target: Target,
    /// Release the lease even if its agent runs or it is a reservation
    #[arg(long)]
    force: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    store: StoreArgs,
}

/// Selects a record.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Subnet(Ipv4Net),
    Key(String),
}

/// All records.
#[derive(Debug, Serialize)]
struct LeaseList {
    /// Network of the overlay, if the store has a valid config.
    network: Option<Ipv4Net>,
    /// Why the network is unknown.
    config_problem: Option<String>,
    leases: Vec<Row>,
}

/// One record.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    key: String,
    subnet: Option<Ipv4Net>,
    public_ip: Option<Ipv4Addr>,
    backend_type: Option<String>,
    expires_in_s: Option<u64>,
    state: State,
    /// Why agents skip it.
    reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Lease,
    Reservation,
    #[serde(rename = "not routed")]
    NotRouted,
}

/// A record that was removed.
#[derive(Debug, Serialize)]
struct Released {
    #[serde(flatten)]
    row: Row,
    /// The running agent of its host.
    owner: Option<String>,
}

pub(super) async fn leases(args: LeasesArgs) -> Result<()> {
    let store = Store::open(args.store).await?;
    let (network, config_problem) = network(&store).await?;
    if let Some(problem) = &config_problem {
        eprintln!("warning: {problem}; records outside the network cannot be recognized");
    }
    let claims = store.with_times(store.claims().await?).await?;
    let list = LeaseList { network, config_problem, leases: rows(network, &claims) };
    print(args.output, &list, text)
}

pub(super) async fn release(args: ReleaseArgs) -> Result<()> {
    let store = Store::open(args.store).await?;
    let (network, _) = network(&store).await?;
    let claims = store.claims().await?;
    let mut found: Vec<_> = claims.into_iter().filter(|claim| args.target.is(claim)).collect();
    if found.len() > 1 {
        let keys: Vec<_> = found.iter().map(|claim| name(&claim.record().key)).collect();
        bail!("{} matches more than one record: give one of the keys {}", args.target, keys.join(" and "));
    }
    found = store.with_times(found).await?;
    let (Some(claim), Some(row)) = (found.first(), rows(network, &found).pop()) else {
        bail!(
            "there is no record of {} in {}: `overlay-agent leases` lists the records",
            args.target,
            store.name()
        );
    };
    let owner = match row.public_ip {
        None => Ok(None),
        Some(public_ip) => store.owner(public_ip).await,
    };
    let owner = match (owner, args.force) {
        (Err(_), true) => None,
        (owner, _) => {
            owner.context("cannot determine whether the host is alive (--force skips this check)")?
        }
    };
    if let Some(objection) = objection(claim, &row, owner.as_deref()).filter(|_| !args.force) {
        bail!("{objection}");
    }
    if !store.remove(claim).await? {
        bail!("the record of {} changed in the meantime: list the leases and try again", args.target);
    }
    print(args.output, &Released { row, owner }, |released| {
        let owner = released.owner.as_deref().map_or_else(String::new, |owner| {
            format!("; its agent ({}) is alive and acquires it again", printable(owner, LONGEST_NAME))
        });
        format!("released {}{owner}", describe(claim, &released.row))
    })
}

impl Target {
    fn is(&self, claim: &Claim) -> bool {
        match self {
            Self::Subnet(subnet) => claim.subnet() == Some(*subnet),
            Self::Key(key) => claim.record().key == *key,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Subnet(subnet) => subnet.fmt(f),
            Self::Key(key) => f.write_str(&name(key)),
        }
    }
}

fn parse_target(text: &str) -> Result<Target, String> {
    match text.parse::<Ipv4Net>() {
        Ok(net) if net == net.trunc() => Ok(Target::Subnet(net)),
        Ok(net) => Err(format!("host bits are set: did you mean {}?", net.trunc())),
        Err(_) if text.is_empty() => Err("expected a subnet such as 10.244.7.0/24".to_owned()),
        Err(_) => Ok(Target::Key(text.to_owned())),
    }
}

/// The network, or why it is unknown.
async fn network(store: &Store) -> Result<(Option<Ipv4Net>, Option<String>)> {
    Ok(match store.config_text().await? {
        None => (None, Some(format!("there is no network config at {}", store.config_location()))),
        Some(text) => match NetworkConfig::parse(&text) {
            Ok(config) => (Some(config.network), None),
            Err(error) => (None, Some(error.to_string())),
        },
    })
}

/// One row per record, with the reasons from the agents' route table.
fn rows(network: Option<Ipv4Net>, claims: &[Claim]) -> Vec<Row> {
    let refusals = route_table::refusals(network, claims.iter().map(Claim::record));
    let row = |(claim, reason): (&Claim, Option<String>)| {
        let value = claim.value();
        Row {
            key: claim.record().key.clone(),
            subnet: claim.subnet(),
            public_ip: value.as_ref().map(|value| value.public_ip),
            backend_type: value.and_then(|value| value.backend_type),
            expires_in_s: claim.expires_in().map(|left| left.as_secs()),
            state: match reason {
                Some(_) => State::NotRouted,
                None if claim.is_reservation() => State::Reservation,
                None => State::Lease,
            },
            reason,
        }
    };
    claims.iter().zip(refusals).map(row).collect()
}

fn text(list: &LeaseList) -> String {
    if list.leases.is_empty() {
        return "no leases".to_owned();
    }
    let mut table = table();
    table.set_header(["SUBNET", "OWNER", "EXPIRES IN", "STATE"]);
    for row in &list.leases {
        let expires = row.expires_in_s.map_or_else(|| "never".to_owned(), human);
        let state = match (&row.state, &row.reason) {
            (State::Lease, _) => "lease".to_owned(),
            (State::Reservation, _) => "reservation".to_owned(),
            (State::NotRouted, reason) => {
                format!("not routed: {}", reason.as_deref().unwrap_or("no reason given"))
            }
        };
        table.add_row([subject(row), owner(row), expires, state]);
    }
    table.to_string()
}

/// The subnet, or a key that does not name one.
fn subject(row: &Row) -> String {
    row.subnet.map_or_else(|| name(&row.key), |subnet| subnet.to_string())
}

fn owner(row: &Row) -> String {
    row.public_ip.map_or_else(|| "-".to_owned(), |address| address.to_string())
}

fn name(key: &str) -> String {
    printable(key, LONGEST_NAME)
}

/// Describes a record: `10.244.7.0/24, a lease of 192.168.77.7 with 3 h left`.
fn describe(claim: &Claim, row: &Row) -> String {
    let subject = subject(row);
    match (row.public_ip, claim.is_reservation(), row.expires_in_s) {
        (None, true, _) => format!("{subject}, a reservation that names no holder"),
        (None, false, _) => format!("{subject}, a lease that names no holder"),
        (Some(holder), true, _) => format!("{subject}, a reservation for {holder}"),
        (Some(holder), false, Some(left)) => {
            format!("{subject}, a lease of {holder} with {} left", human(left))
        }
        (Some(holder), false, None) => format!("{subject}, a lease of {holder}"),
    }
}

/// Reasons not to release a record.
fn objection(claim: &Claim, row: &Row, owner: Option<&str>) -> Option<String> {
    let mut why = Vec::new();
    if claim.is_reservation() {
        why.push("an operator wrote it and it does not expire".to_owned());
    }
    if let Some(owner) = owner {
        let owner = printable(owner, LONGEST_NAME);
        why.push(format!(
            "its agent ({owner}) is alive and would acquire it again at once: stop that agent first"
        ));
    }
    let record = describe(claim, row);
    (!why.is_empty())
        .then(|| format!("not released: {record}: {}; --force releases it anyway", why.join("; ")))
}

/// A time in its two largest units.
fn human(seconds: u64) -> String {
    let time = Duration::from_secs(seconds).as_secs();
    match (time / 3600, time / 60 % 60, time % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lease, route_table::Record};

    fn claim(key: &str, value: &str) -> Claim {
        Claim::Dir(Record { key: key.to_owned(), value: value.as_bytes().to_vec() })
    }

    #[test]
    fn every_record_has_a_row_and_a_skipped_one_a_reason() {
        let host = Ipv4Addr::new(192, 168, 77, 2);
        let claims = [
            claim("10.5.2.0-24", &lease::value(host)),
            claim("10.5.3.0-24", r#"{"PublicIP":"192.168.77.3","BackendType":"vxlan"}"#),
            claim("\u{1b}[31mred", "{}"),
        ];
        let rows = rows(Some("10.5.0.0/16".parse().unwrap()), &claims);
        assert_eq!(
            rows[0],
            Row {
                key: "10.5.2.0-24".to_owned(),
                subnet: Some("10.5.2.0/24".parse().unwrap()),
                public_ip: Some(host),
                backend_type: None,
                expires_in_s: None,
                state: State::Lease,
                reason: None,
            }
        );
        assert_eq!((rows[1].state, rows[1].backend_type.as_deref()), (State::NotRouted, Some("vxlan")));
        let list = LeaseList { network: None, config_problem: None, leases: rows };
        let text = text(&list);
        assert!(text.contains("vxlan") && !text.contains('\u{1b}'), "{text}");
        let json = serde_json::to_value(&list).unwrap();
        assert_eq!(json["leases"][1]["state"], "not routed");
        assert_eq!(json["leases"][0]["expires_in_s"], serde_json::Value::Null);
    }

    #[test]
    fn times_are_told_in_two_units() {
        assert_eq!(human(0), "0 s");
        assert_eq!(human(61), "1 min 1 s");
        assert_eq!(human(86_399), "23 h 59 min");
    }

    #[test]
    fn a_target_is_a_subnet_or_a_key() {
        let subnet = Target::Subnet("10.5.2.0/24".parse().unwrap());
        assert_eq!(parse_target("10.5.2.0/24"), Ok(subnet.clone()));
        assert_eq!(parse_target("junk"), Ok(Target::Key("junk".to_owned())));
        assert!(parse_target("10.5.2.1/24").unwrap_err().contains("10.5.2.0/24"));
        assert!(subnet.is(&claim("10.5.2.0-24&2001:cafe::-64", "")), "whatever its key says beside it");
    }

    #[test]
    fn a_living_host_keeps_its_lease() {
        let claim = claim("10.5.2.0-24", &lease::value(Ipv4Addr::new(192, 168, 77, 2)));
        let row = rows(None, std::slice::from_ref(&claim)).pop().unwrap();
        assert_eq!(objection(&claim, &row, None), None);
        let text = objection(&claim, &row, Some("on host b")).unwrap();
        assert!(text.contains("on host b") && text.contains("192.168.77.2"), "{text}");
    }
}
