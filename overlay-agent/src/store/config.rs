//! The network's configuration: one record that all hosts share, and that operators write.

use ipnet::Ipv4Net;
use tokio::{sync::mpsc, time::sleep};
use tracing::{debug, warn};

use super::{
    Store, StoreError,
    backend::{Backend, Expected, Snapshot, Write},
    backoff::{STEADY, backoff},
    lease::ATTEMPTS,
    record::RawRecord,
};
use crate::config::NetworkConfig;

/// Key of the network's configuration.
const CONFIG: &str = "config";

impl Store {
    /// Location of the network's configuration, for messages.
    pub fn config_location(&self) -> String {
        let location = self.backend.location(CONFIG);
        match &self.backend {
            Backend::Dir(_) => location,
            Backend::Etcd(_) => format!("{location} in {}", self.name()),
        }
    }

    /// The network's configuration as it is stored; `None` when there is none.
    /// Fails when the store cannot be read.
    pub async fn config_text(&self) -> Result<Option<String>, StoreError> {
        let record = self.backend.get_one(CONFIG).await?;
        Ok(record.map(into_text))
    }

    /// The network's configuration. A directory without one takes `network`, see [`Self::ensure_config`].
    /// Fails when the store cannot be read, the configuration cannot be used or contradicts `network`, or a directory
    /// has none.
    pub async fn config(&self, network: Option<Ipv4Net>) -> Result<NetworkConfig, StoreError> {
        let location = self.config_location();
        let text = match (self.config_text().await?, network, &self.backend) {
            (Some(text), _, _) => text,
            (None, _, Backend::Etcd(_)) => return Err(StoreError::NoConfig(location)),
            (None, Some(network), Backend::Dir(_)) => config_record(network),
            (None, None, Backend::Dir(_)) => {
                return Err(StoreError::Conflict(format!(
                    "the store has no network config: write one to {location}, for example \
                     {{\"Network\":\"10.244.0.0/16\"}}, or name the network with --network"
                )));
            }
        };
        let config = match (self.parse_config(&text), &self.backend) {
            // As one that is missing: in a directory, the operator of this host writes it.
            (Err(unusable @ StoreError::Config { .. }), Backend::Dir(_)) => {
                return Err(StoreError::Conflict(unusable.to_string()));
            }
            (config, _) => config?,
        };
        match network {
            Some(network) if network.trunc() != config.network => Err(StoreError::Conflict(format!(
                "--network is {network}, but {location} says {}: change one of them",
                config.network
            ))),
            _ => {
                for warning in NetworkConfig::warnings(&text) {
                    warn!("the network config at {location}: {warning}");
                }
                Ok(config)
            }
        }
    }

    /// Writes the configuration of `network` to a directory that has none. In etcd, an operator does that.
    /// Fails when the directory cannot be written.
    pub async fn ensure_config(&self, network: Ipv4Net) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Etcd(_) => Ok(()),
            Backend::Dir(_) => self.write_config(config_record(network), Expected::Absent).await.map(drop),
        }
    }

    /// Writes the network's configuration, which must be usable. Returns the one that it replaces.
    /// Fails when `text` cannot be used or the store cannot be written.
    pub async fn set_config(&self, text: &str) -> Result<Option<String>, StoreError> {
        self.parse_config(text)?;
        for _ in 0..ATTEMPTS {
            let before = self.backend.get_one(CONFIG).await?;
            let expected = before.as_ref().map_or(Expected::Absent, |raw| Expected::Unchanged(raw.version));
            if self.write_config(text.to_owned(), expected).await? {
                return Ok(before.map(into_text));
            }
        }
        Err(StoreError::Contended(ATTEMPTS))
    }

    /// Writes the network's configuration, which must be usable, if the stored one is still `before`. `false` when it is not.
    /// Fails when `text` cannot be used or the store cannot be written.
    pub async fn replace_config(&self, before: Option<&str>, text: &str) -> Result<bool, StoreError> {
        self.parse_config(text)?;
        let stored = self.backend.get_one(CONFIG).await?;
        let expected = stored.as_ref().map_or(Expected::Absent, |raw| Expected::Unchanged(raw.version));
        if stored.map(into_text).as_deref() != before {
            return Ok(false);
        }
        self.write_config(text.to_owned(), expected).await
    }

    async fn write_config(&self, text: String, expected: Expected) -> Result<bool, StoreError> {
        Ok(self.backend.write(Write::new(CONFIG, expected, Some(text))).await?.is_some())
    }

    fn parse_config(&self, text: &str) -> Result<NetworkConfig, StoreError> {
        NetworkConfig::parse(text).map_err(|why| StoreError::Config { location: self.config_location(), why })
    }

    /// Follows the configuration in a task that ends when the receiver is dropped: the text that is stored, or `None`, now and
    /// after every change. While the store cannot be read, nothing is sent.
    pub fn follow_config(&self) -> mpsc::Receiver<Option<String>> {
        let (sender, receiver) = mpsc::channel(1);
        let store = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = store.send_configs(&sender) => {}
                () = sender.closed() => {}
            }
        });
        receiver
    }

    /// Never returns.
    async fn send_configs(&self, sender: &mpsc::Sender<Option<String>>) {
        let (mut sent, mut pauses) = (None, backoff());
        loop {
            match self.send_config_changes(sender, &mut sent).await {
                Ok(()) => pauses = backoff(),
                Err(error) => {
                    debug!("{error}");
                    sleep(pauses.next().unwrap_or(STEADY)).await;
                }
            }
        }
    }

    /// Returns after a change.
    async fn send_config_changes(
        &self,
        sender: &mpsc::Sender<Option<String>>,
        sent: &mut Option<Option<String>>,
    ) -> Result<(), StoreError> {
        let mut watch = None;
        loop {
            let Snapshot { revision, mut records } = self.backend.get(vec![CONFIG.to_owned()]).await?;
            let config = records.pop().flatten().map(into_text);
            if let Some(archive) = &self.archive {
                archive.set_config(config.clone());
            }
            if sent.as_ref() != Some(&config) {
                // A closed receiver ends the task.
                let _ = sender.send(config.clone()).await;
                *sent = Some(config);
            }
            match &mut watch {
                // Read again after it: a directory has no revision from which to watch.
                None => watch = Some(self.backend.watch_keys(&[CONFIG.to_owned()], revision).await?),
                Some(watch) => return watch.changed().await,
            }
        }
    }
}

fn into_text(record: RawRecord) -> String {
    String::from_utf8_lossy(&record.value).into_owned()
}

fn config_record(network: Ipv4Net) -> String {
    format!("{{\"Network\":\"{network}\",\"Backend\":{{\"Type\":\"udp\"}}}}\n")
}
