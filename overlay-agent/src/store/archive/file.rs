//! The file: lines of JSON. The first has the format's version and everything but records, then each record has a line, and the
//! last has the number of the lines before it and their CRC-32. So a file that is damaged, cut off or appended to is recognised, and
//! neither to write nor to read it takes more memory than the records.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read as _, Write},
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use crc32fast::Hasher;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Content, Identity, OwnLease, Part, Raw, Time};
use crate::{
    store::record::{Lifetime, LifetimeId, Version, key_bytes, key_text},
    whole_file,
};

/// The format that this agent writes, and the only one that it reads.
pub(super) const FORMAT: u32 = 1;
/// Longest line, in bytes: a value of 64 KiB, of which each byte takes five at most, and a key as long as etcd takes.
const MAX_LINE: u64 = 16 * 1024 * 1024;

/// Why a file cannot be read.
#[derive(Debug, Error)]
pub(super) enum FileError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it was written by a newer version of the agent (format {0}, and this one reads {FORMAT})")]
    Newer(u32),
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// A file that was read.
#[derive(Debug)]
pub(super) struct Archived {
    pub(super) identity: Identity,
    pub(super) written: SystemTime,
    pub(super) content: Content,
}

/// Read first, whatever else the line has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    format: u32,
    written: Time,
    store: Cow<'a, Identity>,
    own: Cow<'a, Option<OwnLease>>,
    config: Cow<'a, Option<String>>,
    /// The kinds, in the order of their records.
    parts: Vec<PartHeader<'a>>,
}

#[derive(Serialize, Deserialize)]
struct PartHeader<'a> {
    prefix: Cow<'a, str>,
    revision: i64,
    seen: Time,
    records: usize,
}

/// A record.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    /// The whole key.
    #[serde(rename = "k", borrow)]
    key: Cow<'a, str>,
    /// The value, escaped as a key is: etcd's values need not be UTF-8.
    #[serde(rename = "v", borrow)]
    value: Cow<'a, str>,
    #[serde(rename = "c")]
    created: Option<i64>,
    #[serde(rename = "m")]
    modified: i64,
    /// The lifetime; without, the record has no end.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    lifetime: Option<LifetimeId>,
}

#[derive(Serialize, Deserialize)]
struct Footer {
    lines: u64,
    crc32: u32,
}

/// Replaces the file.
/// Fails when it or its directory cannot be written; it is then as it was.
pub(super) fn write(
    path: &Path,
    identity: &Identity,
    written: SystemTime,
    content: &Content,
) -> io::Result<()> {
    whole_file::replace(path, |file| {
        let mut lines = Lines { file: BufWriter::new(file), hasher: Hasher::new(), count: 0 };
        lines.write(&Header {
            format: FORMAT,
            written: written.into(),
            store: Cow::Borrowed(identity),
            own: Cow::Borrowed(&content.own),
            config: Cow::Borrowed(&content.config),
            parts: content.parts.iter().map(part_header).collect(),
        })?;
        let records = content.parts.iter().flat_map(|(prefix, part)| {
            part.records.iter().map(move |(key, raw)| (format!("{prefix}{key}"), raw))
        });
        for (key, raw) in records {
            lines.write(&Line {
                key: key.into(),
                value: key_text(&raw.value).into(),
                created: raw.version.created,
                modified: raw.version.modified,
                lifetime: raw.version.lifetime.id(),
            })?;
        }
        let footer = Footer { lines: lines.count, crc32: lines.hasher.clone().finalize() };
        lines.write(&footer)?;
        lines.file.flush()
    })
}

fn part_header<'a>((prefix, part): (&'a String, &'a Part)) -> PartHeader<'a> {
    PartHeader {
        prefix: prefix.into(),
        revision: part.revision,
        seen: part.seen,
        records: part.records.len(),
    }
}

/// Writes lines and their checksum.
struct Lines<W: Write> {
    file: W,
    hasher: Hasher,
    count: u64,
}

impl<W: Write> Lines<W> {
    fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.hasher.update(&text);
        self.count += 1;
        self.file.write_all(&text)
    }
}

/// Reads the file; `None` when there is none.
pub(super) fn read(path: &Path) -> Result<Option<Archived>, FileError> {
    match File::open(path) {
        Ok(file) => read_lines(BufReader::new(file)).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_lines(file: impl BufRead) -> Result<Archived, FileError> {
    let mut lines = Reader { file, hasher: Hasher::new(), count: 0, line: Vec::new() };
    let first = lines.next()?;
    let Format { format } = parse(first)?;
    if format > FORMAT {
        return Err(FileError::Newer(format));
    }
    let header: Header<'static> = parse::<Header<'_>>(first).map(into_owned)?;
    let mut parts = BTreeMap::new();
    for PartHeader { prefix, revision, seen, records: count } in header.parts {
        let mut records = BTreeMap::new();
        for _ in 0..count {
            let line: Line<'_> = parse(lines.next()?)?;
            let Some(key) = line.key.strip_prefix(&*prefix) else {
                return Err(FileError::Damaged(format!("a record is not below {prefix}")));
            };
            let key = Arc::from(key);
            let lifetime = line.lifetime.map_or(Lifetime::Unlimited, Lifetime::Limited);
            let version = Version { created: line.created, modified: line.modified, lifetime };
            let raw = Raw { value: key_bytes(&line.value).into(), version };
            records.insert(key, raw);
        }
        parts.insert(prefix.into_owned(), Part { revision, seen, records: Arc::new(records) });
    }
    let (count, crc32) = (lines.count, lines.hasher.clone().finalize());
    let footer: Footer = parse(lines.next()?)?;
    if footer.lines != count || footer.crc32 != crc32 {
        return Err(FileError::Damaged("its checksum is that of another content".to_owned()));
    }
    if !lines.is_at_end()? {
        return Err(FileError::Damaged("there is more behind its end".to_owned()));
    }
    let content = Content { config: header.config.into_owned(), own: header.own.into_owned(), parts };
    Ok(Archived { identity: header.store.into_owned(), written: header.written.into(), content })
}

fn into_owned(header: Header<'_>) -> Header<'static> {
    let part = |part: PartHeader<'_>| PartHeader { prefix: part.prefix.into_owned().into(), ..part };
    Header {
        store: Cow::Owned(header.store.into_owned()),
        own: Cow::Owned(header.own.into_owned()),
        config: Cow::Owned(header.config.into_owned()),
        parts: header.parts.into_iter().map(part).collect(),
        ..header
    }
}

fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, FileError> {
    serde_json::from_slice(line).map_err(|error| FileError::Damaged(error.to_string()))
}

/// Reads lines and computes their checksum.
struct Reader<R: BufRead> {
    file: R,
    hasher: Hasher,
    count: u64,
    line: Vec<u8>,
}

impl<R: BufRead> Reader<R> {
    fn next(&mut self) -> Result<&[u8], FileError> {
        self.line.clear();
        (&mut self.file).take(MAX_LINE).read_until(b'\n', &mut self.line)?;
        if self.line.last() != Some(&b'\n') {
            return Err(FileError::Damaged("it is cut off".to_owned()));
        }
        self.hasher.update(&self.line);
        self.count += 1;
        Ok(&self.line)
    }

    fn is_at_end(&mut self) -> io::Result<bool> {
        Ok(self.file.fill_buf()?.is_empty())
    }
}
