//! The command line.

mod config;
mod config_set;
mod datapath;
mod down;
mod endpoints;
mod etcd_args;
mod flannel_args;
mod host_args;
mod leases;
mod query;
mod run;
mod service_args;
mod services;
mod state_args;
mod store_args;
mod top;
mod underlay_args;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use self::{
    config::ConfigCommand, datapath::DatapathCommand, endpoints::EndpointCommand, leases::LeaseCommand,
    services::ServiceCommand,
};
use crate::{
    control::{self, Query},
    datapath::ebpf,
};

const AFTER_HELP: &str = "\
Examples:
  overlay-agent run --etcd-endpoints http://192.168.77.10:2379 --ip-masq
  overlay-agent run --store dir:/var/lib/overlay --network 10.244.0.0/16
  overlay-agent run --network 10.244.0.0/16 --subnet 10.244.1.0/24 --peer 10.244.2.0/24=192.168.77.2
  overlay-agent status --watch
  overlay-agent counters -o json
  overlay-agent datapath set tc
  overlay-agent leases --etcd-endpoints http://192.168.77.10:2379
  overlay-agent config set network.json --store dir:/var/lib/overlay
  overlay-agent service set web.yaml --store dir:/var/lib/overlay
  overlay-agent endpoint add shop/web --address 10.244.1.2
  overlay-agent service top
  overlay-agent down

Exit codes: 0 success, 1 refused or failed (one line on standard error gives the reason), 2 wrong usage. status, routes and counters: 3 \
when no agent runs and they show what one that has ended left in the kernel, 1 when there is nothing.";

// One line per paragraph: the parser fits it to the terminal.
const RUN_AFTER_HELP: &str = "\
flanneld's flags are accepted in flanneld's syntax, with one dash or two, and as environment variables: FLANNELD_IP_MASQ for \
--ip-masq. The command line takes precedence over OVERLAY_AGENT_* variables, and these over FLANNELD_* variables. Invoked as \
`flanneld`, this program runs `overlay-agent run`.";

/// Joins the containers of many Linux hosts into one network, over plain UDP.
#[derive(Debug, Parser)]
#[command(version = version(), after_help = AFTER_HELP, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Acquire a subnet, create the overlay device and forward packets until SIGTERM
    #[command(args_override_self = true, after_help = RUN_AFTER_HELP)]
    Run(Box<run::RunArgs>),
    /// Show the state of the running agent, or of what one that has ended left
    Status(StatusArgs),
    /// Show the routes, and the records that were skipped
    Routes(QueryArgs),
    /// Show the packets that were forwarded, punted to the slow path and dropped, and changes of the datapath
    Counters(QueryArgs),
    /// Show or change how the running agent moves packets: xdp, tc or tun
    #[command(subcommand)]
    Datapath(DatapathCommand),
    /// List the leases in the store: subnet, host and remaining time
    #[command(args_override_self = true, after_help = leases::LIST_AFTER_HELP)]
    Leases(StoreQuery),
    /// Release the lease of a host that is gone
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Show, write or check the network config in the store
    #[command(subcommand)]
    Config(ConfigCommand),
    /// List, show, write or remove services in the store, and show their traffic
    #[command(subcommand)]
    Service(ServiceCommand),
    /// List, write, drain or remove endpoints of services in the store
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Stop the agent, if one runs, and remove everything that an agent left on this host, but the snapshot in its --state-dir
    Down(QueryArgs),
}

/// Selects one of the agents on this host.
#[derive(Clone, Debug, Args)]
struct AgentArgs {
    /// Name of the overlay device
    #[arg(long, env = "OVERLAY_AGENT_DEVICE", default_value = "ovl0", value_name = "NAME")]
    device: String,
    /// Directory of the control socket and of the record of the last run
    #[arg(long, env = "OVERLAY_AGENT_RUN_DIR", default_value = "/run/overlay-agent", value_name = "DIR")]
    run_dir: PathBuf,
}

impl AgentArgs {
    fn socket(&self) -> PathBuf {
        control::path(&self.run_dir, &self.device)
    }
}

#[derive(Clone, Debug, Args)]
struct QueryArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// A store, and the format of the answer.
#[derive(Debug, Args)]
struct StoreQuery {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    store: store_args::StoreArgs,
}

#[derive(Clone, Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    query: QueryArgs,
    /// Print the state again whenever it changes, until interrupted; JSON is one object per line
    #[arg(short, long)]
    watch: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    /// Tables
    #[default]
    Text,
    /// JSON with stable names
    Json,
}

/// Parses and runs the command line.
pub fn main() -> ExitCode {
    let arguments = flannel_args::command_line(std::env::args_os(), |name| std::env::var_os(name));
    let words = arguments.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        // The parser's exit code for wrong usage.
        std::process::exit(2)
    });
    let cli = Cli::parse_from(words);
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let result = runtime.block_on(async {
        let done = match command {
            Command::Run(args) => run::run(*args).await,
            Command::Status(args) if args.watch => query::watch_status(&args.query).await,
            Command::Status(args) => {
                return query::query(&args.query, Query::Status, query::status, query::left_status).await;
            }
            Command::Routes(args) => {
                return query::query(&args, Query::Routes, query::routes, query::left_routes).await;
            }
            Command::Counters(args) => {
                return query::query(&args, Query::Counters, query::counters, query::left_counters).await;
            }
            Command::Datapath(command) => datapath::run(command).await,
            Command::Leases(args) => leases::leases(args).await,
            Command::Lease(LeaseCommand::Release(args)) => leases::release(args).await,
            Command::Config(ConfigCommand::Show(args)) => config::show(args).await,
            Command::Config(ConfigCommand::Set(args)) => config_set::set(args).await,
            Command::Config(ConfigCommand::Check(args)) => config::check(args).await,
            Command::Service(command) => services::run(command).await,
            Command::Endpoint(command) => endpoints::run(command).await,
            Command::Down(args) => down::down(&args).await,
        };
        done.map(|()| ExitCode::SUCCESS)
    });
    // A connection to a store that hangs must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// The version and the datapaths of this binary.
fn version() -> &'static str {
    match ebpf::OBJECT {
        Some(_) => concat!(env!("CARGO_PKG_VERSION"), " (datapaths: xdp, tc, tun)"),
        None => concat!(env!("CARGO_PKG_VERSION"), " (datapath: tun only, built without eBPF programs)"),
    }
}
