//! flannel's keys below the prefix, and the one key of our own beside them.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::lease;

/// The names of everything that one network keeps in etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    /// Cleans the prefix as flannel does (Go's `path.Join`): no empty or `.` segments, no slash at the end; a missing first
    /// slash stays missing.
    pub(super) fn new(prefix: &str) -> Self {
        let root = if prefix.starts_with('/') { "/" } else { "" };
        let segments: Vec<_> =
            prefix.split('/').filter(|segment| !segment.is_empty() && *segment != ".").collect();
        Self { prefix: format!("{root}{}", segments.join("/")) }
    }

    fn below(&self, name: &str) -> String {
        match self.prefix.as_str() {
            "" | "/" => format!("{}{name}", self.prefix),
            prefix => format!("{prefix}/{name}"),
        }
    }

    /// The network's configuration.
    pub(super) fn config(&self) -> String {
        self.below("config")
    }

    /// What all lease records begin with.
    pub(super) fn subnets(&self) -> String {
        self.below("subnets/")
    }

    /// A lease record by the part behind `subnets/`.
    pub(super) fn record(&self, key: &str) -> String {
        self.below(&format!("subnets/{key}"))
    }

    /// The lease record of a subnet.
    pub(super) fn subnet(&self, subnet: Ipv4Net) -> String {
        self.record(&lease::key(subnet))
    }

    /// Which running agent speaks for a public address. flannel looks only below `subnets` and never sees it.
    pub(super) fn owner(&self, public_ip: Ipv4Addr) -> String {
        self.below(&format!("overlay-agent/owners/{public_ip}"))
    }

    /// The part of a record's full key behind `subnets/`.
    pub(super) fn relative(&self, key: &[u8]) -> String {
        let subnets = self.subnets();
        String::from_utf8_lossy(key.strip_prefix(subnets.as_bytes()).unwrap_or(key)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_flannels() {
        let keys = Keys::new("/coreos.com/network");
        assert_eq!(keys.config(), "/coreos.com/network/config");
        assert_eq!(keys.subnet("10.5.34.0/24".parse().unwrap()), "/coreos.com/network/subnets/10.5.34.0-24");
        assert_eq!(keys.owner(Ipv4Addr::new(1, 2, 3, 4)), "/coreos.com/network/overlay-agent/owners/1.2.3.4");
        assert_eq!(keys.relative(b"/coreos.com/network/subnets/10.5.34.0-24"), "10.5.34.0-24");
    }

    #[test]
    fn a_prefix_is_cleaned_as_gos_path_join_does() {
        assert_eq!(Keys::new("/a//b/./").config(), "/a/b/config");
        assert_eq!(Keys::new("a/b").config(), "a/b/config");
        assert_eq!(Keys::new("/").config(), "/config");
        assert_eq!(Keys::new("").config(), "config");
    }
}
