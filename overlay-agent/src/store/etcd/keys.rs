//! Full keys in etcd, from keys relative to the network's prefix and back.

use crate::store::record::{key_bytes, key_text};

/// The prefix of one network, with the slash at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Keys {
    prefix: String,
}

impl Keys {
    /// Cleans the prefix as flannel does (Go's `path.Join`): no empty or `.` segments, no slash at the end; a missing first
    /// slash stays missing.
    pub(super) fn new(prefix: &str) -> Self {
        let root = if prefix.starts_with('/') { "/" } else { "" };
        let segments: Vec<_> =
            prefix.split('/').filter(|segment| !segment.is_empty() && *segment != ".").collect();
        let slash = if segments.is_empty() { "" } else { "/" };
        Self { prefix: format!("{root}{}{slash}", segments.join("/")) }
    }

    /// A full key, for requests.
    pub(super) fn full(&self, key: &str) -> Vec<u8> {
        [self.prefix.clone().into_bytes(), key_bytes(key)].concat()
    }

    /// A full key, for messages.
    pub(in crate::store) fn location(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The text of the part of a full key behind the prefix.
    pub(super) fn relative(&self, key: &[u8]) -> String {
        key_text(key.strip_prefix(self.prefix.as_bytes()).unwrap_or(key))
    }
}

/// The first key behind all that begin with `prefix`.
pub(super) fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    // etcd's notation for "no end".
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_flannels() {
        let keys = Keys::new("/coreos.com/network");
        assert_eq!(keys.full("config"), b"/coreos.com/network/config");
        assert_eq!(keys.full("subnets/10.5.34.0-24"), b"/coreos.com/network/subnets/10.5.34.0-24");
        assert_eq!(keys.relative(b"/coreos.com/network/subnets/10.5.34.0-24"), "subnets/10.5.34.0-24");
    }

    #[test]
    fn a_prefix_is_cleaned_as_gos_path_join_does() {
        for (prefix, key) in
            [("/a//b/./", "/a/b/config"), ("a/b", "a/b/config"), ("/", "/config"), ("", "config")]
        {
            assert_eq!(Keys::new(prefix).location("config"), key, "{prefix:?}");
        }
    }

    #[test]
    fn a_range_ends_behind_its_prefix() {
        assert_eq!(range_end(b"/a/subnets/"), b"/a/subnets0");
        assert_eq!(range_end(b"a\xff"), b"b");
        assert_eq!(range_end(b"\xff"), [0]);
    }
}
