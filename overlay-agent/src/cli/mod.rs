//! What people type.

mod config;
mod down;
mod etcd_args;
mod flannel_args;
mod host_args;
mod leases;
mod query;
mod run;
mod store;
mod store_args;
mod underlay_args;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{control::Question, datapath::ebpf};

const AFTER_HELP: &str = "\
Examples:
  overlay-agent run --etcd-endpoints http://192.168.77.10:2379 --ip-masq
  overlay-agent run --store dir:/var/lib/overlay --network 10.244.0.0/16
  overlay-agent run --network 10.244.0.0/16 --subnet 10.244.1.0/24 --peer 10.244.2.0/24=192.168.77.2
  overlay-agent status
  overlay-agent counters -o json
  overlay-agent leases --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config set network.json --store dir:/var/lib/overlay
  overlay-agent down

Exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage.";

// One line per paragraph: the parser fits it to the terminal.
const RUN_AFTER_HELP: &str = "\
Every flag of flanneld's can be written as flanneld takes it, with one dash or two, and set as a variable: FLANNELD_IP_MASQ \
for --ip-masq. The command line goes first, then OVERLAY_AGENT_*, then FLANNELD_*. Called by the name flanneld, this \
program is `overlay-agent run`.";

/// Joins the containers of many Linux hosts into one network, over plain UDP.
#[derive(Debug, Parser)]
#[command(version = version(), after_help = AFTER_HELP, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take a subnet, make the overlay device and carry packets until SIGTERM
    #[command(args_override_self = true, after_help = RUN_AFTER_HELP)]
    Run(Box<run::RunArgs>),
    /// Show how the running agent fares
    Status(QueryArgs),
    /// Show where packets go, and which records are no routes
    Routes(QueryArgs),
    /// Show what was carried, handed to the slow path, and discarded
    Counters(QueryArgs),
    /// List who holds which subnet in the store, and for how long
    #[command(args_override_self = true)]
    Leases(leases::LeasesArgs),
    /// Take a subnet from a host that is gone
    #[command(subcommand)]
    Lease(leases::LeaseCommand),
    /// Show, write or check the network's configuration in the store
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Remove everything that an agent, also a killed one, left on this host
    Down(QueryArgs),
}

/// Which agent.
#[derive(Clone, Debug, Args)]
struct AgentArgs {
    /// Name of the overlay device
    #[arg(long, env = "OVERLAY_AGENT_DEVICE", default_value = "ovl0", value_name = "NAME")]
    device: String,
    /// Directory of the control socket
    #[arg(long, env = "OVERLAY_AGENT_RUN_DIR", default_value = "/run/overlay-agent", value_name = "DIR")]
    run_dir: PathBuf,
}

#[derive(Clone, Debug, Args)]
struct QueryArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Text,
    /// For scripts
    Json,
}

/// What the parser, too, exits with.
const WRONG_USAGE: u8 = 2;

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let words = match flannel_args::command_line(std::env::args_os(), |name| std::env::var_os(name)) {
        Ok(words) => words,
        Err(refusal) => {
            eprintln!("error: {refusal}");
            return ExitCode::from(WRONG_USAGE);
        }
    };
    let cli = Cli::parse_from(words);
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let result = runtime.block_on(async {
        match command {
            Command::Run(args) => run::run(*args).await,
            Command::Status(args) => query::query(&args, Question::Status).await,
            Command::Routes(args) => query::query(&args, Question::Routes).await,
            Command::Counters(args) => query::query(&args, Question::Counters).await,
            Command::Leases(args) => leases::leases(args).await,
            Command::Lease(leases::LeaseCommand::Release(args)) => leases::release(args).await,
            Command::Config(command) => config::config(command).await,
            Command::Down(args) => down::down(&args).await,
        }
    });
    // A store on a network that hangs must not keep a finished agent.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// The version, and what this binary can do.
fn version() -> &'static str {
    match ebpf::OBJECT {
        Some(_) => concat!(env!("CARGO_PKG_VERSION"), " (datapaths: xdp, tc, tun)"),
        None => concat!(env!("CARGO_PKG_VERSION"), " (datapath: tun only, built without eBPF programs)"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
