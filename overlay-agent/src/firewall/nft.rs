//! Runs `nft` to apply scripts and to list objects.

use std::{
    io::ErrorKind,
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
    #[error("the program nft is missing: install the package nftables")]
    Missing,
    /// What the run was to do, and why it did not.
    #[error("{0}")]
    Failed(String),
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
    list_with(&["-j", "-s"], object).await
}

/// As [`list`], but leaves out the elements of sets.
pub(super) async fn list_without_elements(object: &[&str]) -> Result<Option<Value>, NftError> {
    list_with(&["-j", "-s", "-t"], object).await
}

async fn list_with(flags: &[&str], object: &[&str]) -> Result<Option<Value>, NftError> {
    let task = format!("list {}", object.join(" "));
    let output = execute(&[flags, &["list"], object].concat(), "", &task).await?;
    if !output.status.success() {
        // nft distinguishes this from other failures only by the message.
        return match String::from_utf8_lossy(&output.stderr).contains("No such file or directory") {
            true => Ok(None),
            false => Err(failed(&task, &output)),
        };
    }
    let mut listing: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| NftError::Failed(format!("parse the output of nft to {task}: {error}")))?;
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
    match timeout(TIMEOUT, attempt).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => Err(NftError::Missing),
        Ok(Err(error)) => Err(NftError::Failed(format!("run nft to {task}: {error}"))),
        Err(_) => Err(NftError::Failed(format!(
            "nft does not answer: it did not {task} within {} s; try `nft list ruleset`, and look for a process that \
             holds the kernel's ruleset",
            TIMEOUT.as_secs()
        ))),
    }
}

fn failed(task: &str, output: &Output) -> NftError {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty());
    let why = line.map_or_else(|| output.status.to_string(), str::to_owned);
    NftError::Failed(format!("nft failed to {task}: {why}"))
}
