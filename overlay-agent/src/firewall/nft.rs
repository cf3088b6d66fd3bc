//! Runs `nft`: scripts in, listings out. Nothing here knows the overlay.

use std::{
    io::{self, ErrorKind},
    process::{Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use thiserror::Error;
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

/// How long `nft` may take. It needs milliseconds, more where rules are counted in tens of thousands.
const LIMIT: Duration = Duration::from_secs(10);

/// Why `nft` did not do what it was asked for.
#[derive(Debug, Error)]
pub enum NftError {
    /// The program is not there.
    #[error(
        "the program nft is missing: install the package nftables, or set --ip-masq=false and --iptables-forward-rules=false"
    )]
    Missing,
    /// The program cannot be run.
    #[error("run nft to {task}: {source}")]
    Run {
        /// What it was to do.
        task: String,
        /// What the system says.
        source: io::Error,
    },
    /// The program does not end. It was killed.
    #[error(
        "nft does not answer: it did not {task} within {} s; try `nft list ruleset`, and look for a process that holds the \
         kernel's ruleset",
        LIMIT.as_secs()
    )]
    Silent {
        /// What it was to do.
        task: String,
    },
    /// The program, or the kernel, refuses.
    #[error("nft refused to {task}: {says}")]
    Refused {
        /// What it was to do.
        task: String,
        /// The first line of its message.
        says: String,
    },
    /// The program prints something else than it should.
    #[error("read what nft printed to {task}: {source}")]
    Unreadable {
        /// What it was to do.
        task: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Applies a script. It is one transaction: all of it or nothing.
pub(super) async fn run(script: &str) -> Result<(), NftError> {
    let task = "change the rules";
    let output = execute(&["-f", "-"], script, task).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(refused(task, &output)),
    }
}

/// Lists an object, without counters; `None` when there is no such thing.
pub(super) async fn list(object: &[&str]) -> Result<Option<Value>, NftError> {
    let task = format!("list {}", object.join(" "));
    let words = [&["-j", "-s", "list"], object].concat();
    let output = execute(&words, "", &task).await?;
    if !output.status.success() {
        // The one way in which nft tells this from other failures.
        return match String::from_utf8_lossy(&output.stderr).contains("No such file or directory") {
            true => Ok(None),
            false => Err(refused(&task, &output)),
        };
    }
    let mut listing: Value =
        serde_json::from_slice(&output.stdout).map_err(|source| NftError::Unreadable { task, source })?;
    Ok(listing.get_mut("nftables").map(Value::take))
}

async fn execute(words: &[&str], input: &str, task: &str) -> Result<Output, NftError> {
    let attempt = async {
        let mut child = Command::new("nft")
            .args(words)
            // Its messages are read.
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    // Dropped, an attempt kills its child.
    let Ok(outcome) = timeout(LIMIT, attempt).await else {
        return Err(NftError::Silent { task: task.to_owned() });
    };
    outcome.map_err(|source| match source.kind() == ErrorKind::NotFound {
        true => NftError::Missing,
        false => NftError::Run { task: task.to_owned(), source },
    })
}

fn refused(task: &str, output: &Output) -> NftError {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| !line.trim().is_empty());
    NftError::Refused {
        task: task.to_owned(),
        says: line.map_or_else(|| output.status.to_string(), |line| line.trim().to_owned()),
    }
}
