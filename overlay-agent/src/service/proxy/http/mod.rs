//! HTTP ports: requests are balanced instead of connections.
//!
//! In reading order: `target` (where routes lead), `client` (a client's connection), `exchange` (a request and its response), `head` (what of
//! their headers is passed on, pure), `outgoing` (a request that may be sent more than once), `pool` (connections to endpoints), `body` and `io`
//! (what moves, counted), `tunnel` (after an upgrade), `counts`.

mod body;
mod client;
mod counts;
mod exchange;
mod head;
mod io;
mod outgoing;
mod pool;
mod reply;
mod target;
mod tunnel;

use std::time::Duration;

pub use self::counts::HttpCounts;
pub(super) use self::{
    client::serve,
    counts::HttpTally,
    pool::Pool,
    target::{HttpPort, Targets, port_of, routes},
};

/// Limits and times of HTTP ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a client may take to send the header of a request, and how long a connection may wait for the next one.
    pub header_timeout: Duration,
    /// Most bytes of a request line with its header, and of a response's.
    pub header_bytes: usize,
    /// How long an endpoint may take to begin its response, after the last byte of the request that moved.
    pub response_timeout: Duration,
    /// A connection of a client on which nothing moves for this long, in the middle of a body or behind a request, is reset.
    pub idle: Duration,
    /// Most connections to an endpoint that wait for a request.
    pub pool_size: usize,
    /// How long they wait.
    pub pool_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(30),
            header_bytes: 64 << 10,
            response_timeout: Duration::from_secs(60),
            idle: Duration::from_secs(300),
            pool_size: 64,
            pool_idle: Duration::from_secs(30),
        }
    }
}
