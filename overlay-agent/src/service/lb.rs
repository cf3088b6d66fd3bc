//! How connections to virtual addresses reach an endpoint.

use clap::ValueEnum;

/// Value of `--lb`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LbRequest {
    /// eBPF for the node's sockets where the kernel has it; the proxy for all others
    #[default]
    Auto,
    /// eBPF only; connections that are forwarded through this node reach no endpoint
    Ebpf,
    /// The proxy only
    Proxy,
    /// None: this node ignores services
    Off,
}
