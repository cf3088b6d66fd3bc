//! `overlay-agent config set`: writes the network config, and refuses what running hosts would suffer from.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use clap::{Args, builder::NonEmptyStringValueParser};
use serde::Serialize;

use super::{
    StoreQuery,
    config::{read, values, warn_of},
    query::{print, table},
};
use crate::{config::NetworkConfig, lease::LeaseRecord};

pub(super) const SET_AFTER_HELP: &str = "\
Examples:
  overlay-agent config set '{\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"udp\"}}'
  overlay-agent config set '{\"Network\":\"10.244.0.0/16\",\"Services\":{\"Pool\":\"10.251.0.0/16\",\"Domain\":\"overlay\"}}'
  overlay-agent config set network.json --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config set - --store dir:/var/lib/overlay < network.json

Services is a key of this agent's, which flannel ignores: Pool has the virtual addresses of services, Domain their names, and \
LoadBalancing ({\"policy\":\"round_robin\"}) how endpoints are chosen where a service does not say it.

Agents read the config when they start. Hosts with another network or port cannot reach each other, so such a change needs \
--force while hosts hold leases, and then a restart of all agents. So does the replacement of a config that agents cannot use, \
or of one that was removed. \
A host whose lease no longer fits acquires another subnet when it restarts: that needs --force, too. Reservations in etcd do \
not count as hosts; in a directory, all records do.";

/// Values that must be the same on all hosts that are to reach each other.
const SHARED: [&str; 3] = ["Network", "Backend.Type", "Backend.Port"];

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// Config: a file, - for standard input, or JSON
    #[arg(value_name = "FILE|-|JSON", value_parser = NonEmptyStringValueParser::new())]
    input: String,
    /// Write the config even if leases do not fit it or all agents must be restarted
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Serialize)]
struct Written {
    location: String,
    before: Option<String>,
    /// Effective values that changed.
    changes: Vec<ConfigChange>,
    unknown_keys: Vec<String>,
    /// What an operator should know about the config.
    warnings: Vec<String>,
    /// Records that do not fit it.
    misfits: usize,
    /// Leases of hosts whose agents must be restarted to reach hosts with this config.
    restarts: usize,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct ConfigChange {
    key: &'static str,
    /// `None` where there was nothing that could be used.
    before: Option<String>,
    after: String,
}

/// Leases that a change of the config affects, each as `10.244.7.0/24 of 192.168.77.7`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Affected {
    /// Leases that hosts could not keep.
    misfits: Vec<String>,
    /// Leases of hosts that could not reach hosts with the new config.
    separated: Vec<String>,
}

pub(super) async fn set(args: SetArgs) -> Result<()> {
    let (source, text) = read(&args.input)?;
    let config = NetworkConfig::parse(&text).context(source)?;
    let store = args.query.store.open().await?;
    let before = store.config_text().await?;
    let changed = changes(before.as_deref(), &config);
    let affected = match changed.is_empty() || !store.exists() {
        true => Affected::default(),
        false => Affected::by(&changed, &config, &store.list().await?),
    };
    let before = if args.force {
        store.set_config(&text).await?
    } else {
        if let Some(objection) = affected.objection(before.as_deref(), &changed, &config) {
            bail!("not written: {objection}");
        }
        if !store.replace_config(before.as_deref(), &text).await? {
            bail!("not written: the stored config changed in the meantime: look at it and try again");
        }
        before
    };
    let written = Written {
        location: store.config_location(),
        changes: changes(before.as_deref(), &config),
        before,
        unknown_keys: NetworkConfig::unknown_keys(&text),
        warnings: NetworkConfig::warnings(&text),
        misfits: affected.misfits.len(),
        restarts: affected.separated.len(),
    };
    warn_of(&written.warnings);
    print(args.query.output, &written, written_text)
}

