//! The eBPF rungs: sets of programs, how they are attached, and the overlay's own set.

mod attach;
mod backend_ids;
mod btf;
mod cgroup_link;
mod connection_counts;
mod counter_maps;
mod generation;
pub mod overlay_set;
mod pinned_state;
mod pins;
mod program_set;
mod questions;
mod route_maps;
pub mod self_test;
mod service_adoption;
mod service_maps;
pub mod service_set;
mod sweep;
mod tcx_link;
mod udp_sockets;

pub use attach::TcAttach;
pub(crate) use attach::{Attachment, Target, TcMode, detach_filter, detach_left};
pub use overlay_set::{LoadOptions, OverlaySet};
pub(crate) use pinned_state::{PinnedState, left_counters};
pub use pins::Pins;
pub(crate) use pins::unpin;
pub use program_set::{Hook, HookKind, Metadata, Outcome, Pinned, Place, ProgramSet};
pub(crate) use route_maps::RouteWrites;
pub use service_maps::{KernelCounts, KernelEndpoint, KernelService};
pub use service_set::ServiceSet;
pub(crate) use sweep::{InUse, sweep};
pub(crate) use tcx_link::TcxLinks;
pub use udp_sockets::UdpSockets;

/// The compiled programs, when this binary was built with them.
#[cfg(ebpf_embedded)]
pub const OBJECT: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay-ebpf.o")));
/// The compiled programs of virtual service addresses, when this binary was built with them.
#[cfg(ebpf_embedded)]
pub const SERVICE_OBJECT: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/service-ebpf.o")));
/// The compiled programs, when this binary was built with them.
#[cfg(not(ebpf_embedded))]
pub const OBJECT: Option<&[u8]> = None;
/// The compiled programs of virtual service addresses, when this binary was built with them.
#[cfg(not(ebpf_embedded))]
pub const SERVICE_OBJECT: Option<&[u8]> = None;
