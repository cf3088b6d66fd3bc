//! The zone of the services: its names, its lifetimes, and to which part of it a name belongs.

use std::net::Ipv4Addr;

use hickory_proto::rr::{
    Name, RData, Record,
    rdata::{PTR, SOA},
};
use ipnet::Ipv4Net;
use thiserror::Error;

/// The domain unless the configuration names another.
pub const DEFAULT_DOMAIN: &str = "overlay";
/// The label below which the services are.
const SERVICES: &str = "svc";
/// Lifetimes outside of these seconds are refused: shorter ones make each connection wait for DNS, longer ones keep clients at addresses
/// that are gone.
const TTL_RANGE: std::ops::RangeInclusive<u32> = 5..=30;
/// Longest domain in bytes, so that names of services below it fit into 255 (RFC 1035 section 2.3.4).
const LONGEST_DOMAIN: usize = 100;

/// How long clients keep answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ttl {
    /// Seconds for virtual addresses, which change rarely.
    pub virtual_address: u32,
    /// Seconds for addresses of endpoints.
    pub endpoint: u32,
    /// Seconds for the answer that there is no such name or record (the minimum of the SOA record, RFC 2308 section 4).
    pub negative: u32,
}

impl Default for Ttl {
    fn default() -> Self {
        Self { virtual_address: 30, endpoint: 5, negative: 5 }
    }
}

/// Why a zone cannot be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ZoneError {
    /// No domain name, or too long a one.
    #[error("the domain {0:?} is no domain name of at most {LONGEST_DOMAIN} bytes, for example overlay")]
    Domain(String),
    /// A lifetime outside of the permitted range, in seconds.
    #[error("a TTL of {0} s: expected 5 to 30")]
    Ttl(u32),
}

/// The names that this server answers itself. All others go to the upstream servers.
///
/// - `svc.<domain>` and all below it.
/// - `<domain>` and all below it when it has one label: no public name ends in it, and the search list makes clients ask such names.
/// - `svc` and all below it: `web.shop.svc` is short for `web.shop.svc.<domain>`. The root zone has no such domain. Single labels and
///   `name.namespace` are not answered as absolute names: namespaces such as `shop` and `dev` are public domains, too, and a service
///   must not take the place of one. They work through the search list.
/// - Reverse names of addresses of services, and all of [`Zone::with_reverse`].
#[derive(Clone, Debug)]
pub struct Zone {
    services: Name,
    domain: Name,
    owns_domain: bool,
    answers_short: bool,
    reverse: Vec<Ipv4Net>,
    ttl: Ttl,
}

/// Where a name belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At or below the services' name.
    Services {
        /// The labels before it, in lower case, as in the question.
        labels: Vec<String>,
        /// The name of the zone, for the SOA record.
        apex: Name,
    },
    /// At or below the domain, but not of services.
    Domain {
        /// Whether it is the domain itself.
        is_apex: bool,
    },
    /// The reverse name of an address.
    Reverse {
        /// Which one.
        address: Ipv4Addr,
    },
    /// A name that is neither.
    Outside,
}

impl Zone {
    /// The zone of a domain. Fails when `domain` is no domain name, or too long.
    pub fn new(domain: &str) -> Result<Self, ZoneError> {
        let error = || ZoneError::Domain(domain.chars().take(LONGEST_DOMAIN).collect());
        let is_label = |label: &str| super::super::name::label("domain", label).is_ok();
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        if domain.len() > LONGEST_DOMAIN || !domain.split('.').all(is_label) {
            return Err(error());
        }
        let domain = Name::from_ascii(format!("{domain}.")).map_err(|_| error())?;
        let services = domain.prepend_label(SERVICES.as_bytes()).map_err(|_| error())?;
        let owns_domain = domain.num_labels() == 1;
        let (answers_short, reverse, ttl) = (true, Vec::new(), Ttl::default());
        Ok(Self { services, domain, owns_domain, answers_short, reverse, ttl })
    }

    /// Answers also for reverse names of addresses in these networks that no service has: there is no such name. Others are forwarded.
    #[must_use]
    pub fn with_reverse(mut self, networks: Vec<Ipv4Net>) -> Self {
        self.reverse = networks;
        self
    }

    /// Whether names that end in `.svc` are answered. By default they are.
    #[must_use]
    pub fn with_short_names(mut self, answers: bool) -> Self {
        self.answers_short = answers;
        self
    }

