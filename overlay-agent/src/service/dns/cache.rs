//! Answers of upstream servers, kept for as long as they say. Bounded in bytes.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::wire;

/// Longest time to keep an answer (RFC 8767 section 4 suggests days; names of networks at the edge move sooner).
const LONGEST: u32 = 86_400;
/// Longest time to keep the answer that there is nothing (RFC 2308 section 5 suggests one to three hours).
const LONGEST_NEGATIVE: u32 = 900;
/// Memory of an entry beside its bytes: the map's and the allocator's.
const OVERHEAD: usize = 200;

/// Response codes, the low four bits of the fourth byte (RFC 1035 section 4.1.1).
pub const NO_ERROR: u8 = 0;
const NO_NAME: u8 = 3;

/// A response without its OPT record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    bytes: Vec<u8>,
    ttls: Vec<(usize, u32)>,
    code: u8,
    lifetime: u32,
}

impl Response {
    /// Reads a response to a question that ends at `question_end`. `None` when it is malformed, or has an extended error.
    pub fn parse(message: &[u8], question_end: usize) -> Option<Self> {
        let records = wire::records(message, question_end)?;
        let mut end = records.last().map_or(question_end, |record| record.end);
        let mut kept = records.len();
        let mut bytes = message.get(..end)?.to_vec();
        let is_opt = |record: &wire::RecordAt| record.section == 2 && record.kind == wire::OPT;
        if let Some((at, opt)) = records.iter().enumerate().find(|(_, record)| is_opt(record)) {
            // The high bits of an extended response code; they are for the server that asked.
            if *message.get(opt.ttl_at)? != 0 {
                return None;
            }
            // Names behind it may refer to names behind it, so additional records go when it is not the last one.
            let first = if at + 1 == records.len() {
                at
            } else {
                records.iter().position(|record| record.section == 2)?
            };
            let additional = records.get(..first)?.iter().filter(|record| record.section == 2).count();
            (end, kept) = (records.get(first)?.start, first);
            wire::put(&mut bytes, 10, &u16::try_from(additional).ok()?.to_be_bytes());
        }
        bytes.truncate(end);
        let records = records.get(..kept)?;
        // RFC 2181 section 8: a TTL with the highest bit counts as 0.
        let ttl = |record: &wire::RecordAt| {
            wire::u32_at(message, record.ttl_at).map(|ttl| if ttl > i32::MAX as u32 { 0 } else { ttl })
        };
        let ttls: Vec<_> = records.iter().filter_map(|record| Some((record.ttl_at, ttl(record)?))).collect();
        let code = message.get(3)? & 0xf;
        let lifetime = lifetime(message, records, &ttls, code);
        bytes.shrink_to_fit();
        Some(Self { bytes, ttls, code, lifetime })
    }

    /// The response code.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Whether it answers the question, with records or with the statement that there are none.
    pub fn is_answer(&self) -> bool {
        matches!(self.code, NO_ERROR | NO_NAME)
    }

    /// The bytes, with the remaining time to live in each record.
    pub fn aged(&self, seconds: u32) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for (at, ttl) in &self.ttls {
            wire::put(&mut bytes, *at, &ttl.saturating_sub(seconds).to_be_bytes());
        }
        bytes
    }

    fn size(&self) -> usize {
        self.bytes.len() + self.ttls.len() * size_of::<(usize, u32)>() + OVERHEAD
    }
}

/// For how many seconds a response may be kept: the shortest of its records, and for one without an answer the minimum of its SOA
/// record, too (RFC 2308 section 5). Without an SOA record it is not kept.
fn lifetime(message: &[u8], records: &[wire::RecordAt], ttls: &[(usize, u32)], code: u8) -> u32 {
    let is_truncated = message.get(2).is_none_or(|flags| flags & 2 != 0);
    let shortest = ttls.iter().map(|(_, ttl)| *ttl).min().unwrap_or(0);
    let has_answer = records.iter().any(|record| record.section == 0);
    let soa = records.iter().find(|record| record.section == 1 && record.kind == wire::SOA);
    let minimum = soa.and_then(|soa| wire::u32_at(message, soa.end.checked_sub(4)?));
    match code {
        _ if is_truncated => 0,
        NO_ERROR if has_answer => shortest.min(LONGEST),
        NO_ERROR | NO_NAME => minimum.map_or(0, |minimum| shortest.min(minimum).min(LONGEST_NEGATIVE)),
        _ => 0,
    }
}

#[derive(Debug)]
struct Entry {
    response: Arc<Response>,
    since: Instant,
}

impl Entry {
    /// Its age in seconds, unless it is too old.
    fn age(&self, now: Instant) -> Option<u32> {
        let age = now.saturating_duration_since(self.since);
        let is_fresh = age < Duration::from_secs(self.response.lifetime.into());
        u32::try_from(age.as_secs()).ok().filter(|_| is_fresh)
    }
}

/// The cache. It has two generations, each of half of the permitted size: when the younger one is full it becomes the older one, whose
/// entries go unless they have been used since. So each step takes the same short time.
#[derive(Debug)]
pub struct Cache {
    young: HashMap<Box<[u8]>, Entry>,
    old: HashMap<Box<[u8]>, Entry>,
    young_bytes: usize,
    max_bytes: usize,
}

