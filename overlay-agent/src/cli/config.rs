//! `overlay-agent config`: shows and checks the network config in the store; `config_set` writes it.

use std::{fs::File, io::Read};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Output, StoreQuery,
    config_set::{SET_AFTER_HELP, SetArgs},
    query::{print, table},
    store_args::StoreArgs,
};
use crate::{config::NetworkConfig, printable::printable, service::config::ServicesConfig};

/// Size limit of a config in bytes; flannel's have about 100.
const LONGEST: u64 = 64 * 1024;

const SHOW_AFTER_HELP: &str = "\
Examples:
  overlay-agent config show --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config show --store dir:/var/lib/overlay -o json";

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
    /// Write the config, unless agents cannot use it or running hosts would be affected
    #[command(args_override_self = true, after_help = SET_AFTER_HELP)]
    Set(SetArgs),
    /// Check a config before it is written, or the stored one
    #[command(args_override_self = true, after_help = CHECK_AFTER_HELP)]
    Check(CheckArgs),
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
    /// What an operator should know about it.
    warnings: Vec<String>,
    /// All of flannel's keys and this agent's with their values; `null` when the config cannot be used.
    effective: Option<Value>,
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
            warnings: NetworkConfig::warnings(&text),
            effective: parsed.ok().map(|config| {
                json!({
                    "Network": config.network,
                    "SubnetLen": config.subnet_len,
                    "SubnetMin": config.subnet_min,
                    "SubnetMax": config.subnet_max,
                    "Backend": { "Type": "udp", "Port": config.port },
                    "Services": config.services.as_ref().map(ServicesConfig::json),
                })
            }),
            text,
        }
    }

    /// Prints warnings; an error when agents cannot use the config.
    fn judge(&self) -> Result<()> {
        warn_of(&self.warnings);
        match &self.problem {
            None => Ok(()),
            Some(problem) => bail!("{} cannot be used: {problem}", self.source),
        }
    }
}

pub(super) fn warn_of(warnings: &[String]) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

/// Reads a config from a file, from standard input, or from the argument itself. Returns what it is, and its text.
pub(super) fn read(input: &str) -> Result<(String, String)> {
    read_input("config", input, LONGEST)
}

/// Reads a text of at most `longest` bytes from a file, from standard input, or from the argument itself when it begins with a brace
/// or bracket. Returns a description that begins with "the `what`", and the text.
pub(super) fn read_input(what: &str, input: &str, longest: u64) -> Result<(String, String)> {
    let (source, text) = match input.trim_start().as_bytes() {
        [b'{' | b'[', ..] => (format!("the {what} on the command line"), Ok(input.to_owned())),
        b"-" => (format!("the {what} on standard input"), read_limited(std::io::stdin(), longest)),
        _ => {
            let file = File::open(input).map_err(Into::into);
            (format!("the {what} {input}"), file.and_then(|file| read_limited(file, longest)))
        }
    };
    let text = text.with_context(|| format!("read {source}"))?;
    Ok((source, text))
}

fn read_limited(from: impl Read, longest: u64) -> Result<String> {
    let mut text = String::new();
    from.take(longest + 1).read_to_string(&mut text)?;
    if text.len() as u64 > longest {
        bail!("it is longer than {} KiB", longest / 1024);
    }
    Ok(text)
}

pub(super) fn values(config: &NetworkConfig) -> Vec<(&'static str, String)> {
    let own = config.services.as_ref().map(ServicesConfig::values);
    let flannels = [
        ("Network", config.network.to_string()),
        ("SubnetLen", config.subnet_len.to_string()),
        ("SubnetMin", config.subnet_min.to_string()),
        ("SubnetMax", config.subnet_max.to_string()),
        ("Backend.Type", "udp".to_owned()),
        ("Backend.Port", config.port.to_string()),
    ];
    flannels.into_iter().chain(own.into_iter().flatten()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_json_or_a_file_of_limited_length() {
        assert_eq!(read(" {}").unwrap().1, " {}");
        for (file, words) in [("/does/not/exist", "/does/not/exist"), ("/dev/zero", "64 KiB")] {
            let error = format!("{:#}", read(file).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn defaults_are_marked() {
        let text = effective(r#"{"Network":"10.5.0.0/16","backend":{"type":"udp","port":4789}}"#).unwrap();
        let defaults = text.lines().filter(|line| line.contains("(default)"));
        let keys: Vec<_> = defaults.filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(keys, ["SubnetLen", "SubnetMin", "SubnetMax"]);
        let text = effective(r#"{"Network":"10.5.0.0/16","Services":{"Domain":"cluster.local"}}"#).unwrap();
        assert!(text.lines().any(|line| line.contains("Services.Pool") && line.contains("(default)")));
        assert!(text.lines().any(|line| line.contains("cluster.local") && !line.contains("(default)")));
        assert_eq!(effective("{}"), None);
    }
}
