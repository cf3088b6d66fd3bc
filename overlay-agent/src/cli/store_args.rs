//! The flags that select the store, for every command that uses one.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::etcd_args::EtcdArgs;
use crate::agent::StoreOption;

#[derive(Clone, Debug, Args)]
pub(super) struct StoreArgs {
    /// Store of the leases: etcd, or dir:PATH for a directory with flannel's records
    /// [default: etcd, for `run` only when there is no --peer]
    #[arg(long, env = "OVERLAY_AGENT_STORE", value_name = "etcd|dir:PATH", value_parser = parse_store)]
    store: Option<Store>,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// Value of `--store`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Store {
    Dir(PathBuf),
    Etcd,
}

impl StoreArgs {
    /// The store; without `--store` it is `default`.
    pub(super) fn option(self, default: impl FnOnce(EtcdArgs) -> StoreOption) -> Result<StoreOption> {
        let flag = self.etcd.any();
        let store = match self.store {
            None => default(self.etcd),
            Some(Store::Dir(path)) => StoreOption::Dir(path),
            Some(Store::Etcd) => in_etcd(self.etcd),
        };
        match (&store, flag) {
            (StoreOption::Dir(_) | StoreOption::None, Some(flag)) => {
                bail!("{flag} applies only to leases in etcd: remove it, or add --store etcd")
            }
            _ => Ok(store),
        }
    }
}

pub(super) fn in_etcd(args: EtcdArgs) -> StoreOption {
    StoreOption::Etcd(Box::new(args.into()))
}

fn parse_store(text: &str) -> Result<Store, String> {
    match (text, text.strip_prefix("dir:")) {
        ("etcd", _) => Ok(Store::Etcd),
        (_, Some(path)) if !path.is_empty() => Ok(Store::Dir(path.into())),
        _ => Err("expected etcd, or dir:PATH, for example dir:/var/lib/overlay".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_stores_are_refused_with_an_example() {
        assert_eq!(parse_store("dir:/x").unwrap(), Store::Dir(PathBuf::from("/x")));
        assert_eq!(parse_store("etcd").unwrap(), Store::Etcd);
        assert!(parse_store("/x").unwrap_err().contains("dir:"));
        assert!(parse_store("dir:").unwrap_err().contains("dir:"));
    }
}
