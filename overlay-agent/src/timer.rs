//! A timer that need not be set.

use tokio::time::{Instant, sleep_until};

/// Returns at this time; never without one.
pub(crate) async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
