//! The end-to-end test harness: hosts and containers as network namespaces, agents, traffic that is verified, rates.
//!
//! In reading order: [`sandbox`] owns everything a run creates, [`netns`] is one namespace, [`topology`] is the reference
//! topology (two hosts, a container behind each), [`comparison`] connects it without the overlay, [`agent`] and [`pair`]
//! with it. [`traffic`] sends and verifies, [`verify`] is the list of checks that the demo and the tests share. [`balance`] finds
//! every datagram of a flow in a counter, [`capture`] verifies the checksums at a container. [`etcd`]
//! is a server for the store, and [`switch`] connects as many hosts as a test of the store wants. [`demo`] and [`mod@bench`] are
//! programs of their own.

pub mod agent;
pub mod balance;
pub mod bench;
pub mod capture;
pub mod cgroup;
pub mod comparison;
pub mod cpu;
pub mod demo;
pub mod etcd;
pub mod grpc_proxy;
pub mod netns;
pub mod pair;
mod progress;
pub mod proxy;
pub mod report;
pub mod router;
pub mod sandbox;
pub mod switch;
pub mod table;
pub mod topology;
pub mod traffic;
pub mod verify;
