//! The agent: keeps a host's place in an overlay network and its datapath true.
//!
//! `store` says who holds which subnet, `route_table` turns that into routes, `datapath` moves packets by them, `agent` is
//! the loop that ties them together, `cli` is what people type. See ARCHITECTURE.md for the way in.

pub mod agent;
mod capabilities;
pub mod cli;
pub mod config;
mod conntrack;
pub mod containers;
pub mod control;
pub mod datapath;
pub mod device;
mod fd_store;
pub mod firewall;
mod handover;
pub mod health;
pub mod icmp;
pub mod lease;
mod left;
mod neighbour;
pub mod netlink;
mod netlink_frame;
mod path;
mod printable;
mod record;
pub mod report;
pub mod route;
pub mod route_table;
mod run_record;
pub mod service;
pub mod store;
pub mod subnet_env;
pub mod systemd;
mod timer;
pub mod underlay;
mod whole_file;
pub mod xfrm;
