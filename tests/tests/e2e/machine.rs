//! Detects the requirements of tests on this machine.

use std::{env, path::Path, process::Command};

use nix::unistd::Uid;

/// The commands that the harness runs.
const TOOLS: [&str; 7] = ["ip", "bridge", "tc", "ethtool", "ping", "iperf3", "sysctl"];

/// A requirement that some machines do not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The kernel's VXLAN device.
    Vxlan,
    /// eBPF in the kernel.
    Ebpf,
    /// The root of the cgroup v2 hierarchy.
    CgroupV2,
    /// `/dev/net/tun`.
    Tun,
    /// nftables with network address translation, and its tool.
    Nftables,
    /// IPsec policies with defaults (Linux 5.15), and a tool that knows them.
    Ipsec,
}

impl Need {
    /// Why a test with these needs cannot run here; `None` when it can.
    pub(crate) fn missing(needs: &[Self]) -> Option<String> {
        if !Uid::effective().is_root() {
            return Some("needs root, for network namespaces".to_owned());
        }
        if let Some(tool) = TOOLS.iter().find(|tool| !is_installed(tool)) {
            return Some(format!("needs the command {tool}: run `cargo xtask setup`"));
        }
        let need = needs.iter().find(|need| !need.is_met())?;
        Some(need.reason().to_owned())
    }

    fn is_met(self) -> bool {
        match self {
            // `ip link help TYPE` does not query the kernel: create such a link in a temporary namespace.
            Self::Vxlan => Command::new("unshare")
                .args(["--net", "ip", "link", "add", "type", "vxlan", "id", "1", "dstport", "8472"])
                .output()
                .is_ok_and(|output| output.status.success()),
            // Present exactly when the kernel has the bpf system call (Documentation/admin-guide/sysctl/kernel.rst).
            Self::Ebpf => Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists(),
            Self::CgroupV2 => overlay_agent::service::cgroup::root().is_ok(),
            Self::Tun => Path::new("/dev/net/tun").exists(),
            Self::Nftables => Command::new("unshare")
                .args([
                    "--net",
                    "nft",
                    "add table ip t; add chain ip t c { type nat hook postrouting priority 0; }",
                ])
                .output()
                .is_ok_and(|output| output.status.success()),
            Self::Ipsec => Command::new("unshare")
                .args(["--net", "ip", "xfrm", "policy", "setdefault", "out", "accept"])
                .output()
                .is_ok_and(|output| output.status.success()),
        }
    }

    const fn reason(self) -> &'static str {
        match self {
            Self::Vxlan => "needs a kernel with vxlan",
            Self::Ebpf => "needs a kernel with eBPF",
            Self::CgroupV2 => "needs the root of cgroup v2: mount -t cgroup2 none /sys/fs/cgroup/unified",
            Self::Tun => "needs /dev/net/tun",
            Self::Nftables => "needs a kernel with nftables and the command nft: run `cargo xtask setup`",
            Self::Ipsec => "needs a kernel with IPsec policies (XFRM), since 5.15, and iproute2 since 5.16",
        }
    }
}

fn is_installed(tool: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}
