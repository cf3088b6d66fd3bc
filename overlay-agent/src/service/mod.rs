//! Services: names, virtual addresses and load balancing, on the agent of the overlay.
//!
//! In reading order: `config` (the network's), `name`, `record` and `route` (what the store has), `catalog` (what that means), `index`,
//! `follow` and `changes` (the catalog as the records change), `input` (services as operators write them), `files` (those of this node's files), `vip` (which service
//! gets which virtual address), `device` (the virtual addresses on this host), `slots` and `front` (what a load balancer does), `cgroup` (where its
//! programs run), `proxy` (what serves connections that no program sees), `sockets` (UDP sockets whose endpoint went away), `dns` (the names of the services), `node` (the task that
//! keeps all of it on a node). `health` is which endpoints answer, `outcome` is what became of connections, `latency` how long they took, and `traffic`
//! all that was counted.

pub mod catalog;
pub mod cgroup;
pub mod changes;
pub mod config;
pub mod device;
pub mod dns;
pub mod files;
pub mod follow;
pub mod front;
pub mod health;
mod index;
pub mod input;
pub mod latency;
mod lb;
pub mod name;
pub mod node;
pub mod outcome;
pub mod proxy;
pub mod record;
pub mod route;
mod slots;
pub mod sockets;
#[cfg(test)]
mod tests;
pub mod traffic;
pub mod vip;

pub use catalog::Catalog;
pub use follow::{FollowState, Following, follow};
pub use lb::LbRequest;
pub use name::{EndpointName, ServiceName};
