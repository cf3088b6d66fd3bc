//! Runs `nft` to apply scripts and to list objects.

use std::{
    io::{self, ErrorKind},
    process::{Output, Stdio},
    time::Duration,
};

use serde_json::Value;
use thiserror::Error;
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

/// Limit for one run of `nft`. It takes milliseconds, and longer with tens of thousands of rules.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A failed run of `nft`.
#[derive(Debug, Error)]
pub enum NftError {
    /// The program is not installed.
    #[error(
        "the program nft is missing: install the package nftables, or set --ip-masq=false and --iptables-forward-rules=false"
    )]
    Missing,
    /// The program cannot be started.
    #[error("run nft to {task}: {source}")]
    Run {
        /// The task.
        task: String,
        /// The system's error.
        source: io::Error,
    },
    /// The program did not end in time and was killed.
    #[error(
        "nft does not answer: it did not {task} within {} s; try `nft list ruleset`, and look for a process that holds the \
         kernel's ruleset",
        TIMEOUT.as_secs()
    )]
    Timeout {
        /// The task.
        task: String,
    },
    /// The program or the kernel reports an error.
    #[error("nft failed to {task}: {message}")]
    Failed {
        /// The task.
        task: String,
        /// The first line of its message.
        message: String,
    },
    /// The output is not JSON.
    #[error("parse the output of nft to {task}: {source}")]
    Unreadable {
        /// The task.
        task: String,
        /// The parser's error.
        source: serde_json::Error,
    },
}

/// Applies a script in one transaction.
pub(super) async fn run(script: &str) -> Result<(), NftError> {
    let task = "change the rules";
    let output = execute(&["-f", "-"], script, task).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(task, &output)),
    }
}

/// Lists an object without counters; `None` when it does not exist.
pub(super) async fn list(object: &[&str]) -> Result<Option<Value>, NftError> {
    let task = format!("list {}", object.join(" "));
    let words = [&["-j", "-s", "list"], object].concat();
    let output = execute(&words, "", &task).await?;
    if !output.status.success() {
        // nft distinguishes this from other failures only by the message.
        return match String::from_utf8_lossy(&output.stderr).contains("No such file or directory") {
            true => Ok(None),
            false => Err(failed(&task, &output)),
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
            // Messages are parsed, so they must not be translated.
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
    let Ok(outcome) = timeout(TIMEOUT, attempt).await else {
        return Err(NftError::Timeout { task: task.to_owned() });
    };
    outcome.map_err(|source| match source.kind() == ErrorKind::NotFound {
        true => NftError::Missing,
        false => NftError::Run { task: task.to_owned(), source },
    })
}

fn failed(task: &str, output: &Output) -> NftError {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| !line.trim().is_empty());
    NftError::Failed {
        task: task.to_owned(),
        message: line.map_or_else(|| output.status.to_string(), |line| line.trim().to_owned()),
    }
}