    /// With other lifetimes. Fails when those of addresses are not 5 to 30 s.
    pub fn with_ttl(mut self, ttl: Ttl) -> Result<Self, ZoneError> {
        for seconds in [ttl.virtual_address, ttl.endpoint] {
            if !TTL_RANGE.contains(&seconds) {
                return Err(ZoneError::Ttl(seconds));
            }
        }
        self.ttl = ttl;
        Ok(self)
    }

    /// The lifetimes.
    pub fn ttl(&self) -> Ttl {
        self.ttl
    }

    /// The name below which the services are, `svc.<domain>`.
    pub fn services(&self) -> &Name {
        &self.services
    }

    /// The search list by which clients find `web.shop` and `web.shop.svc`, and `web` when they belong to a namespace.
    /// It works from `ndots:2` on, see [`super::resolv_conf`].
    pub fn search_list(&self, namespace: Option<&str>) -> Vec<String> {
        let plain = |name: &Name| name.to_ascii().trim_end_matches('.').to_owned();
        let own = namespace.map(|namespace| format!("{namespace}.{}", plain(&self.services)));
        own.into_iter().chain([plain(&self.services), plain(&self.domain)]).collect()
    }

    /// Where a name belongs.
    pub fn place(&self, name: &Name) -> Place {
        if let Some(labels) = below(name, &self.services) {
            return Place::Services { labels, apex: self.services.clone() };
        }
        if self.owns_domain
            && let Some(labels) = below(name, &self.domain)
        {
            return Place::Domain { is_apex: labels.is_empty() };
        }
        let last = name.iter().next_back();
        if self.answers_short && last.is_some_and(|label| label.eq_ignore_ascii_case(SERVICES.as_bytes())) {
            let apex = name.trim_to(1).to_lowercase();
            let labels = below(name, &apex).unwrap_or_default();
            return Place::Services { labels, apex };
        }
        reverse_address(name).map_or(Place::Outside, |address| Place::Reverse { address })
    }

    /// The network of [`Self::with_reverse`] that contains an address.
    pub fn reverse_network(&self, address: Ipv4Addr) -> Option<Ipv4Net> {
        self.reverse.iter().copied().find(|network| network.contains(&address))
    }

    /// The zone in which the reverse name of an address is: that of its network in whole bytes, or only the name itself.
    pub fn reverse_apex(&self, address: Ipv4Addr) -> Name {
        let prefix = self.reverse_network(address).map_or(32, |network| network.prefix_len());
        let name = reverse_name(address);
        name.trim_to(2 + usize::from(prefix / 8))
    }

    /// The domain.
    pub fn domain(&self) -> &Name {
        &self.domain
    }

    /// The SOA record of a zone, which negative answers have in their authority section. No zone can be transferred, so the serial number
    /// says nothing.
    pub fn soa(&self, apex: &Name) -> Record {
        let minimum = self.ttl.negative;
        let mailbox = apex.prepend_label(b"hostmaster".as_slice()).unwrap_or_else(|_| apex.clone());
        let soa = SOA::new(apex.clone(), mailbox, 1, 3600, 600, 86_400, minimum);
        Record::from_rdata(apex.clone(), minimum, RData::SOA(soa))
    }

    /// A name below the services' name. `None` when it is too long for DNS.
    pub fn name_of(&self, labels: &[&str]) -> Option<Name> {
        let labels = labels.iter().map(|label| label.as_bytes()).chain(self.services.iter());
        Name::from_labels(labels).ok()
    }
}

/// The labels of `name` before `apex`, in lower case; `None` when it is not at or below it.
fn below(name: &Name, apex: &Name) -> Option<Vec<String>> {
    let count = usize::from(name.num_labels()).checked_sub(usize::from(apex.num_labels()))?;
    let end = name.iter().skip(count);
    if !end.zip(apex.iter()).all(|(own, other)| own.eq_ignore_ascii_case(other)) {
        return None;
    }
    // What is no UTF-8 is no label of a service, and stays different from all.
    let text = |label: &[u8]| String::from_utf8_lossy(label).to_ascii_lowercase();
    Some(name.iter().take(count).map(text).collect())
}

/// The reverse name of an address (RFC 1035 section 3.5).
pub(super) fn reverse_name(address: Ipv4Addr) -> Name {
    Name::from(address)
}