impl Cache {
    /// With room for so many bytes; 0 for none.
    pub fn new(max_bytes: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_bytes: 0, max_bytes }
    }

    /// The answer for a key, and its age in seconds.
    pub fn get(&mut self, key: &[u8], now: Instant) -> Option<(Arc<Response>, u32)> {
        if let Some(entry) = self.young.get(key) {
            return Some((Arc::clone(&entry.response), entry.age(now)?));
        }
        let (key, entry) = self.old.remove_entry(key)?;
        let found = (Arc::clone(&entry.response), entry.age(now)?);
        self.put(key, entry);
        Some(found)
    }

    /// Keeps an answer, if it may be kept.
    pub fn insert(&mut self, key: Box<[u8]>, response: Arc<Response>, now: Instant) {
        if response.lifetime > 0 && response.size() + key.len() <= self.max_bytes / 2 {
            self.old.remove(&key);
            self.put(key, Entry { response, since: now });
        }
    }

    fn put(&mut self, key: Box<[u8]>, entry: Entry) {
        let size = entry.response.size() + key.len();
        if self.young_bytes + size > self.max_bytes / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        self.young_bytes += size;
        let key_bytes = key.len();
        if let Some(before) = self.young.insert(key, entry) {
            self.young_bytes = self.young_bytes.saturating_sub(before.response.size() + key_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::{
        op::{Edns, Message, OpCode, Query, ResponseCode},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{A, SOA},
        },
    };

    use super::*;

    fn name() -> Name {
        Name::from_ascii("www.example.com.").unwrap()
    }

    fn response(ttls: &[u32]) -> Message {
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name(), RecordType::A));
        for ttl in ttls {
            message.add_answer(Record::from_rdata(name(), *ttl, RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))));
        }
        message
    }

    fn parsed(message: &Message) -> Response {
        let bytes = message.to_vec().unwrap();
        Response::parse(&bytes, wire::question(&bytes).unwrap().end).unwrap()
    }

    fn soa(ttl: u32, minimum: u32) -> Record {
        Record::from_rdata(name(), ttl, RData::SOA(SOA::new(name(), name(), 1, 2, 3, 4, minimum)))
    }

    #[test]
    fn an_answer_lives_as_long_as_its_shortest_record() {
        let response = parsed(&response(&[300, 60]));
        assert_eq!(response.lifetime, 60);
        let aged = Message::from_vec(&response.aged(50)).unwrap();
        assert_eq!(aged.answers.iter().map(|record| record.ttl).collect::<Vec<_>>(), [250, 10]);
        assert_eq!(parsed(&super::tests::response(&[u32::MAX, 60])).lifetime, 0);
        assert_eq!(parsed(&super::tests::response(&[900_000])).lifetime, LONGEST);
    }

    #[test]
    fn a_negative_answer_lives_as_long_as_its_soa_record_says() {
        let mut message = response(&[]);
        message.metadata.response_code = ResponseCode::NXDomain;
        assert_eq!(parsed(&message).lifetime, 0);
        message.add_authority(soa(600, 60));
        assert_eq!(parsed(&message).lifetime, 60);
        message.metadata.response_code = ResponseCode::NoError;
        assert_eq!(parsed(&message).lifetime, 60);
        message.metadata.response_code = ResponseCode::ServFail;
        assert_eq!((parsed(&message).lifetime, parsed(&message).is_answer()), (0, false));
    }

    #[test]
    fn truncated_answers_and_extended_errors_are_not_kept() {
        let mut message = response(&[60]);
        message.metadata.truncation = true;
        assert_eq!(parsed(&message).lifetime, 0);
        let mut message = response(&[60]);
        message.set_edns(Edns::new());
        message.metadata.response_code = ResponseCode::BADVERS;
        let bytes = message.to_vec().unwrap();
        assert_eq!(Response::parse(&bytes, wire::question(&bytes).unwrap().end), None);
    }

    #[test]
    fn the_opt_record_is_removed_wherever_it_is() {
        let mut message = response(&[60]);
        message.add_additional(Record::from_rdata(name(), 9, RData::A(A(Ipv4Addr::new(192, 0, 2, 2)))));
        let without = message.to_vec().unwrap();
        message.set_edns(Edns::new());
        assert_eq!(parsed(&message).bytes, without);
        // The same with the additional record behind it: that goes, too.
        let end = wire::question(&without).unwrap().end;
        let additional = wire::records(&without, end).unwrap()[1];
        let mut bytes = without.clone();
        bytes.splice(additional.start..additional.start, [0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 0]);
        wire::put(&mut bytes, 10, &[0, 2]);
        let parsed = Response::parse(&bytes, end).unwrap();
        assert_eq!(Message::from_vec(&parsed.bytes).unwrap().additionals.len(), 0);
        assert_eq!(parsed.bytes[..10], without[..10]);
    }

    #[test]
    fn entries_expire_and_the_size_is_bounded() {
        let mut cache = Cache::new(20_000);
        let start = Instant::now();
        let response = Arc::new(parsed(&response(&[60])));
        cache.insert(Box::new([1]), Arc::clone(&response), start);
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(cache.get(&[1], after(59)).map(|(_, age)| age), Some(59));
        assert_eq!(cache.get(&[1], after(60)), None);
        for number in 0..1000_u32 {
            cache.insert(Box::new(number.to_be_bytes()), Arc::clone(&response), start);
            assert!(cache.get(&0_u32.to_be_bytes(), start).is_some(), "what is used stays");
            let size = |entries: &HashMap<Box<[u8]>, Entry>| {
                entries.iter().map(|(key, entry)| key.len() + entry.response.size()).sum::<usize>()
            };
            assert!(size(&cache.young) + size(&cache.old) <= 20_000);
            assert_eq!(size(&cache.young), cache.young_bytes);
        }
        assert!(cache.get(&500_u32.to_be_bytes(), start).is_none());
        let mut off = Cache::new(0);
        off.insert(Box::new([1]), response, start);
        assert_eq!(off.get(&[1], start), None);
    }
}
