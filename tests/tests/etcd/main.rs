//! The etcd store against real etcd servers on loopback: what must hold when everything around it fails.

// What the tests share is no test by itself, and ends one in the same way. Whatever is not the expected event fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm
)]

mod acquire;
mod archive;
mod authority;
mod commands;
mod endpoints;
mod hosts;
mod keeping;
mod losing;
mod moving;
mod owners;
mod proxy;
mod records;
mod reservations;
mod security;
mod service_commands;
mod services;
mod tls;
mod tls_refusals;
mod users;
mod watching;
