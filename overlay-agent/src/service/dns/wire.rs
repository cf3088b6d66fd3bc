//! The layout of a DNS message: where its question and its records stand, without decoding them (RFC 1035 section 4).
//!
//! Answers of upstream servers are kept and passed on as bytes, so that records of types that this agent does not know stay as they are.

use std::ops::Range;

/// Length of a header in bytes.
pub const HEADER: usize = 12;
/// Type of the OPT record (RFC 6891 section 6.1.1).
pub const OPT: u16 = 41;
/// Type of the SOA record.
pub const SOA: u16 = 6;
/// Longest name in bytes.
const LONGEST_NAME: usize = 255;

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordAt {
    /// Where it begins.
    pub start: usize,
    /// Where its TTL begins, four bytes.
    pub ttl_at: usize,
    /// Where its data ends.
    pub end: usize,
    /// Its type.
    pub kind: u16,
    /// Its section: 0 for answers, 1 for authority, 2 for additional records.
    pub section: usize,
}

/// Two bytes of a message.
pub fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// Four bytes of a message.
pub fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Writes bytes into a message. What is outside of it is left out.
pub fn put(message: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = message.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// The first question: name, type and class. `None` when the name is compressed, which no first name can be, or does not end.
pub fn question(message: &[u8]) -> Option<Range<usize>> {
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        match length {
            0 => break,
            1..=63 if at - HEADER < LONGEST_NAME => {}
            _ => return None,
        }
    }
    let range = HEADER..at + 4;
    message.get(range.clone()).map(|_| range)
}

/// The records after a question that ends at `from`. `None` when they do not end where the message says.
pub fn records(message: &[u8], from: usize) -> Option<Vec<RecordAt>> {
    let mut at = from;
    let mut records = Vec::new();
    for section in 0..3 {
        for _ in 0..u16_at(message, 6 + 2 * section)? {
            let start = at;
            let kind_at = end_of_name(message, start)?;
            let kind = u16_at(message, kind_at)?;
            let ttl_at = kind_at + 4;
            let length = usize::from(u16_at(message, ttl_at + 4)?);
            at = ttl_at + 6 + length;
            message.get(start..at)?;
            records.push(RecordAt { start, ttl_at, end: at, kind, section });
        }
    }
    Some(records)
}

/// Where a name ends that may be compressed.
fn end_of_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let length = *message.get(at)?;
        match length {
            0 => return Some(at + 1),
            1..=63 => at += 1 + usize::from(length),
            192.. => return Some(at + 2),
            64..=191 => return None,
        }
    }
}
