//! Which connected UDP sockets stay connected. Pure.

use std::collections::{BTreeMap, BTreeSet};

use overlay_ebpf::service::abi::Address;

use crate::service::{
    Catalog,
    front::{Rules, abi_address, front, ports},
    record::{EndpointState, Protocol},
};

/// For each UDP port of a virtual address, the endpoints whose sockets stay: those that take connections, and those that are neither down
/// nor removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept(BTreeMap<Address, BTreeSet<Address>>);

impl Kept {
    pub(super) fn new(catalog: &Catalog, rules: &Rules) -> Self {
        let udp = ports(catalog, rules).filter(|(_, _, port)| port.protocol == Protocol::Udp);
        let kept = udp.map(|(key, service, port)| {
            let up = service.endpoints.iter().filter(|endpoint| endpoint.spec.state != EndpointState::Down);
            let up = up.map(|endpoint| endpoint.backend(port));
            let endpoints = up.chain(front(service, port, rules).backends);
            (key.address, endpoints.map(|backend| abi_address(backend.address)).collect())
        });
        Self(kept.collect())
    }

    /// Whether a socket stays that connected to `from` and was sent to `to`.
    pub(super) fn has(&self, from: Address, to: Address) -> bool {
        self.0.get(&from).is_some_and(|endpoints| endpoints.contains(&to))
    }

    /// Whether an endpoint is there that `next` lacks.
    pub(super) fn loses_by(&self, next: &Self) -> bool {
        self.0.iter().any(|(from, endpoints)| match next.0.get(from) {
            Some(next) => !endpoints.is_subset(next),
            None => !endpoints.is_empty(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::catalog::tests::records;

    const PORTS: &str = r#"{"v":1,"ports":[{"name":"dns","port":53,"protocol":"udp","target_port":5353},
        {"name":"web","port":80,"protocol":"tcp"}]}"#;

    /// Endpoint `n` has the address `10.244.1.n` and this state.
    fn kept(states: &[(u8, &str)]) -> Kept {
        let endpoints: Vec<_> = states
            .iter()
            .map(|(number, state)| {
                let value = format!(r#"{{"overlay_ip":"10.244.1.{number}","state":"{state}"}}"#);
                (format!("shop/web/a/{number}"), value)
            })
            .collect();
        let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let services = [("shop/web", PORTS)];
        let vips = [("10.251.0.1", "shop/web")];
        let catalog =
            Catalog::new(&records(&services), &records(&vips), &records(&endpoints), &Catalog::default());
        Kept::new(&catalog, &Rules::default())
    }

    fn has(kept: &Kept, number: u8) -> bool {
        let at = |ip: [u8; 4], port: u16| Address { ip, port: port.to_be_bytes() };
        assert!(!kept.has(at([10, 251, 0, 1], 80), at([10, 244, 1, number], 80)), "TCP");
        assert!(!kept.has(at([10, 251, 0, 2], 53), at([10, 244, 1, number], 5353)), "another service");
        kept.has(at([10, 251, 0, 1], 53), at([10, 244, 1, number], 5353))
    }

    #[test]
    fn draining_endpoints_keep_sockets_and_those_that_are_down_do_only_if_there_is_no_other() {
        let some = kept(&[(1, "ready"), (2, "draining"), (3, "down")]);
        assert_eq!([1, 2, 3, 4].map(|number| has(&some, number)), [true, true, false, false]);
        let all_down = kept(&[(1, "down"), (2, "down")]);
        assert_eq!([1, 2].map(|number| has(&all_down, number)), [true, true]);
        let draining = kept(&[(1, "down"), (2, "draining")]);
        assert_eq!(
            [1, 2].map(|number| has(&draining, number)),
            [true, true],
            "a draining one does not serve"
        );
    }

    #[test]
    fn only_what_leaves_is_a_loss() {
        let two = kept(&[(1, "ready"), (2, "ready")]);
        assert!(!Kept::default().loses_by(&two) && !two.loses_by(&two));
        assert!(!two.loses_by(&kept(&[(1, "ready"), (2, "draining"), (3, "ready")])));
        assert!(two.loses_by(&kept(&[(1, "ready"), (3, "ready")])));
        assert!(two.loses_by(&kept(&[(1, "ready"), (2, "down")])));
        assert!(two.loses_by(&Kept::default()));
        assert!(!kept(&[]).loses_by(&Kept::default()), "a service without endpoints");
    }
}
