//! Services: names, virtual addresses and load balancing, on the agent of the overlay.
//!
//! In reading order: `config` (the network's), `name` and `record` (what the store has), `catalog` (what that means), `index` and `follow` (the catalog as the
//! records change), `input` (services as operators write them), `files` (those of this node's
//! files), `vip` (which service gets which virtual address), `device` (the virtual addresses on this host).

pub mod catalog;
pub mod config;
pub mod device;
pub mod files;
pub mod follow;
mod index;
pub mod input;
pub mod name;
pub mod record;
#[cfg(test)]
mod tests;
pub mod vip;

pub use catalog::Catalog;
pub use follow::{FollowState, Following, follow};
pub use name::{EndpointName, ServiceName};
