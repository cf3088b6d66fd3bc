//! The flags that select the store, for every command that uses one.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::etcd_args::EtcdArgs;
use crate::{agent::StoreOption, store::Store};

#[derive(Clone, Debug, Args)]
pub(super) struct StoreArgs {
    /// Store of the leases: etcd, or dir:PATH for a directory with flannel's records
    /// [default: etcd, for `run` only when there is no --peer]
    #[arg(long, env = "OVERLAY_AGENT_STORE", value_name = "etcd|dir:PATH", value_parser = parse_store)]
    store: Option<StoreName>,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// Value of `--store`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum StoreName {
    Dir(PathBuf),
    Etcd,
}

impl StoreArgs {
    /// Opens the store, in one attempt.
    pub(super) async fn open(self) -> Result<Store> {
        match self.option(true)? {
            StoreOption::Dir(root) => Ok(Store::dir(root)),
            StoreOption::Etcd(options) => Ok(Store::etcd(*options).await?),
            StoreOption::None => bail!("there is no store: name it with --store"),
        }
    }

    /// The store. Without `--store` it is etcd if `etcd_is_default`, else none.
    pub(super) fn option(self, etcd_is_default: bool) -> Result<StoreOption> {
        let other = match self.store {
            Some(StoreName::Dir(path)) => StoreOption::Dir(path),
            None if !etcd_is_default => StoreOption::None,
            None | Some(StoreName::Etcd) => return Ok(StoreOption::Etcd(Box::new(self.etcd.into()))),
        };
        match self.etcd.any() {
            None => Ok(other),
            Some(flag) => bail!("{flag} applies only to leases in etcd: remove it, or add --store etcd"),
        }
    }
}

fn parse_store(text: &str) -> Result<StoreName, String> {
    match (text, text.strip_prefix("dir:")) {
        ("etcd", _) => Ok(StoreName::Etcd),
        (_, Some(path)) if !path.is_empty() => Ok(StoreName::Dir(path.into())),
        _ => Err("expected etcd, or dir:PATH, for example dir:/var/lib/overlay".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_stores_are_refused_with_an_example() {
        assert_eq!(parse_store("dir:/x").unwrap(), StoreName::Dir(PathBuf::from("/x")));
        assert_eq!(parse_store("etcd").unwrap(), StoreName::Etcd);
        assert!(parse_store("/x").unwrap_err().contains("dir:"));
        assert!(parse_store("dir:").unwrap_err().contains("dir:"));
    }
}
