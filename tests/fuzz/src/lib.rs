//! Checks of all code that reads foreign bytes: what must be true of its answer, whatever the bytes are.
//!
//! A [`Target`] takes any bytes as its input and panics when an answer is wrong. `cargo xtask fuzz` looks for such inputs, guided
//! by coverage; each that it has found is in `regressions`, and the test of [`regressions`] repeats them in every test run.
//!
//! What is expected is derived from the bytes a second time, with nothing of the packet core: `raw` reads headers and sums,
//! `scenario` has the configuration and the routes. The checks state conditions that every order of the core's rules has to meet.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a check fails by panicking, also at a reason that it does not know"
)]

mod config;
mod dns;
mod egress;
mod fragments;
mod icmp;
mod ingress;
mod lease;
mod partial;
mod raw;
pub mod regressions;
mod rejection;
mod scenario;
pub mod seeds;
mod shell;

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The packet core's decision about packets that leave.
    Egress,
    /// The packet core's decision about frames that arrive.
    Ingress,
    /// The tun rung's shell around the core, with fragmentation and unfinished checksums.
    Shell,
    /// Fragmentation of any packet to any size.
    Fragments,
    /// ICMP errors, as they are built and read.
    Icmp,
    /// Lease records.
    Lease,
    /// The network config.
    Config,
    /// The DNS server's answers to messages.
    DnsAnswer,
    /// Responses of upstream DNS servers.
    DnsResponse,
    /// The cache of such responses.
    DnsCache,
}

impl Target {
    /// Every target.
    pub const ALL: &[Self] = &[
        Self::Egress,
        Self::Ingress,
        Self::Shell,
        Self::Fragments,
        Self::Icmp,
        Self::Lease,
        Self::Config,
        Self::DnsAnswer,
        Self::DnsResponse,
        Self::DnsCache,
    ];

    /// The name in commands and directories.
    pub fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
            Self::Shell => "shell",
            Self::Fragments => "fragments",
            Self::Icmp => "icmp",
            Self::Lease => "lease",
            Self::Config => "config",
            Self::DnsAnswer => "dns-answer",
            Self::DnsResponse => "dns-response",
            Self::DnsCache => "dns-cache",
        }
    }

    /// Checks the answer to one input.
    ///
    /// # Panics
    ///
    /// When the answer is wrong.
    pub fn check(self, input: &[u8]) {
        match self {
            Self::Egress => egress::check(input),
            Self::Ingress => ingress::check(input),
            Self::Shell => shell::check(input),
            Self::Fragments => fragments::check(input),
            Self::Icmp => icmp::check(input),
            Self::Lease => lease::check(input),
            Self::Config => config::check(input),
            Self::DnsAnswer => dns::check_answer(input),
            Self::DnsResponse => dns::check_response(input),
            Self::DnsCache => dns::check_cache(input),
        }
    }
}
