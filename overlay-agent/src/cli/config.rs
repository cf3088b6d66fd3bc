//! `overlay-agent config`: shows, writes and checks the network config in the store.

use std::{fs::File, io::Read};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Output, StoreQuery,
    query::{print, table},
    store_args::StoreArgs,
};
use crate::{config::NetworkConfig, lease::LeaseRecord, printable::printable};

/// Size limit of a config in bytes; flannel's have about 100.
const LONGEST: u64 = 64 * 1024;

const SHOW_AFTER_HELP: &str = "\
Examples:
  overlay-agent config show --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config show --store dir:/var/lib/overlay -o json";

const SET_AFTER_HELP: &str = "\
Examples:
  overlay-agent config set '{\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"udp\"}}'
  overlay-agent config set network.json --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config set - --store dir:/var/lib/overlay < network.json

Agents read the config when they start. A host whose lease no longer fits then acquires another subnet, so such a change \
needs --force.";

const CHECK_AFTER_HELP: &str = "\
Examples:
  overlay-agent config check network.json
  overlay-agent config check '{\"Network\":\"10.244.0.0/16\"}' -o json
  overlay-agent config check --etcd-endpoints http://192.168.77.10:2379

The exit code is 1 when agents cannot use the config.";

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print the stored config, and the effective values with defaults
    #[command(args_override_self = true, after_help = SHOW_AFTER_HELP)]
    Show(StoreQuery),
    /// Write the config, unless agents cannot use it or a host would lose its subnet
    #[command(args_override_self = true, after_help = SET_AFTER_HELP)]
    Set(SetArgs),
    /// Check a config before it is written, or the stored one
    #[command(args_override_self = true, after_help = CHECK_AFTER_HELP)]
    Check(CheckArgs),
}

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// Config: a file, - for standard input, or JSON
    #[arg(value_name = "FILE|-|JSON", value_parser = NonEmptyStringValueParser::new())]
    input: String,
    /// Write the config even if leases do not fit it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    query: StoreQuery,
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Config: a file, - for standard input, or JSON [default: the stored one]
    #[arg(value_name = "FILE|-|JSON", value_parser = NonEmptyStringValueParser::new())]
    input: Option<String>,
    #[command(flatten)]
    query: StoreQuery,
}

