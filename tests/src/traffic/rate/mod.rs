//! Rates between two containers: TCP streams, packets forwarded, datagrams between sockets, request latency, CPU time.
//!
//! The demo and `bench datapath` both measure with these functions.

mod cpu;
mod datagrams;
mod forwarding;
mod requests;
mod stream;

pub use datagrams::{Offer, SMALL, datagrams, highest_rate, small_packets};
pub use forwarding::{Forwarded, forwarding, sender_alone};
pub use requests::{Latency, request_latency};
pub use stream::{Stream, tcp_streams, tcp_throughput};
