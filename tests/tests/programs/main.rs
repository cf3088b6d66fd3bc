//! The packet core, the tun shell and the loaded kernel programs on the golden packet vectors and on generated packets:
//! all must come to the same verdict, and to the same bytes.
//!
//! The programs run through `BPF_PROG_TEST_RUN`, so root is needed and nothing is sent.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod bypass;
mod capacity;
mod generated;
mod generator;
mod golden;
mod log;
mod lookup;
mod rungs;
mod shells;
mod vectors;
mod work;
