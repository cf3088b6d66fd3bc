//! The record of a run, a file in the run directory: what `status` says of a host whose agent has ended, and the counters from which
//! the next agent goes on.
//!
//! The agent compares it once a second with its state and replaces it when that differs; the file's modification time says when it did
//! so last. A record of another boot of the kernel counts for nothing.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    datapath::{Choice, Tally},
    route::Subnet,
    whole_file,
};

/// Another text after each boot (`man 4 random`).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What an agent was and counted when it was last seen. Fields that a file lacks have their default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RunRecord {
    /// The kernel's boot, which [`RecordFile::keep`] fills in.
    pub(crate) boot: String,
    /// Version of the agent.
    pub(crate) version: String,
    pub(crate) network: Option<Ipv4Net>,
    pub(crate) subnet: Option<Subnet>,
    pub(crate) public_ip: Option<Ipv4Addr>,
    pub(crate) port: Option<u16>,
    /// Name of the store.
    pub(crate) store: String,
    /// When the lease ends without another renewal, RFC 3339; `None` when it has no end.
    pub(crate) lease_ends: Option<String>,
    pub(crate) egress: Option<Choice>,
    pub(crate) ingress: Option<Choice>,
    pub(crate) tally: Tally,
}

impl RunRecord {
    /// The file of the agent with the overlay device `device`.
    pub(crate) fn path(run_dir: &Path, device: &str) -> PathBuf {
        run_dir.join(format!("{device}.json"))
    }

    /// Reads the record of this boot, and when it was last known to be true; `None` when there is none that can be used.
    pub(crate) fn read(path: &Path) -> Option<(Self, SystemTime)> {
        let read = || -> io::Result<(String, SystemTime)> {
            let file = File::open(path)?;
            Ok((io::read_to_string(&file)?, file.metadata()?.modified()?))
        };
        let (text, seen) = match read() {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                warn!("read the record of the last run, {}: {error}", path.display());
                return None;
            }
        };
        match serde_json::from_str::<Self>(&text) {
            Ok(record) => boot_id().is_ok_and(|boot| boot == record.boot).then_some((record, seen)),
            Err(error) => {
                warn!("the record of the last run, {}, cannot be used: {error}", path.display());
                None
            }
        }
    }

    /// Removes a record and what a killed agent left of one; `false` when there is none.
    pub(crate) fn remove(path: &Path) -> Result<bool> {
        let mut removed = false;
        for path in [path.to_owned(), whole_file::temporary(path)] {
            match fs::remove_file(&path) {
                Ok(()) => removed = true,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
            }
        }
        Ok(removed)
    }
}

/// Writes the record of this run.
#[derive(Debug)]
pub(crate) struct RecordFile {
    path: PathBuf,
    boot: String,
    written: Vec<u8>,
}

impl RecordFile {
    /// Writes nothing yet. Fails when the kernel does not name its boot.
    pub(crate) fn new(path: PathBuf) -> Result<Self> {
        Ok(Self { path, boot: boot_id()?, written: Vec::new() })
    }

    /// Makes the file hold `record`, and notes the time. Fails when the file cannot be written.
    pub(crate) fn keep(&mut self, record: RunRecord) -> Result<()> {
        let record = RunRecord { boot: self.boot.clone(), ..record };
        let text = serde_json::to_vec(&record)?;
        let context = || format!("write the record of this run, {}", self.path.display());
        if text == self.written {
            let noted = File::options()
                .write(true)
                .open(&self.path)
                .and_then(|file| file.set_modified(SystemTime::now()));
            match noted {
                // Another program removed it.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                noted => return noted.with_context(context),
            }
        }
        whole_file::replace_until_reboot(&self.path, |file| file.write_all(&text)).with_context(context)?;
        self.written = text;
        Ok(())
    }

    /// Removes the file.
    pub(crate) fn remove(&self) -> Result<()> {
        RunRecord::remove(&self.path).map(drop)
    }
}

fn boot_id() -> Result<String> {
    let text = fs::read_to_string(BOOT_ID).with_context(|| format!("read {BOOT_ID}"))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn record() -> RunRecord {
        RunRecord {
            subnet: Some("10.244.1.0/24".parse().unwrap()),
            store: "none".to_owned(),
            ..RunRecord::default()
        }
    }

    #[test]
    fn a_record_is_read_back_with_the_time_at_which_it_was_last_true() {
        let directory = tempfile::tempdir().unwrap();
        let path = RunRecord::path(&directory.path().join("run"), "ovl0");
        assert_eq!(RunRecord::read(&path), None);
        let mut file = RecordFile::new(path.clone()).unwrap();
        file.keep(record()).unwrap();
        let (read, _) = RunRecord::read(&path).unwrap();
        assert_eq!(RunRecord { boot: String::new(), ..read }, record());
        let old = SystemTime::now() - Duration::from_secs(60);
        File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
        file.keep(record()).unwrap();
        assert!(RunRecord::read(&path).unwrap().1 > old + Duration::from_secs(50), "the time is not noted");
        fs::remove_file(&path).unwrap();
        file.keep(record()).unwrap();
        assert!(RunRecord::read(&path).is_some(), "a removed file is not written again");
        fs::write(whole_file::temporary(&path), "half").unwrap();
        file.remove().unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        assert!(!RunRecord::remove(&path).unwrap());
    }

    #[test]
    fn a_record_of_another_boot_or_with_damage_is_none_and_unknown_fields_are_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = RunRecord::path(directory.path(), "ovl0");
        let other = RunRecord { boot: "of-another-boot".to_owned(), ..record() };
        let own = format!(r#"{{"boot":"{}","news":[1],"tally":{{"later":7}}}}"#, boot_id().unwrap());
        for (text, usable) in [
            (serde_json::to_string(&other).unwrap(), false),
            (own.clone(), true),
            (own.get(..20).unwrap().to_owned(), false),
            (String::new(), false),
            ("[]".to_owned(), false),
            ("\u{0}\u{0}".to_owned(), false),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(RunRecord::read(&path).is_some(), usable, "{text}");
        }
        fs::write(&path, b"\xff\xfe{").unwrap();
        assert_eq!(RunRecord::read(&path), None);
    }
}
