//! Which endpoints this node checks, and how, made of the catalog. Pure.

use std::{collections::BTreeMap, net::SocketAddrV4};

use crate::service::{
    EndpointName,
    catalog::{Endpoint, Service},
    record::{App, CheckKind, HealthCheck, Port, Protocol},
};

/// How an endpoint is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) check: HealthCheck,
    /// Where it has to answer, at least one.
    pub(super) targets: Vec<Target>,
}

/// A port of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) address: SocketAddrV4,
    /// Whether connections begin with a header of the PROXY protocol.
    pub(super) proxy_protocol: bool,
}

/// The checks of a service's endpoints on this node. The error is why there are none although the service wants them.
pub(super) fn probes(service: &Service, node: &str) -> Result<BTreeMap<EndpointName, Probe>, String> {
    let Some(check) = &service.spec.health else { return Ok(BTreeMap::new()) };
    let own: Vec<_> = service.endpoints.iter().filter(|endpoint| *endpoint.name.node == *node).collect();
    let ports = checked_ports(&service.spec.ports, check.kind);
    if ports.is_empty() && !own.is_empty() {
        return Err("its endpoints are not checked, as none of its ports is TCP: remove `health`".to_owned());
    }
    // No part of a check.
    let check = HealthCheck { slow_start_s: 0, ..check.clone() };
    let probe = |endpoint: &Endpoint| {
        let targets = ports.iter().map(|port| Target {
            address: endpoint.backend(port).address,
            proxy_protocol: port.proxy_protocol,
        });
        (endpoint.name.clone(), Probe { check: check.clone(), targets: targets.collect() })
    };
    Ok(own.into_iter().map(probe).collect())
}

/// All TCP ports; with HTTP, the first that speaks it, or else the first.
fn checked_ports(ports: &[Port], kind: CheckKind) -> Vec<&Port> {
    let tcp: Vec<&Port> = ports.iter().filter(|port| port.protocol == Protocol::Tcp).collect();
    match kind {
        CheckKind::Tcp => tcp,
        CheckKind::Http => {
            let http = tcp.iter().find(|port| port.app == App::Http);
            http.or(tcp.first()).copied().into_iter().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::health::tests::catalog;

    const ENDPOINTS: [(&str, &str); 3] = [
        ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.2","ports":{"http":9090}}"#),
        ("shop/web/a/2", r#"{"overlay_ip":"10.244.1.3","state":"draining"}"#),
        ("shop/web/b/1", r#"{"overlay_ip":"10.244.2.2"}"#),
    ];

    fn targets(health: &str, ports: &str) -> Result<Vec<String>, String> {
        let service = format!(r#"{{"v":1,{health}"ports":[{ports}]}}"#);
        let catalog = catalog(&[("shop/web", &service)], &ENDPOINTS);
        let probes = probes(catalog.services.values().next().unwrap(), "a")?;
        let text = |(name, probe): (EndpointName, Probe)| {
            let targets: Vec<_> = probe.targets.iter().map(|target| target.address.to_string()).collect();
            format!("{} {}", name.id, targets.join(" "))
        };
        Ok(probes.into_iter().map(text).collect())
    }

    const PORTS: &str = r#"{"name":"dns","port":53,"protocol":"udp"},{"name":"pg","port":5432,"target_port":5433},
        {"name":"http","port":80,"app":"http"}"#;

    #[test]
    fn the_endpoints_of_this_node_are_checked_at_their_own_ports() {
        assert_eq!(targets("", PORTS).unwrap(), <[&str; 0]>::default());
        let tcp = targets(r#""health":{"kind":"tcp"},"#, PORTS).unwrap();
        assert_eq!(tcp, ["1 10.244.1.2:5433 10.244.1.2:9090", "2 10.244.1.3:5433 10.244.1.3:80"]);
        let http = targets(r#""health":{"kind":"http"},"#, PORTS).unwrap();
        assert_eq!(http, ["1 10.244.1.2:9090", "2 10.244.1.3:80"]);
        let plain =
            targets(r#""health":{"kind":"http"},"#, r#"{"name":"x","port":8080},{"name":"y","port":1}"#);
        assert_eq!(plain.unwrap(), ["1 10.244.1.2:8080", "2 10.244.1.3:8080"]);
    }

    #[test]
    fn a_service_without_tcp_cannot_be_checked() {
        let why = targets(r#""health":{"kind":"tcp"},"#, r#"{"name":"dns","port":53,"protocol":"udp"}"#);
        assert!(why.unwrap_err().contains("none of its ports is TCP"));
    }
}
