//! The DNS server of the node: names of services from the catalog, all others from upstream servers.
//!
//! | name | record |
//! |---|---|
//! | `web.shop.svc.overlay` | A: the virtual address of `shop/web`, or of a headless service those of its serving endpoints |
//! | `1.node-a.web.shop.svc.overlay` | A: the address of the endpoint `shop/web/node-a/1`, in any state |
//! | `_http._tcp.web.shop.svc.overlay` | SRV: the port `http`, at the service or, headless, at each of its serving endpoints |
//! | `9.0.251.10.in-addr.arpa` | PTR: the service with the virtual address 10.251.0.9, or the endpoints of headless services |
//!
//! Names of services exist with no other record: a question for AAAA gets no record and no error. What ends in `.svc` is short for
//! the same below the domain; shorter names need the search list (`zone.rs` says why). [`resolv_conf`] gives it to this host.
//!
//! In reading order: `zone` and `records` (what there is at a name), `answer` (what is answered to a message; pure), `wire` and
//! `cache` (answers of upstream servers as bytes), `forward` (asking them), `udp` (with `memo`) and `tcp`, `server`.

mod answer;
pub mod cache;
mod counters;
mod forward;
mod memo;
mod records;
pub mod resolv_conf;
mod server;
mod tcp;
mod udp;
pub mod wire;
mod zone;

#[cfg(test)]
mod tests;

pub use answer::{Answer, Question, Reply, answer};
pub use counters::Counters;
pub use records::Records;
pub use server::{DnsServer, Options, Statistics};
pub use zone::{DEFAULT_DOMAIN, Ttl, Zone, ZoneError};

/// Largest datagram that crosses nearly all paths without fragments (DNS Flag Day 2020), in bytes.
pub const DEFAULT_UDP_PAYLOAD: u16 = 1232;
