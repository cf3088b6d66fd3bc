//! Tests on loopback: virtual addresses are addresses of 127.0.0.0/8, all of which belong to every host.

mod balancing;
mod changes;
mod http;
mod limits;
mod stage;
mod tcp;
mod udp;
