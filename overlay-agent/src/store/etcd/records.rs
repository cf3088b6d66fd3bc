//! Lease records as etcd has them: read in pages, all of one revision.

use etcd_client::{Client, Error, GetOptions, GetResponse, KeyValue};
use ipnet::Ipv4Net;

use super::{
    error::{self, EtcdError},
    keys::Keys,
    session::Session,
};
use crate::{
    lease::{self, LeaseError, LeaseValue},
    route_table::Record,
};

/// A value is cut after this much, as in the directory store: no lease is that long, and what is cut is no JSON any more, so
/// that it is reported as such.
const LONGEST_VALUE: usize = 64 * 1024;
/// Values up to this length are kept as they are, of longer ones only what they say: thousands of them must not fill the
/// agent's memory.
const USUAL_VALUE: usize = 512;
/// The longest answer that is accepted. It holds any single record: etcd's own limit for one is 1.5 MiB unless raised.
pub(super) const LONGEST_ANSWER: usize = 16 * 1024 * 1024;
/// Records per request. 10,000 usual ones are 1.3 MB.
const PAGE: i64 = 4000;
/// How often a listing starts again because etcd compacted its history half-way.
const ATTEMPTS: usize = 5;

/// One record below `subnets/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The part of the key behind `subnets/`.
    pub(super) key: String,
    /// The value, or one that is at most [`USUAL_VALUE`] bytes long and says the same.
    pub(super) value: Vec<u8>,
    /// The etcd lease that it ends with, 0 for a reservation.
    pub(super) lease: i64,
    /// Stays the same while the record is overwritten, and is another once it was removed.
    pub(super) create_revision: i64,
    /// Changes whenever the record is written.
    pub(super) mod_revision: i64,
}

impl Entry {
    pub(super) fn new(keys: &Keys, kv: &KeyValue) -> Self {
        Self {
            key: keys.relative(kv.key()),
            value: kept(kv.value()),
            lease: kv.lease(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
        }
    }

    pub(super) fn subnet(&self) -> Option<Ipv4Net> {
        lease::parse_key(&self.key).ok()
    }

    pub(super) fn parsed(&self) -> Option<LeaseValue> {
        lease::parse_value(&self.value).ok()
    }

    pub(super) fn is_reservation(&self) -> bool {
        self.lease == 0
    }

    pub(super) fn record(&self) -> Record {
        Record { key: self.key.clone(), value: self.value.clone() }
    }
}

/// A value, or a short one that says the same.
fn kept(value: &[u8]) -> Vec<u8> {
    if value.len() <= USUAL_VALUE {
        return value.to_vec();
    }
    match lease::parse_value(value.get(..LONGEST_VALUE).unwrap_or(value)) {
        Ok(said) => serde_json::json!({ "PublicIP": said.public_ip, "BackendType": said.backend_type })
            .to_string()
            .into_bytes(),
        // What is wrong is said from what is kept.
        Err(LeaseError::PublicIp(shown)) => serde_json::json!({ "PublicIP": shown }).to_string().into_bytes(),
        // Nor may what is left of it be a lease.
        Err(LeaseError::Key(_) | LeaseError::NotJson(_)) => {
            let beginning = value.get(..USUAL_VALUE).unwrap_or(value);
            if lease::parse_value(beginning).is_ok() { Vec::new() } else { beginning.to_vec() }
        }
    }
}

/// All records of one revision.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) entries: Vec<Entry>,
}

impl Session {
    /// All records.
    pub(super) async fn list(&self) -> Result<Listing, EtcdError> {
        let operation = format!("list {} in etcd", self.keys.subnets());
        for _ in 1..ATTEMPTS {
            if let Some(listing) = self.list_once(&operation).await? {
                return Ok(listing);
            }
        }
        Err(EtcdError::Away {
            operation,
            why: "its history is compacted faster than it can be read".to_owned(),
        })
    }

    /// `None` when etcd compacted the revision away between two pages.
    async fn list_once(&self, operation: &str) -> Result<Option<Listing>, EtcdError> {
        let prefix = self.keys.subnets();
        let mut start = prefix.clone().into_bytes();
        let end = range_end(prefix.as_bytes());
        let mut listing = Listing { revision: 0, entries: Vec::new() };
        let mut limit = PAGE;
        loop {
            let options =
                GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(listing.revision);
            let from = start.clone();
            let page = self.try_request(operation, |client| read_page(client, from, options)).await?;
            let page = match page {
                Ok(page) => page,
                Err(error) if error::is_compacted(&error) => return Ok(None),
                Err(error) if error::is_too_long(&error) && limit > 1 => {
                    limit = (limit / 8).max(1);
                    continue;
                }
                Err(error) => return Err(EtcdError::of(operation, &error)),
            };
            if listing.revision == 0 {
                listing.revision = page.header().map_or(0, |header| header.revision());
            }
            listing.entries.extend(page.kvs().iter().map(|kv| Entry::new(&self.keys, kv)));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                _ => return Ok(Some(listing)),
            }
            limit = limit.saturating_mul(2).min(PAGE);
        }
    }
}

async fn read_page(client: Client, from: Vec<u8>, options: GetOptions) -> Result<GetResponse, Error> {
    client.kv_client().max_decoding_message_size(LONGEST_ANSWER).get(from, Some(options)).await
}

/// The first key behind all that begin with `prefix`.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    // etcd's own word for "no end".
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_a_long_value_is_short_and_says_the_same() {
        let padding = "x".repeat(1000);
        let spaces = " ".repeat(1000);
        for value in [
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#.to_owned(),
            format!(r#"{{"PublicIP":"1.2.3.4","Padding":"{padding}"}}"#),
            format!(r#"{{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":"{padding}"}}"#),
            format!(r#"{{"PublicIP":"{padding}"}}"#),
            format!(r#"{{"PublicIP":"1.2.3.4"}}{spaces}"#),
            format!(r#"{{"PublicIP":"1.2.3.4"}}{spaces}x"#),
        ] {
            let kept = kept(value.as_bytes());
            assert!(kept.len() <= USUAL_VALUE);
            assert_eq!(lease::parse_value(&kept).ok(), lease::parse_value(value.as_bytes()).ok(), "{value}");
        }
        let too_long = format!(r#"{{"PublicIP":"1.2.3.4","Padding":"{}"}}"#, "x".repeat(LONGEST_VALUE));
        assert!(lease::parse_value(&kept(too_long.as_bytes())).is_err());
    }

    #[test]
    fn a_range_ends_behind_its_prefix() {
        assert_eq!(range_end(b"/a/subnets/"), b"/a/subnets0");
        assert_eq!(range_end(b"a\xff"), b"b");
        assert_eq!(range_end(b"\xff"), [0]);
    }
}
