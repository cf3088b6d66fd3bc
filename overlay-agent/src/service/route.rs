//! Routes of HTTP ports: which requests go to another service. Pure.

use http::header::HeaderName;
use serde::{Deserialize, Serialize};

use super::name::{ServiceName, label};
use crate::printable::{LONGEST_NAME, printable};

/// Most routes of a port.
pub const MAX_ROUTES: usize = 64;
/// Longest path prefix in bytes.
const LONGEST_PREFIX: usize = 1024;
/// Longest host name in bytes (RFC 1035 section 2.3.4).
const LONGEST_HOST: usize = 253;

/// Requests that go to another service. Without host and prefix, all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The host that a request names, in any case and without a port; `*.example.com` stands for one or more labels in front.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The begin of the path, as it is sent, in whole segments: `/a` stands for `/a` and `/a/b`, not for `/ab`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_prefix: Option<String>,
    /// The service whose endpoints answer.
    pub service: ServiceName,
    /// The name of its port; without, its first HTTP port, or else its first TCP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
}

/// How well a route fits. Of two that fit, the greater one counts: a host before none, an exact one before a wildcard, the longer wildcard,
/// and then the longer prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    has_host: bool,
    is_exact: bool,
    wildcard: usize,
    prefix: usize,
}

impl Route {
    /// Fails when no request could have the host or the path, or the port is no DNS label.
    pub fn check(&self) -> Result<(), String> {
        if let Some(host) = &self.host {
            let name = host.strip_prefix("*.").unwrap_or(host);
            let is_label = |label: &str| {
                let is_known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
                !label.is_empty() && label.bytes().all(is_known)
            };
            if host.len() > LONGEST_HOST || !name.split('.').all(is_label) {
                let host = printable(host, LONGEST_NAME);
                return Err(format!(
                    "host {host:?}: expected a name without a port, or *. and a name, for example *.example.com"
                ));
            }
        }
        if let Some(prefix) = &self.path_prefix {
            let is_of_path = |byte: u8| byte.is_ascii_graphic() && byte != b'?' && byte != b'#';
            if prefix.len() > LONGEST_PREFIX || !prefix.starts_with('/') || !prefix.bytes().all(is_of_path) {
                let prefix = printable(prefix, LONGEST_NAME);
                return Err(format!(
                    "path_prefix {prefix:?}: expected a path that starts with a slash, without spaces and query"
                ));
            }
        }
        match &self.port {
            Some(port) => label("port", port).map(drop).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    /// How well it fits a request; `None` when it does not.
    fn rank(&self, host: Option<&str>, path: &str) -> Option<Rank> {
        let mut rank = Rank { has_host: self.host.is_some(), is_exact: false, wildcard: 0, prefix: 0 };
        if let Some(own) = &self.host {
            let host = host?;
            match own.strip_prefix('*') {
                None => {
                    rank.is_exact = true;
                    own.eq_ignore_ascii_case(host).then_some(())?;
                }
                Some(end) => {
                    rank.wildcard = end.len();
                    let front = host.len().checked_sub(end.len()).filter(|front| *front > 0)?;
                    host.get(front..)?.eq_ignore_ascii_case(end).then_some(())?;
                }
            }
        }
        if let Some(prefix) = &self.path_prefix {
            let prefix = prefix.trim_end_matches('/');
            rank.prefix = prefix.len() + 1;
            let rest = path.strip_prefix(prefix)?;
            // `*` of OPTIONS is no path.
            (rest.starts_with('/') || rest.is_empty() && !prefix.is_empty()).then_some(())?;
        }
        Some(rank)
    }

    /// Where it leads: `shop/api, port web`.
    pub fn describe(&self) -> String {
        let service = &self.service;
        self.port.as_ref().map_or_else(|| service.to_string(), |port| format!("{service}, port {port}"))
    }
}

/// The route of a request: of those with the best host, the one with the longest prefix, and of equal ones the first. `host` is without a port,
/// `path` without a query.
pub fn find<'a>(routes: &'a [Route], host: Option<&str>, path: &str) -> Option<&'a Route> {
    // A name can end with the dot of the root.
    let host = host.map(|host| host.strip_suffix('.').unwrap_or(host));
    let mut best: Option<(Rank, &Route)> = None;
    for route in routes {
        if let Some(rank) = route.rank(host, path)
            && best.is_none_or(|(other, _)| rank > other)
        {
            best = Some((rank, route));
        }
    }
    best.map(|(_, route)| route)
}

