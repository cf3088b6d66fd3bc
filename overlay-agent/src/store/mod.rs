//! Where lease records live.

pub mod dir;
