//! ICMP of the overlay as a router: errors about inner packets that it sends, and errors about outer packets that it receives.
//!
//! `error_message` builds, `limiter` limits and `socket` sends; `report` reads what routers and this host's kernel say about outer
//! packets.

mod error_message;
mod limiter;
mod report;
mod socket;

pub use error_message::error_message;
pub use report::{Problem, Report};
pub(crate) use socket::{Answers, listen};
