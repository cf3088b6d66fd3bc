//! `overlay-agent down`: the way back from anything, also from a killed agent.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use aya::programs::TcAttachType;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::AgentArgs;
use crate::{
    control::{self, Question},
    datapath::ebpf::{Hook, detach_filters},
    device,
    netlink::Netlink,
    report::Status,
};

/// How long a running agent gets to shut down.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn down(args: &AgentArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("overlay-agent down needs root");
    }
    let mut removed = Vec::new();
    let socket = control::path(&args.run_dir, &args.device);
    if let Ok(status) = control::ask::<Status>(&socket, Question::Status).await {
        stop(&status).await?;
        removed.push(format!("the agent (process {})", status.pid));
    }
    let netlink = Netlink::connect()?;
    if device::remove(&netlink, &args.device).await? {
        removed.push(format!("the device {}", args.device));
    }
    // tcx and XDP links go with their agent; filters of a clsact qdisc, which older kernels need, do not.
    for link in netlink.links().await? {
        detach_filters(&link.name, TcAttachType::Ingress, Hook::Ingress)?;
    }
    if std::fs::exists(&socket).unwrap_or(false) {
        std::fs::remove_file(&socket)
            .with_context(|| format!("remove the stale socket {}", socket.display()))?;
        removed.push(format!("the socket {}", socket.display()));
    }
    match removed.is_empty() {
        true => println!("nothing of overlay-agent's on {} here", args.device),
        false => println!("removed {}", removed.join(", ")),
    }
    Ok(())
}

async fn stop(status: &Status) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(status.pid).context("the agent's process number")?);
    kill(pid, Signal::SIGTERM).with_context(|| format!("end the agent (process {pid})"))?;
    let gone = async {
        while kill(pid, None).is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone)
        .await
        .with_context(|| format!("the agent (process {pid}) does not end: kill it and call down again"))
}
