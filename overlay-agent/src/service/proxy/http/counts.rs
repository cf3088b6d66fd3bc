//! What is counted of requests.

use std::sync::atomic::{AtomicU64, Ordering};

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

/// Requests to the HTTP ports of a service; a routed request counts for the service that its route names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpCounts {
    /// Requests with a header that could be read.
    pub requests: u64,
    /// Requests that no endpoint answered: the proxy did, with 502, 503 or 504.
    pub failures: u64,
    /// How often a request was sent again, to the same endpoint over a new connection or to another one.
    pub retries: u64,
    /// Responses with these classes of status codes: 1xx (only 101, which begins a tunnel).
    pub status_1xx: u64,
    /// 2xx.
    pub status_2xx: u64,
    /// 3xx.
    pub status_3xx: u64,
    /// 4xx.
    pub status_4xx: u64,
    /// 5xx, those of the proxy and those of endpoints.
    pub status_5xx: u64,
}

/// Counts while the proxy runs.
#[derive(Debug, Default)]
pub(in super::super) struct HttpTally {
    requests: AtomicU64,
    failures: AtomicU64,
    retries: AtomicU64,
    status_1xx: AtomicU64,
    status_2xx: AtomicU64,
    status_3xx: AtomicU64,
    status_4xx: AtomicU64,
    status_5xx: AtomicU64,
}

impl HttpTally {
    pub(in super::super) fn snapshot(&self) -> HttpCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HttpCounts {
            requests: read(&self.requests),
            failures: read(&self.failures),
            retries: read(&self.retries),
            status_1xx: read(&self.status_1xx),
            status_2xx: read(&self.status_2xx),
            status_3xx: read(&self.status_3xx),
            status_4xx: read(&self.status_4xx),
            status_5xx: read(&self.status_5xx),
        }
    }

    pub(super) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_status(&self, status: StatusCode) {
        let counter = match status.as_u16() {
            ..200 => &self.status_1xx,
            200..300 => &self.status_2xx,
            300..400 => &self.status_3xx,
            400..500 => &self.status_4xx,
            500.. => &self.status_5xx,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