impl Affected {
    /// What `changed` affects.
    fn by(changed: &[ConfigChange], config: &NetworkConfig, records: &[LeaseRecord]) -> Self {
        // Hosts keep their subnets when only the port or the services change.
        let keeps = |key: &str| key == "Backend.Port" || key.starts_with("Services.");
        let misfits = match changed.iter().all(|change| keeps(change.key)) {
            true => Vec::new(),
            false => misfits(config, records),
        };
        let separated = match changed.iter().any(|change| SHARED.contains(&change.key)) {
            true => held(records),
            false => Vec::new(),
        };
        Self { misfits, separated }
    }

    /// Why the config is not to be written without `--force`. `before` is the stored one.
    fn objection(
        &self,
        before: Option<&str>,
        changed: &[ConfigChange],
        config: &NetworkConfig,
    ) -> Option<String> {
        if let Some(first) = self.misfits.first() {
            return Some(format!(
                "{} of the leases would not fit, the first is {first}: subnets would range from {}/{len} to {}/{len}; \
                 --force writes it anyway, and those hosts acquire other subnets when they restart",
                self.misfits.len(),
                config.subnet_min,
                config.subnet_max,
                len = config.subnet_len,
            ));
        }
        let first = self.separated.first()?;
        let shared = changed.iter().filter(|change| SHARED.contains(&change.key));
        let shared: Option<Vec<_>> = shared
            .map(|change| Some(format!("{} {} -> {}", change.key, change.before.as_ref()?, change.after)))
            .collect();
        let what = shared.map_or_else(
            || {
                let stored = match before {
                    Some(_) => "agents cannot use the stored config",
                    None => "the stored config is gone",
                };
                format!("{stored}, so it may differ from the one that hosts run with")
            },
            |shared| format!("it changes {}", shared.join(", ")),
        );
        Some(format!(
            "{what}, and hosts hold leases ({}, the first is {first}): those that restart could not reach the others; \
             --force writes it anyway, then restart all agents",
            self.separated.len()
        ))
    }
}

/// Leases that hosts could not keep under `config`, except those of other backends.
fn misfits(config: &NetworkConfig, records: &[LeaseRecord]) -> Vec<String> {
    let misfit = |record: &LeaseRecord| {
        let value = record.value.as_ref().ok().filter(|value| value.backend_type.is_none())?;
        let subnet = record.subnet()?;
        let fits = config.may_be_held(subnet, record.is_reservation());
        (!fits).then(|| format!("{subnet} of {}", value.public_ip))
    };
    records.iter().filter_map(misfit).collect()
}

/// Leases of hosts that may be running. A host with a reservation may not; a directory does not show which hosts are.
fn held(records: &[LeaseRecord]) -> Vec<String> {
    let leases = records.iter().filter(|record| !record.is_reservation());
    leases.filter_map(|record| Some(format!("{} of {}", record.subnet()?, record.holder()?))).collect()
}

fn changes(before: Option<&str>, after: &NetworkConfig) -> Vec<ConfigChange> {
    let before = before.and_then(|text| NetworkConfig::parse(text).ok());
    let mut before: BTreeMap<_, _> = before.iter().flat_map(values).collect();
    let after = values(after).into_iter().map(|(key, after)| (key, before.remove(key), after));
    let mut changes: Vec<_> = after.map(|(key, before, after)| ConfigChange { key, before, after }).collect();
    // Only the part about services can be missing.
    let removed = before.into_iter().map(|(key, before)| (key, Some(before), "none".to_owned()));
    changes.extend(removed.map(|(key, before, after)| ConfigChange { key, before, after }));
    changes.retain(|change| change.before.as_ref() != Some(&change.after));
    changes
}