/// A config and how agents read it.
#[derive(Debug, Serialize)]
struct Verdict {
    /// Store location, or input.
    source: String,
    text: String,
    usable: bool,
    /// Why agents cannot use it.
    problem: Option<String>,
    /// Keys unknown to flannel and to this agent.
    unknown_keys: Vec<String>,
    /// All of flannel's keys with their values; `null` when the config cannot be used.
    effective: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Written {
    location: String,
    before: Option<String>,
    /// Effective values that changed.
    changes: Vec<ConfigChange>,
    unknown_keys: Vec<String>,
    /// Records that do not fit it.
    misfits: usize,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct ConfigChange {
    key: &'static str,
    /// `None` where there was nothing that could be used.
    before: Option<String>,
    after: String,
}

pub(super) async fn show(StoreQuery { output, store }: StoreQuery) -> Result<()> {
    let verdict = stored(store).await?;
    print(output, &verdict, |verdict| {
        let lines = verdict.text.trim_end().lines().map(|line| printable(line, usize::MAX));
        let text = lines.collect::<Vec<_>>().join("\n");
        let table = effective(&verdict.text).map(|table| format!("\n\n{table}"));
        format!("{}:\n{text}{}", verdict.source, table.unwrap_or_default())
    })?;
    verdict.judge()
}

pub(super) async fn check(args: CheckArgs) -> Result<()> {
    let verdict = match args.input {
        Some(input) => read(&input).map(|(source, text)| Verdict::of(source, text))?,
        None => stored(args.query.store).await?,
    };
    match (&verdict.problem, args.query.output) {
        // The error is the answer.
        (Some(_), Output::Text) => {}
        (_, output) => print(output, &verdict, |verdict| {
            let table = effective(&verdict.text).unwrap_or_default();
            format!("{} can be used:\n{table}", verdict.source)
        })?,
    }
    verdict.judge()
}

pub(super) async fn set(args: SetArgs) -> Result<()> {
    let (source, text) = read(&args.input)?;
    let config = NetworkConfig::parse(&text).context(source)?;
    let store = args.query.store.open().await?;
    let before = store.config_text().await?.and_then(|text| NetworkConfig::parse(&text).ok());
    // Hosts keep their subnets when only the port changes.
    let same = before.is_some_and(|before| NetworkConfig { port: config.port, ..before } == config);
    let misfits = match same || !store.exists() {
        true => Vec::new(),
        false => misfits(&config, &store.list().await?),
    };
    if let (Some(first), false) = (misfits.first(), args.force) {
        bail!(
            "not written: {} of the leases would not fit, the first is {first}: subnets would range from {}/{len} to \
             {}/{len}; --force writes it anyway, and those hosts acquire other subnets when they restart",
            misfits.len(),
            config.subnet_min,
            config.subnet_max,
            len = config.subnet_len,
        );
    }
    let before = store.set_config(&text).await?;
    let written = Written {
        location: store.config_location(),
        changes: changes(before.as_deref(), &config),
        before,
        unknown_keys: NetworkConfig::unknown_keys(&text),
        misfits: misfits.len(),
    };
    warn_of(&written.unknown_keys);
    print(args.query.output, &written, written_text)
}

async fn stored(args: StoreArgs) -> Result<Verdict> {
    let store = args.open().await?;
    let location = store.config_location();
    match store.config_text().await? {
        Some(text) => Ok(Verdict::of(location, text)),
        None => bail!(
            "there is no network config at {location}: write one with `overlay-agent config set`, for example \
             '{{\"Network\":\"10.244.0.0/16\"}}'"
        ),
    }
}

impl Verdict {
    fn of(source: String, text: String) -> Self {
        let parsed = NetworkConfig::parse(&text);
        Self {
            source,
            usable: parsed.is_ok(),
            problem: parsed.as_ref().err().map(ToString::to_string),
            unknown_keys: NetworkConfig::unknown_keys(&text),
            effective: parsed.ok().map(|config| {
                json!({
                    "Network": config.network,
                    "SubnetLen": config.subnet_len,
                    "SubnetMin": config.subnet_min,
                    "SubnetMax": config.subnet_max,
                    "Backend": { "Type": "udp", "Port": config.port },
                })
            }),
            text,
        }
    }

    /// Prints warnings; an error when agents cannot use the config.
    fn judge(&self) -> Result<()> {
        warn_of(&self.unknown_keys);
        match &self.problem {
            None => Ok(()),
            Some(problem) => bail!("{} cannot be used: {problem}", self.source),
        }
    }
}

fn warn_of(unknown_keys: &[String]) {
    for key in unknown_keys {
        eprintln!("warning: the key {:?} is ignored: it is unknown to flannel and to overlay-agent", key);
    }
}

/// Reads a config from a file, from standard input, or from the argument itself. Returns what it is, and its text.
fn read(input: &str) -> Result<(String, String)> {
    let (source, text) = match input.trim_start().as_bytes() {
        [b'{' | b'[', ..] => ("the config on the command line".to_owned(), Ok(input.to_owned())),
        b"-" => ("the config on standard input".to_owned(), read_limited(std::io::stdin())),
        _ => (format!("the config {input}"), File::open(input).map_err(Into::into).and_then(read_limited)),
    };
    let text = text.with_context(|| format!("read {source}"))?;
    Ok((source, text))
}

fn read_limited(from: impl Read) -> Result<String> {
    let mut text = String::new();
    from.take(LONGEST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LONGEST {
        bail!("it is longer than {} KiB", LONGEST / 1024);
    }
    Ok(text)
}

/// Descriptions of leases that hosts could not keep under `config`, except those of other backends.
fn misfits(config: &NetworkConfig, records: &[LeaseRecord]) -> Vec<String> {
    let misfit = |record: &LeaseRecord| {
        let value = record.value.as_ref().ok().filter(|value| value.backend_type.is_none())?;
        let subnet = record.subnet()?;
        let fits = config.may_be_held(subnet, record.is_reservation());
        (!fits).then(|| format!("{subnet} of {}", value.public_ip))
    };
    records.iter().filter_map(misfit).collect()
}

fn values(config: &NetworkConfig) -> [(&'static str, String); 6] {
    [
        ("Network", config.network.to_string()),
        ("SubnetLen", config.subnet_len.to_string()),
        ("SubnetMin", config.subnet_min.to_string()),
        ("SubnetMax", config.subnet_max.to_string()),
        ("Backend.Type", "udp".to_owned()),
        ("Backend.Port", config.port.to_string()),
    ]
}

/// The effective values of `text`, with defaults marked.
fn effective(text: &str) -> Option<String> {
    let config = NetworkConfig::parse(text).ok()?;
    let named = NetworkConfig::named_keys(text);
    let mut table = table();
    for (key, value) in values(&config) {
        let note = if named.contains(&key) { "" } else { "(default)" };
        table.add_row([key, &value, note]);
    }
    Some(table.to_string())
}

fn changes(before: Option<&str>, after: &NetworkConfig) -> Vec<ConfigChange> {
    let before = before.and_then(|text| NetworkConfig::parse(text).ok());
    let before = before.iter().flat_map(values).map(|(_, value)| Some(value));
    values(after)
        .into_iter()
        .zip(before.chain(std::iter::repeat(None)))
        .map(|((key, after), before)| ConfigChange { key, before, after })
        .filter(|change| change.before.as_ref() != Some(&change.after))
        .collect()
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
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Version;

    const BEFORE: &str = r#"{"Network":"10.5.0.0/16"}"#;

    fn parse(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    #[test]
    fn an_input_is_json_or_a_file_of_limited_length() {
        assert_eq!(read(" {}").unwrap().1, " {}");
        for (file, words) in [("/does/not/exist", "/does/not/exist"), ("/dev/zero", "64 KiB")] {
            let error = format!("{:#}", read(file).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn changes_are_of_effective_values() {
        assert_eq!(changes(Some(BEFORE), &parse(r#"{"network":"10.5.0.0/16","SubnetLen":24}"#)), []);
        let port = parse(r#"{"Network":"10.5.0.0/16","Backend":{"Port":4789}}"#);
        let change =
            ConfigChange { key: "Backend.Port", before: Some("8285".to_owned()), after: "4789".to_owned() };
        assert_eq!(changes(Some(BEFORE), &port), [change]);
        assert_eq!(changes(Some("junk"), &port).len(), 6);
        assert_eq!(changes(None, &port).len(), 6);
    }

    #[test]
    fn records_that_would_not_fit_are_found() {
        let value = br#"{"PublicIP":"192.168.77.2"}"#;
        let records = ["10.5.1.0-24", "10.5.200.0-24", "10.5.3.0-25", "junk"]
            .map(|key| LeaseRecord::parse(key, value, Version::default()));
        assert_eq!(misfits(&parse(BEFORE), &records), ["10.5.3.0/25 of 192.168.77.2"]);
        let smaller = misfits(&parse(r#"{"Network":"10.5.0.0/17"}"#), &records);
        assert_eq!(smaller, ["10.5.200.0/24 of 192.168.77.2", "10.5.3.0/25 of 192.168.77.2"]);
    }

    #[test]
    fn defaults_are_marked() {
        let text = effective(r#"{"Network":"10.5.0.0/16","backend":{"port":4789}}"#).unwrap();
        let defaults = text.lines().filter(|line| line.contains("(default)"));
        let keys: Vec<_> = defaults.filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(keys, ["SubnetLen", "SubnetMin", "SubnetMax", "Backend.Type"]);
        assert_eq!(effective("{}"), None);
    }
}
