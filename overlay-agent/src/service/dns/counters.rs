//! Counters of the DNS server.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// What the DNS server has done since its start.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)+ }

        /// The counters themselves.
        #[derive(Debug, Default)]
        pub(super) struct CounterCells { $(pub(super) $name: Counter,)+ }

        impl CounterCells {
            /// Their values now.
            pub(super) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.0.load(Relaxed),)+ }
            }
        }
    };
}

counters! {
    /// Messages received, over UDP and TCP.
    queries,
    /// Messages that were no queries: responses, and datagrams shorter than a header.
    ignored,
    /// Answers with NOERROR, also those without a record.
    no_error,
    /// Answers with NXDOMAIN.
    no_name,
    /// Answers with FORMERR: malformed queries.
    malformed,
    /// Answers with SERVFAIL: no upstream server answered.
    failed,
    /// Answers with NOTIMP: other operations than queries.
    not_implemented,
    /// Answers with REFUSED.
    refused,
    /// Answers with other codes, such as BADVERS.
    other,
    /// Queries that were sent to upstream servers, without repetitions.
    forwarded,
    /// Answers out of the cache.
    cache_hits,
    /// Times that an upstream server did not answer, or with an error.
    upstream_failures,
    /// Messages from upstream servers that answer no question of this server: a wrong identifier or another question.
    upstream_mismatches,
    /// Queries that were not forwarded because as many as permitted wait already.
    overloaded,
    /// Answers over UDP that were cut, so that the client asks by TCP.
    truncated,
    /// Answers over UDP that the kernel did not take.
    unsent,
    /// TCP connections that were closed at once because as many as permitted are open.
    connections_refused,
}

/// One counter.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Adds 1.
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}

impl CounterCells {
    /// Counts an answer by its response code, the low four bits.
    pub(super) fn answered(&self, response: &[u8]) {
        let Some(code) = response.get(3).map(|flags| flags & 0xf) else { return };
        // BADVERS is 16: its low bits are 0, and its high bit is in the OPT record, which is the only record of such an answer.
        let only_opt = response.get(6..12).is_some_and(|counts| counts == [0, 0, 0, 0, 0, 1]);
        let high = response.len().checked_sub(6).and_then(|at| response.get(at));
        let is_extended = code == 0 && only_opt && high.is_some_and(|high| *high > 0);
        match code {
            _ if is_extended => self.other.add(),
            0 => self.no_error.add(),
            1 => self.malformed.add(),
            2 => self.failed.add(),
            3 => self.no_name.add(),
            4 => self.not_implemented.add(),
            5 => self.refused.add(),
            _ => self.other.add(),
        }
    }
}
