//! `overlay-agent down`: removes everything that an agent, even a killed one, left on the host.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail};
use aya::programs::TcAttachType;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use super::{AgentArgs, QueryArgs, query::print};
use crate::{
    capabilities, control,
    datapath::ebpf::{self, Pins, detach_filter, detach_left, overlay_set::LOCAL},
    device::{self, DeviceAlias},
    firewall,
    netlink::Netlink,
    run_record::RunRecord,
    service,
};

/// How long a running agent may take to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) async fn down(QueryArgs { agent: args, output }: &QueryArgs) -> Result<()> {
    capabilities::check(capabilities::NETWORK).context("overlay-agent down")?;
    let mut removed = Vec::new();
    let socket = args.socket();
    let netlink = Netlink::connect()?;
    // The alias of a killed agent's device must be read before the device is removed.
    let alias = netlink.link(&args.device).await?.and_then(|link| DeviceAlias::parse(&link.alias?));
    let agent = control::listener(&socket)?;
    check_holder(&netlink, args, agent).await?;
    if let Some(pid) = agent {
        tokio::task::spawn_blocking(move || stop(pid)).await.context("wait for the agent")??;
        removed.push(format!("the agent (process {pid})"));
        check_holder(&netlink, args, None).await?;
    }
    if let Some(pins) = Pins::find(&args.device)?
        && pins.remove()?
    {
        removed.push(format!("the eBPF programs of {}", args.device));
    }
    for directory in tokio::task::spawn_blocking(sweep).await.context("look for old pins")? {
        removed.push(format!("the pins of a network namespace that is gone ({})", directory.display()));
    }
    if device::remove(&netlink, &args.device).await? {
        removed.push(format!("the device {}", args.device));
    }
    let context = || format!("remove the firewall's rules of {}", args.device);
    if firewall::remove(&args.device).await.with_context(context)? {
        removed.push(format!("the firewall's rules of {}", args.device));
    }
    // Blackhole routes in the networks of other agents on this host stay.
    let others: Vec<_> =
        netlink.links().await?.into_iter().filter_map(|link| DeviceAlias::parse(&link.alias?)).collect();
    for subnet in netlink.blackholes().await? {
        let foreign = others.iter().any(|other| other.network.contains(&subnet));
        if !foreign && netlink.remove_blackhole(subnet).await? {
            removed.push(format!("the blackhole route for {subnet}"));
        }
    }
    // The kernel removes tcx and XDP links with their agent, but not filters of a clsact qdisc, which older kernels need.
    if let Some(alias) = alias {
        for underlay in &alias.underlays {
            detach_filter(underlay, TcAttachType::Ingress, alias.port);
        }
        detach_left(&netlink, alias.port, &LOCAL).await?;
    }
    for device in service::device::left(&netlink, &args.device).await? {
        if device.remove(&netlink).await? {
            removed.push(format!("the device {}", device.name()));
        }
    }
    if service::node::restore_resolv_conf() {
        removed.push("the agent's resolv.conf".to_owned());
    }
    if control::remove(&socket)? {
        removed.push(format!("the socket {}", socket.display()));
    }
    let record = RunRecord::path(&args.run_dir, &args.device);
    if RunRecord::remove(&record)? {
        removed.push(format!("the record of the last run, {}", record.display()));
    }
    print(*output, &json!({ "removed": removed }), |_| match removed.is_empty() {
        true => format!("nothing to remove for {}", args.device),
        false => format!("removed {}", removed.join(", ")),
    })
}

/// Fails when another process than `agent`, which answers at the socket, holds the overlay device: with another run directory, a
/// running agent would lose its device.
async fn check_holder(netlink: &Netlink, args: &AgentArgs, agent: Option<i32>) -> Result<()> {
    let device = &args.device;
    if !netlink.link(device).await?.is_some_and(|link| device::is_ours(&link)) {
        return Ok(());
    }
    let holders = device::holders(device);
    let holder = match (holders.first(), agent) {
        (Some(_), Some(agent)) if holders.contains(&agent) => return Ok(()),
        (Some(pid), _) => format!("process {pid}"),
        (None, None) if device::is_held(device) => "a process".to_owned(),
        // Without the right to see its descriptors, the agent itself may be the one.
        (None, _) => return Ok(()),
    };
    bail!(
        "{holder} holds the device {device}, and is not an agent that answers at {}: name its --run-dir if it is an agent, else \
         end it first",
        args.socket().display()
    )
}

/// Removes pins of network namespaces that are gone. What cannot be removed concerns no agent of this host.
fn sweep() -> Vec<PathBuf> {
    ebpf::sweep().unwrap_or_default()
}

/// Terminates a process through a pidfd, which cannot refer to a reused process id, and waits for its end.
fn stop(pid: i32) -> Result<()> {
    let context = || format!("stop the agent (process {pid})");
    let process =
        pidfd_open(Pid::from_raw(pid).with_context(context)?, PidfdFlags::empty()).with_context(context)?;
    pidfd_send_signal(&process, Signal::TERM).with_context(context)?;
    let mut ended = [PollFd::new(std::os::fd::AsFd::as_fd(&process), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(SHUTDOWN_TIMEOUT).unwrap_or(PollTimeout::MAX);
    match poll(&mut ended, timeout).with_context(context)? {
        0 => bail!("the agent (process {pid}) does not stop: kill it (kill -9 {pid}) and run down again"),
        _ => Ok(()),
    }
}
