//! Compares the network's configuration in the store with the one that this agent uses.
//!
//! An agent reads the configuration when it starts and keeps it. So after a change of the network or the port, hosts that have
//! restarted since and hosts that have not cannot reach each other, although each of them works.

use tokio::sync::mpsc;

use crate::{config::NetworkConfig, store::Store};

/// The configuration in use, and the stored one as it changes.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    used: NetworkConfig,
    /// Where the configuration is stored, for messages.
    location: String,
    changes: mpsc::Receiver<Option<String>>,
}

impl ConfigWatch {
    /// Starts to follow the stored configuration.
    pub(super) fn start(store: &Store, used: NetworkConfig) -> Self {
        Self { used, location: store.config_location(), changes: store.follow_config() }
    }

    /// The stored configuration, now and after each change; `Some(None)` when it was removed.
    pub(super) async fn next(&mut self) -> Option<Option<String>> {
        self.changes.recv().await
    }

    /// What the stored configuration does to hosts that start from now on, if they cannot work with this one.
    pub(super) fn problem(&self, stored: Option<&str>) -> Option<String> {
        let why = match stored.map(NetworkConfig::parse) {
            None => "was removed: agents that start wait until it is written again".to_owned(),
            Some(Err(error)) => {
                format!("cannot be used any more, and agents that start wait for another: {error}")
            }
            Some(Ok(stored)) => format!(
                "changed: {}; hosts that restart cannot reach this one: restart this agent too, or change it back",
                self.difference(&stored)?
            ),
        };
        Some(format!("the network config at {} {why}", self.location))
    }

    /// The values by which hosts with another configuration are cut off from this one.
    fn difference(&self, stored: &NetworkConfig) -> Option<String> {
        let NetworkConfig { network, port, .. } = &self.used;
        let network = (stored.network != *network)
            .then(|| format!("Network is {} and this agent uses {network}", stored.network));
        let port = (stored.port != *port)
            .then(|| format!("Backend.Port is {} and this agent uses {port}", stored.port));
        let all: Vec<_> = network.into_iter().chain(port).collect();
        (!all.is_empty()).then(|| all.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_config_that_cuts_hosts_off_is_a_problem() {
        let watch = ConfigWatch {
            used: NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap(),
            location: "/net/config".to_owned(),
            changes: mpsc::channel(1).1,
        };
        for (stored, words) in [
            (
                Some(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":4789}}"#),
                "changed: Backend.Port is 4789",
            ),
            (Some(r#"{"Network":"10.245.0.0/16"}"#), "changed: Network is 10.245.0.0/16"),
            (Some(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#), "cannot be used any more"),
            (Some("junk"), "cannot be used any more"),
            (None, "was removed"),
        ] {
            let why = watch.problem(stored).unwrap();
            assert!(why.starts_with(&format!("the network config at /net/config {words}")), "{why}");
        }
        // Hosts with another subnet length reach each other.
        for stored in [
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":8285}}"#,
            r#"{"Network":"10.244.0.0/16","SubnetLen":26}"#,
        ] {
            assert_eq!(watch.problem(Some(stored)), None);
        }
    }
}
