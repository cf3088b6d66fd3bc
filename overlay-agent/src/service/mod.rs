//! Services: names, virtual addresses and load balancing, on the agent of the overlay.
//!
//! In reading order: `name` and `record` (what the store has), `catalog` (what that means), `device` (the virtual addresses),
//! `slots` and `front` (what the load balancer does), `balancer` (the same in user space), `cgroup` (where the programs
//! run), `proxy` (what serves connections that no program sees).

pub mod balancer;
pub mod catalog;
pub mod cgroup;
pub mod device;
pub mod front;
pub mod name;
pub mod proxy;
pub mod record;
mod slots;

pub use catalog::Catalog;
pub use name::{EndpointName, ServiceName};
