//! Records of any kind: parsed once, where they enter, and identified by a version for compare-and-swap.

use std::{
    fmt::{Debug, Write as _},
    sync::Arc,
    time::SystemTime,
};

use bstr::ByteVec as _;
use thiserror::Error;

/// A kind of record. All records of a kind stand below one prefix.
pub trait Kind: Clone + Debug + Send + Sync + 'static {
    /// First part of the keys, with the slash at its end: `subnets/`.
    const PREFIX: &'static str;
    /// Parts of a key behind the prefix, separated by slashes. A directory store has a directory for each but the last.
    const SEGMENTS: usize = 1;
    /// What a key names.
    type Id: Clone + Debug + PartialEq + Send + Sync;
    /// What a value means.
    type Value: Clone + Debug + PartialEq + Send + Sync;

    /// Parses the part of a key behind the prefix.
    /// Fails when it names nothing of this kind.
    fn parse_key(key: &str) -> Result<Self::Id, RecordError>;

    /// Parses a value.
    /// Fails when it is not a value of this kind.
    fn parse_value(value: &[u8]) -> Result<Self::Value, RecordError>;
}

/// A kind of which this program writes records.
pub trait Writable: Kind {
    /// The part of a key behind the prefix, which [`Kind::parse_key`] reads.
    fn key(id: &Self::Id) -> String;

    /// The text of a value, which [`Kind::parse_value`] reads.
    fn text(value: &Self::Value) -> String;
}

/// Why a record cannot be used. The text quotes at most 64 characters of the record, without control characters. Boxed: a
/// store may hold many thousand records, nearly all without an error.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct RecordError(pub Box<str>);

/// A lifetime in the store: records attached to it are removed when it ends. The number of an etcd lease.
pub type LifetimeId = i64;

/// How long a record stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// Until a client removes it; the store knows no lifetimes.
    #[default]
    Untracked,
    /// Until a client removes it, in a store that knows lifetimes: an operator wrote it.
    Unlimited,
    /// Until this lifetime ends.
    Limited(LifetimeId),
}

impl Lifetime {
    /// The lifetime, if there is one.
    pub fn id(self) -> Option<LifetimeId> {
        match self {
            Self::Limited(id) => Some(id),
            Self::Untracked | Self::Unlimited => None,
        }
    }
}

/// One state of a record: equal versions are the same write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    /// Revision at which the record was created; stays while the record is overwritten. `None` where the store keeps none.
    pub created: Option<i64>,
    /// Changes with every write.
    pub modified: i64,
    /// How long the record stays.
    pub lifetime: Lifetime,
}

/// A record as the store holds it, not parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawRecord {
    /// Key behind the store's own prefix, as [`key_text`]: `subnets/10.5.34.0-24`.
    pub(super) key: String,
    /// At most [`MAX_VALUE`] bytes: a longer value is cut, so that it does not parse. Shared: a large network has many.
    pub(super) value: Arc<[u8]>,
    pub(super) version: Version,
}

/// The text of a key: backslashes, characters that cannot be printed and bytes that are no UTF-8 are escaped (`\\xff`). So an
/// operator can read and name every record.
pub(super) fn key_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            let is_plain = matches!(character, ' '..='~') || character.escape_debug().count() == 1;
            let is_plain = is_plain && character != '\\';
            match is_plain {
                true => text.push(character),
                false => escape(&mut text, character.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        escape(&mut text, chunk.invalid());
    }
    text
}

fn escape(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
    }
}

/// The bytes of a key whose text is [`key_text`].
pub(super) fn key_bytes(text: &str) -> Vec<u8> {
    Vec::unescape_bytes(text)
}

/// Longest value that is read, in bytes. Lease values have about 100.
pub(super) const MAX_VALUE: usize = 64 * 1024;

/// A record of the kind `K`.
#[derive(Clone, Debug, PartialEq)]
pub struct Record<K: Kind> {
    /// The part of the key behind [`Kind::PREFIX`]. Bytes other than printable characters are escaped (`\\xff`). Shared: a large
    /// network has many, and each is a key of several maps.
    pub key: Arc<str>,
    /// What the key names.
    pub id: Result<K::Id, RecordError>,
    /// What the value means.
    pub value: Result<K::Value, RecordError>,
    /// Which write this is.
    pub version: Version,
}

impl<K: Kind> Record<K> {
    /// Parses a record. `key` is the part behind the kind's prefix.
    pub fn parse(key: &str, value: &[u8], version: Version) -> Self {
        Self::of(key.into(), value, version)
    }

    /// As [`Self::parse`], with a key that others have, too.
    pub(super) fn of(key: Arc<str>, value: &[u8], version: Version) -> Self {
        Self { id: K::parse_key(&key), value: K::parse_value(value), version, key }
    }

    /// Whether `text`, with the same or other escapes, is the key.
    pub fn has_key(&self, text: &str) -> bool {
        key_bytes(text) == key_bytes(&self.key)
    }
}

impl<K: Kind> From<RawRecord> for Record<K> {
    fn from(raw: RawRecord) -> Self {
        let key = raw.key.strip_prefix(K::PREFIX).unwrap_or(&raw.key);
        Self::parse(key, &raw.value, raw.version)
    }
}

/// A record that was written or removed.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<K: Kind> {
    /// The record is new or has a new value.
    Put(Record<K>),
    /// The record was removed.
    Delete {
        /// Its key, as in [`Record::key`].
        key: Arc<str>,
    },
}

/// News about the records of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<K: Kind> {
    /// All records, in order of their keys.
    Snapshot(Vec<Record<K>>),
    /// All records as they were at an earlier time: the store does not answer, and they are those that an earlier run of this host
    /// has left on disk. Only ever the first event.
    Recalled {
        /// In order of their keys.
        records: Vec<Record<K>>,
        /// When they were known to be so.
        seen: SystemTime,
    },
    /// Changes since the last event, in order.
    Changes(Vec<Change<K>>),
    /// The store cannot be read, with the reason. Known records stay valid; a snapshot follows when it can be read again.
    Lost(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_text_that_gives_its_bytes() {
        for (bytes, text) in [
            (&b"subnets/10.5.34.0-24&2001:cafe::-64"[..], "subnets/10.5.34.0-24&2001:cafe::-64"),
            (b"\xff\xfe", r"\xff\xfe"),
            (b"\x1b[31mred", r"\x1b[31mred"),
            (br"a\xff", r"a\x5cxff"),
            ("caf\u{e9} \"'".as_bytes(), "caf\u{e9} \"'"),
            ("\u{9b}31m\u{202e}".as_bytes(), r"\xc2\x9b31m\xe2\x80\xae"),
        ] {
            assert_eq!((key_text(bytes).as_str(), key_bytes(text).as_slice()), (text, bytes));
        }
        for byte in 0..=u8::MAX {
            let key = [b'"', byte, b'\'', byte, b'x'];
            let text = key_text(&key);
            assert!(key_bytes(&text) == key && !text.contains(char::is_control), "{text}");
        }
    }
}
