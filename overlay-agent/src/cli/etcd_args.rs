//! flanneld's flags for etcd.

use std::path::PathBuf;

use clap::Args;
use secrecy::SecretString;

use crate::store::etcd::EtcdOptions;

/// Connection to etcd and prefix of the network's keys. `Debug` does not show the password.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "etcd (the default store)")]
pub(super) struct EtcdArgs {
    /// Endpoints of the etcd cluster, separated by commas [default: http://127.0.0.1:4001,http://127.0.0.1:2379]
    #[arg(long, value_name = "URL,...", value_delimiter = ',')]
    etcd_endpoints: Option<Vec<String>>,
    /// Prefix of the keys of the network's config and leases; one per network [default: /coreos.com/network]
    #[arg(long, value_name = "KEY")]
    etcd_prefix: Option<String>,
    /// Private key of the client certificate, PEM
    #[arg(long, value_name = "PATH", requires = "etcd_certfile")]
    etcd_keyfile: Option<PathBuf>,
    /// Client certificate, PEM
    #[arg(long, value_name = "PATH", requires = "etcd_keyfile")]
    etcd_certfile: Option<PathBuf>,
    /// Certificate authorities for etcd's certificate, or that certificate itself, PEM [default: the system's]
    #[arg(long, value_name = "PATH")]
    etcd_cafile: Option<PathBuf>,
    /// User name for etcd's authentication
    #[arg(long, value_name = "NAME", requires = "etcd_password")]
    etcd_username: Option<String>,
    /// Password; FLANNELD_ETCD_PASSWORD keeps it out of the process list
    #[arg(long, value_name = "PASSWORD", requires = "etcd_username", hide_env_values = true)]
    etcd_password: Option<SecretString>,
}

impl EtcdArgs {
    /// The name of one flag that is set.
    pub(super) fn any(&self) -> Option<&'static str> {
        [
            ("--etcd-endpoints", self.etcd_endpoints.is_some()),
            ("--etcd-prefix", self.etcd_prefix.is_some()),
            ("--etcd-keyfile", self.etcd_keyfile.is_some()),
            ("--etcd-certfile", self.etcd_certfile.is_some()),
            ("--etcd-cafile", self.etcd_cafile.is_some()),
            ("--etcd-username", self.etcd_username.is_some()),
            ("--etcd-password", self.etcd_password.is_some()),
        ]
        .into_iter()
        .find_map(|(name, set)| set.then_some(name))
    }
}

impl From<EtcdArgs> for EtcdOptions {
    fn from(args: EtcdArgs) -> Self {
        let default = Self::default();
        Self {
            endpoints: args.etcd_endpoints.unwrap_or(default.endpoints),
            prefix: args.etcd_prefix.unwrap_or(default.prefix),
            ca_file: args.etcd_cafile,
            cert_file: args.etcd_certfile,
            key_file: args.etcd_keyfile,
            username: args.etcd_username,
            password: args.etcd_password,
            ..Self::default()
        }
    }
}
