//! What an operator does with the records of a directory by hand.

use std::{io::ErrorKind, path::PathBuf};

use anyhow::{Context as _, Result, bail};

use super::{DirStore, read_regular};
use crate::{config::NetworkConfig, route_table::Record};

impl DirStore {
    /// Where the network's configuration stands.
    pub fn config_path(&self) -> PathBuf {
        self.root.join("config")
    }

    /// The network's configuration as it stands there; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn config_text(&self) -> Result<Option<String>> {
        let path = self.config_path();
        match read_regular(&path) {
            Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read the network config {}", path.display())),
        }
    }

    /// Writes the network's configuration, which must be one that can be used. What stood there before is returned.
    ///
    /// # Errors
    ///
    /// When `text` cannot be used, or the directory cannot be made or written.
    pub fn set_config(&self, text: &str) -> Result<Option<String>> {
        NetworkConfig::parse(text)?;
        std::fs::create_dir_all(&self.root)
            .with_context(|| format!("create the store {}", self.root.display()))?;
        let _lock = self.lock()?;
        let before = self.config_text()?;
        self.replace("config", text)?;
        Ok(before)
    }

    /// All records; none where no host has been yet.
    ///
    /// # Errors
    ///
    /// When there is no store, or it cannot be read.
    pub fn records(&self) -> Result<Vec<Record>> {
        if !self.root.is_dir() {
            bail!("there is no store at {}: check --store", self.root.display());
        }
        if self.root.join("subnets").exists() { self.list() } else { Ok(Vec::new()) }
    }

    /// Removes a record of any host, if it is still what was listed. `false` when it changed meanwhile.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove(&self, record: &Record) -> Result<bool> {
        let _lock = self.lock()?;
        let path = self.root.join("subnets").join(&record.key);
        let value = match read_regular(&path) {
            Ok(value) => value,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            // What cannot be read is listed with an empty value.
            Err(_) => Vec::new(),
        };
        if value != record.value {
            return Ok(false);
        }
        std::fs::remove_file(&path).with_context(|| format!("remove the lease {}", path.display()))?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, DirStore) {
        let directory = tempfile::tempdir().unwrap();
        let store = DirStore::new(directory.path().join("net"));
        (directory, store)
    }

    #[test]
    fn a_config_is_written_whole_and_what_stood_there_is_returned() {
        let (_directory, store) = store();
        assert_eq!(store.config_text().unwrap(), None);
        let (first, second) = (r#"{"Network":"10.1.0.0/16"}"#, r#"{"Network":"10.2.0.0/16"}"#);
        assert_eq!(store.set_config(first).unwrap(), None);
        assert!(store.set_config("{").unwrap_err().to_string().contains("JSON"));
        assert_eq!(store.set_config(second).unwrap().as_deref(), Some(first));
        assert_eq!(store.config_text().unwrap().as_deref(), Some(second));
        assert_eq!(store.config(None).unwrap().network, "10.2.0.0/16".parse().unwrap());
    }

    #[test]
    fn a_record_is_removed_only_as_it_was_listed() {
        let (_directory, store) = store();
        assert!(store.records().unwrap_err().to_string().contains("no store"));
        store.set_config(r#"{"Network":"10.1.0.0/16"}"#).unwrap();
        assert_eq!(store.records().unwrap(), []);
        let subnets = store.root().join("subnets");
        std::fs::create_dir(&subnets).unwrap();
        std::fs::write(subnets.join("10.1.2.0-24"), "old").unwrap();
        nix::unistd::mkfifo(&subnets.join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let listed = store.records().unwrap();
        assert_eq!(listed.len(), 2);
        std::fs::write(subnets.join("10.1.2.0-24"), "new").unwrap();
        assert!(!store.remove(&listed[0]).unwrap());
        assert!(store.remove(&listed[1]).unwrap() && !subnets.join("pipe").exists());
        assert!(store.remove(&store.records().unwrap()[0]).unwrap());
        assert_eq!(store.records().unwrap(), []);
    }
}
