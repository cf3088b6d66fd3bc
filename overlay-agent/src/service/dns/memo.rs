//! Responses that were made a moment ago: most queries are repetitions, byte for byte but for their identifiers.

use std::{collections::HashMap, sync::Arc};

use super::{answer::Reply, records::Records};

/// Most entries. One more removes all: those in use are back at once.
const MAX_ENTRIES: usize = 4096;
/// Longest query and longest response to remember, in bytes.
const LONGEST: usize = 512;

/// The responses to queries about existing names, as long as the records are the same.
#[derive(Debug)]
pub(super) struct Memo {
    records: Arc<Records>,
    /// By what follows the identifier, what follows the identifier.
    responses: HashMap<Box<[u8]>, Box<[u8]>>,
}

impl Memo {
    /// An empty one.
    pub(super) fn new(records: Arc<Records>) -> Self {
        Self { records, responses: HashMap::new() }
    }

    /// Forgets all, unless `records` are those of the responses.
    pub(super) fn renew(&mut self, records: &Arc<Records>) {
        if !Arc::ptr_eq(&self.records, records) {
            *self = Self::new(Arc::clone(records));
        }
    }

    /// The records of the responses.
    pub(super) fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// Writes the response to a query into `buffer`, and returns whether it is known.
    pub(super) fn recall(&self, query: &[u8], buffer: &mut Vec<u8>) -> bool {
        let Some((id, rest)) = query.split_at_checked(2) else { return false };
        let Some(response) = self.responses.get(rest) else { return false };
        buffer.clear();
        buffer.extend_from_slice(id);
        buffer.extend_from_slice(response);
        true
    }

    /// Encodes a reply and remembers it, if the same query has the same response again. Returns whether it is truncated.
    pub(super) fn encode(
        &mut self,
        query: &[u8],
        reply: Reply,
        udp_payload: u16,
        buffer: &mut Vec<u8>,
    ) -> bool {
        let is_stable = reply.is_stable();
        let is_truncated = reply.encode(Some(udp_payload), buffer);
        let is_short = query.len() <= LONGEST && buffer.len() <= LONGEST;
        if is_stable
            && is_short
            && !is_truncated
            && let (Some(query), Some(response)) = (query.get(2..), buffer.get(2..))
        {
            if self.responses.len() >= MAX_ENTRIES {
                self.responses.clear();
            }
            self.responses.insert(query.into(), response.into());
        }
        is_truncated
    }
}