fn written_text(written: &Written) -> String {
    let mut table = table();
    for ConfigChange { key, before, after } in &written.changes {
        let before = before.as_ref().map(|before| format!("{before} -> ")).unwrap_or_default();
        table.add_row([*key, &format!("{before}{after}")]);
    }
    let location = &written.location;
    let mut text = match (&written.before, written.changes.is_empty()) {
        (_, true) => format!("wrote {location}; it means the same as before"),
        (None, false) => format!("wrote {location}, where there was none:\n{table}"),
        (Some(_), false) => format!("wrote {location}:\n{table}\nAgents read it when they restart."),
    };
    if written.misfits > 0 {
        text.push_str(&format!("\n{} of the leases do not fit it.", written.misfits));
    }
    if written.restarts > 0 {
        text.push_str(
            "\nRestart the agents of all hosts: until then, restarted ones cannot reach the others.",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Lifetime, Version};

    const BEFORE: &str = r#"{"Network":"10.5.0.0/16"}"#;
    const VALUE: &[u8] = br#"{"PublicIP":"192.168.77.2"}"#;

    fn parse(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    #[test]
    fn changes_are_of_effective_values() {
        assert_eq!(changes(Some(BEFORE), &parse(r#"{"network":"10.5.0.0/16","SubnetLen":24}"#)), []);
        let port = parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":4789}}"#);
        let change =
            ConfigChange { key: "Backend.Port", before: Some("8285".to_owned()), after: "4789".to_owned() };
        assert_eq!(changes(Some(BEFORE), &port), [change]);
        assert_eq!(changes(Some("junk"), &port).len(), 6);
        assert_eq!(changes(None, &port).len(), 6);
        let services = parse(r#"{"Network":"10.5.0.0/16","Services":{}}"#);
        assert_eq!(changes(Some(BEFORE), &services).len(), 3);
        let removed = changes(Some(r#"{"Network":"10.5.0.0/16","Services":{}}"#), &parse(BEFORE));
        let pool = removed.iter().find(|change| change.key == "Services.Pool").unwrap();
        assert_eq!((pool.before.as_deref(), pool.after.as_str()), (Some("10.251.0.0/16"), "none"));
    }

    #[test]
    fn records_that_would_not_fit_are_found() {
        let records = ["10.5.1.0-24", "10.5.200.0-24", "10.5.3.0-25", "junk"]
            .map(|key| LeaseRecord::parse(key, VALUE, Version::default()));
        assert_eq!(misfits(&parse(BEFORE), &records), ["10.5.3.0/25 of 192.168.77.2"]);
        let smaller = misfits(&parse(r#"{"Network":"10.5.0.0/17"}"#), &records);
        assert_eq!(smaller, ["10.5.200.0/24 of 192.168.77.2", "10.5.3.0/25 of 192.168.77.2"]);
    }

    #[test]
    fn hosts_are_separated_by_changes_that_all_must_share() {
        let record = |key, lifetime| {
            let mut record = LeaseRecord::parse(key, VALUE, Version::default());
            record.version.lifetime = lifetime;
            record
        };
        let records = [
            record("10.5.1.0-24", Lifetime::Limited(7)),
            record("10.5.2.0-24", Lifetime::Untracked),
            record("10.5.3.0-24", Lifetime::Unlimited),
            record("junk", Lifetime::Untracked),
        ];
        for (before, after, separated) in [
            (Some(BEFORE), r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":4789}}"#, 2),
            (Some(BEFORE), r#"{"Network":"10.5.0.0/17"}"#, 2),
            (Some(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#), BEFORE, 2),
            (Some(BEFORE), r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.9.0","SubnetMin":"10.5.1.0"}"#, 0),
            // Hosts have read one that is gone.
            (None, BEFORE, 2),
        ] {
            let after = parse(after);
            let changed = changes(before, &after);
            let affected = Affected::by(&changed, &after, &records);
            assert_eq!((affected.separated.len(), affected.misfits.len()), (separated, 0), "{after:?}");
            let objection = affected.objection(before, &changed, &after);
            assert_eq!(objection.is_some(), separated > 0, "{objection:?}");
        }
    }
}
