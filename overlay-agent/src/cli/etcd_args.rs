//! How to reach etcd: flannel's flags for it.

use std::path::PathBuf;

use clap::Args;

use crate::store::etcd::{EtcdOptions, Password};

/// Flags of `--store etcd`. Their names and defaults are flanneld's.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "With --store etcd")]
pub(super) struct EtcdArgs {
    /// Members of the etcd cluster, separated by commas
    #[arg(
        long,
        env = "OVERLAY_AGENT_ETCD_ENDPOINTS",
        value_name = "URL,...",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379"
    )]
    etcd_endpoints: Vec<String>,
    /// Key under which the network's config and leases are; one per network
    #[arg(
        long,
        env = "OVERLAY_AGENT_ETCD_PREFIX",
        value_name = "KEY",
        default_value = "/coreos.com/network"
    )]
    etcd_prefix: String,
    /// Certificates of the authorities that etcd's certificate may come from, PEM
    #[arg(long, env = "OVERLAY_AGENT_ETCD_CAFILE", value_name = "PATH")]
    etcd_cafile: Option<PathBuf>,
    /// Client certificate, PEM
    #[arg(long, env = "OVERLAY_AGENT_ETCD_CERTFILE", value_name = "PATH")]
    etcd_certfile: Option<PathBuf>,
    /// Private key of the client certificate, PEM
    #[arg(long, env = "OVERLAY_AGENT_ETCD_KEYFILE", value_name = "PATH")]
    etcd_keyfile: Option<PathBuf>,
    /// User of etcd's own authentication
    #[arg(long, env = "OVERLAY_AGENT_ETCD_USERNAME", value_name = "NAME")]
    etcd_username: Option<String>,
    /// Their password; the variable keeps it out of the process list
    #[arg(
        long,
        env = "OVERLAY_AGENT_ETCD_PASSWORD",
        hide_env_values = true,
        value_name = "PASSWORD",
        value_parser = |text: &str| Ok::<_, std::convert::Infallible>(Password::from(text.to_owned()))
    )]
    etcd_password: Option<Password>,
}

impl From<EtcdArgs> for EtcdOptions {
    fn from(args: EtcdArgs) -> Self {
        Self {
            endpoints: args.etcd_endpoints,
            prefix: args.etcd_prefix,
            ca_file: args.etcd_cafile,
            cert_file: args.etcd_certfile,
            key_file: args.etcd_keyfile,
            username: args.etcd_username,
            password: args.etcd_password,
            ..Self::default()
        }
    }
}