/// Fails when a header name cannot be one.
pub(super) fn check_header(name: &str) -> Result<(), String> {
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("lb.hash_key {:?} is no name of a header", printable(name, LONGEST_NAME))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn route(host: &str, prefix: &str, service: &str) -> Route {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Route {
            host: given(host),
            path_prefix: given(prefix),
            service: format!("shop/{service}").parse().unwrap(),
            port: None,
        }
    }

    fn found(routes: &[Route], host: &str, path: &str) -> String {
        let host = (!host.is_empty()).then_some(host);
        find(routes, host, path).map_or_else(|| "none".to_owned(), |route| route.service.name().to_owned())
    }

    #[test]
    fn prefixes_end_at_segments_and_the_longest_one_counts() {
        let routes = [route("", "/a", "a"), route("", "/a/b/", "ab"), route("", "/c/", "c")];
        for (path, service) in [
            ("/a", "a"),
            ("/a/", "a"),
            ("/a/x", "a"),
            ("/ab", "none"),
            ("/A", "none"),
            ("/a/b", "ab"),
            ("/a/b/c", "ab"),
            ("/a/bc", "a"),
            ("/", "none"),
            ("/c", "c"),
            ("*", "none"),
            ("", "none"),
        ] {
            assert_eq!(found(&routes, "", path), service, "{path}");
        }
        let all = [route("", "/", "all")];
        assert_eq!(["/", "/x", "*"].map(|path| found(&all, "", path)), ["all", "all", "none"]);
    }

    #[test]
    fn exact_hosts_come_before_wildcards_and_those_before_none() {
        let routes = [
            route("", "/long/path", "none"),
            route("*.example.com", "", "wild"),
            route("*.b.example.com", "", "wilder"),
            route("A.example.com", "/x", "exact-x"),
            route("a.example.com", "", "exact"),
        ];
        for (host, path, service) in [
            ("a.example.com", "/long/path", "exact"),
            ("A.EXAMPLE.com", "/x/y", "exact-x"),
            ("a.example.com.", "/", "exact"),
            ("b.example.com", "/long/path", "wild"),
            ("c.b.example.com", "/", "wilder"),
            ("d.c.b.example.com", "/", "wilder"),
            ("example.com", "/", "none"),
            (".example.com", "/", "none"),
            ("xexample.com", "/long/path", "none"),
            ("", "/long/path", "none"),
        ] {
            let expected = if path == "/long/path" || service != "none" { service } else { "none" };
            assert_eq!(found(&routes, host, path), expected, "{host}{path}");
        }
        assert!(find(&routes, Some("example.org"), "/").is_none());
    }

    #[test]
    fn of_equal_routes_the_first_counts() {
        assert_eq!(found(&[route("a", "/x", "one"), route("A", "/x/", "two")], "a", "/x"), "one");
    }

    #[test]
    fn what_no_request_can_have_is_refused() {
        for (host, prefix) in [("", ""), ("web", "/"), ("*.a-b.c_d", "/a%20b"), ("10.0.0.1", "/a/b/")] {
            assert_eq!(route(host, prefix, "a").check(), Ok(()), "{host} {prefix}");
        }
        for (host, prefix) in [
            ("a:80", ""),
            ("*", ""),
            ("*.", ""),
            ("a.*.b", ""),
            ("a..b", ""),
            ("http://a", ""),
            ("", "a"),
            ("", "/a b"),
            ("", "/a?b"),
            ("", "/\u{e4}"),
        ] {
            assert!(route(host, prefix, "a").check().is_err(), "{host} {prefix}");
        }
        assert!(Route { port: Some("Http".to_owned()), ..route("", "", "a") }.check().is_err());
    }

    /// Another reading of the rules: by segments and labels, all routes compared with each other.
    fn slow(routes: &[Route], host: Option<&str>, path: &str) -> Option<usize> {
        let segments = |path: &str| path.split('/').skip(1).map(str::to_owned).collect::<Vec<_>>();
        let fits_path = |prefix: &str| {
            let wanted: Vec<String> = segments(prefix.trim_end_matches('/'));
            path.starts_with('/') && segments(path).starts_with(&wanted)
        };
        let labels = |host: &str| host.to_lowercase().split('.').rev().map(str::to_owned).collect::<Vec<_>>();
        let fits_host = |own: &str| {
            let Some(host) = host else { return false };
            match own.strip_prefix("*.") {
                Some(end) => labels(host).starts_with(&labels(end)) && labels(host).len() > labels(end).len(),
                None => labels(host) == labels(own),
            }
        };
        let class = |route: &Route| match &route.host {
            None => (0, 0),
            Some(host) if host.starts_with('*') => (1, host.len()),
            Some(_) => (2, 0),
        };
        let length = |route: &Route| {
            route.path_prefix.as_ref().map_or(0, |prefix| 1 + prefix.trim_end_matches('/').len())
        };
        let fitting = routes.iter().enumerate().filter(|(_, route)| {
            route.path_prefix.as_deref().is_none_or(fits_path) && route.host.as_deref().is_none_or(fits_host)
        });
        fitting
            .map(|(index, route)| ((class(route), length(route), usize::MAX - index), index))
            .max()
            .map(|(_, index)| index)
    }

    proptest! {
        #[test]
        fn another_reading_of_the_rules_finds_the_same(
            routes in prop::collection::vec(
                ("(|\\*\\.)([ab]\\.)?[abA]", "(/[ab]{1,2}){0,3}/?", any::<[bool; 2]>()), 0..8),
            host in prop::option::of("[abB](\\.[ab]){0,3}"),
            path in "(/[ab]{0,2}){1,4}|\\*",
        ) {
            let routes: Vec<Route> = routes.iter().map(|(host, prefix, [has_host, has_prefix])| {
                let mut route = route(host, prefix, "a");
                route.host = route.host.filter(|_| *has_host);
                route.path_prefix = route.path_prefix.filter(|_| *has_prefix);
                route
            }).collect();
            prop_assert!(routes.iter().all(|route| route.check().is_ok()));
            let expected = slow(&routes, host.as_deref(), &path).map(|index| &routes[index]);
            let found = find(&routes, host.as_deref(), &path);
            prop_assert!(found.map(std::ptr::from_ref) == expected.map(std::ptr::from_ref),
                "{routes:?} {host:?} {path}: {found:?}, not {expected:?}");
        }

        #[test]
        fn any_text_is_matched_without_a_panic(host in ".{0,12}", path in ".{0,12}", own in ".{0,6}", prefix in ".{0,6}") {
            find(&[route(&own, &prefix, "a")], Some(&host), &path);
        }
    }
}
