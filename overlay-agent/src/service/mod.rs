//! Services: names, virtual addresses and load balancing, on the agent of the overlay.
//!
//! In reading order: `name` and `record` (what the store has), `catalog` (what that means), `device` (the virtual addresses),
//! `dns` (the names of the services).

pub mod catalog;
pub mod device;
pub mod dns;
pub mod name;
pub mod record;

pub use catalog::Catalog;
pub use name::{EndpointName, ServiceName};