/// The address of a reverse name.
fn reverse_address(name: &Name) -> Option<Ipv4Addr> {
    let mut labels = name.iter();
    let mut octets = [0; 4];
    if name.num_labels() != 6 {
        return None;
    }
    for octet in octets.iter_mut().rev() {
        let text = str::from_utf8(labels.next()?).ok()?;
        let is_plain =
            text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        *octet = text.parse().ok().filter(|_| is_plain)?;
    }
    let matches = |label: Option<&[u8]>, text: &str| {
        label.is_some_and(|label| label.eq_ignore_ascii_case(text.as_bytes()))
    };
    (matches(labels.next(), "in-addr") && matches(labels.next(), "arpa")).then_some(octets.into())
}

/// The data of a PTR record.
pub(super) fn pointer(target: Name) -> RData {
    RData::PTR(PTR(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    #[test]
    fn names_have_a_place() {
        let zone = Zone::new("Overlay.").unwrap();
        let labels = |text: &str| match zone.place(&name(text)) {
            Place::Services { labels, apex } => Some((labels.join("."), apex.to_ascii())),
            Place::Domain { .. } | Place::Reverse { .. } | Place::Outside => None,
        };
        assert_eq!(labels("Web.Shop.SVC.overlay."), Some(("web.shop".into(), "svc.overlay.".into())));
        assert_eq!(labels("svc.overlay."), Some((String::new(), "svc.overlay.".into())));
        assert_eq!(labels("web.shop.SVC."), Some(("web.shop".into(), "svc.".into())));
        assert_eq!(zone.place(&name("overlay.")), Place::Domain { is_apex: true });
        assert_eq!(zone.place(&name("www.example.com.overlay.")), Place::Domain { is_apex: false });
        for outside in [
            "web.shop.",
            "web.",
            ".",
            "svcoverlay.",
            "xsvc.overlay.com.",
            "in-addr.arpa.",
            "svc.example.com.",
        ] {
            assert_eq!(zone.place(&name(outside)), Place::Outside, "{outside}");
        }
        assert_eq!(
            zone.place(&name("1.2.251.10.IN-ADDR.arpa.")),
            Place::Reverse { address: Ipv4Addr::new(10, 251, 2, 1) }
        );
        for no_address in
            ["256.2.251.10.in-addr.arpa.", "01.2.251.10.in-addr.arpa.", "1.1.2.251.10.in-addr.arpa."]
        {
            assert_eq!(zone.place(&name(no_address)), Place::Outside, "{no_address}");
        }
    }

    #[test]
    fn a_public_domain_is_only_answered_below_svc() {
        let zone = Zone::new("example.com").unwrap().with_short_names(false);
        assert_eq!(zone.place(&name("www.example.com.")), Place::Outside);
        assert_eq!(zone.place(&name("web.shop.svc.")), Place::Outside);
        assert!(matches!(zone.place(&name("a.svc.example.com.")), Place::Services { .. }));
        assert_eq!(
            zone.search_list(Some("shop")),
            ["shop.svc.example.com", "svc.example.com", "example.com"]
        );
    }

    #[test]
    fn what_is_no_domain_or_ttl_is_refused() {
        for bad in ["", ".", "a..b", "a_b", "-a", &"a.".repeat(60)] {
            assert!(matches!(Zone::new(bad), Err(ZoneError::Domain(_))), "{bad}");
        }
        let zone = Zone::new("overlay").unwrap();
        let ttl = Ttl { endpoint: 4, ..Ttl::default() };
        assert_eq!(zone.clone().with_ttl(ttl).unwrap_err(), ZoneError::Ttl(4));
        assert!(zone.with_ttl(Ttl { virtual_address: 5, endpoint: 30, negative: 1 }).is_ok());
    }

    #[test]
    fn the_zone_of_a_reverse_name_is_that_of_its_network() {
        let zone = Zone::new("overlay").unwrap().with_reverse(vec!["10.251.0.0/16".parse().unwrap()]);
        assert_eq!(zone.reverse_apex(Ipv4Addr::new(10, 251, 1, 2)).to_ascii(), "251.10.in-addr.arpa.");
        assert_eq!(zone.reverse_apex(Ipv4Addr::new(10, 1, 1, 2)).to_ascii(), "2.1.1.10.in-addr.arpa.");
    }
}
