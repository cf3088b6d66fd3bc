//! Traffic between two namespaces: verified transfers, and rates.

pub mod checksum;
pub mod numbered;
pub mod payload;
pub mod ping;
pub mod rate;
pub mod steady;
pub mod stream;
pub mod tcp;
pub mod udp;
