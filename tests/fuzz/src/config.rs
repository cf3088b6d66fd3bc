//! What must be true of a network config that is accepted.

use overlay_agent::{config::NetworkConfig, route::Subnet};
use serde_json::json;

use crate::lease::check_error;

/// Checks one input: a JSON text, or any other.
pub(crate) fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let config = NetworkConfig::parse(text);
    for warning in NetworkConfig::warnings(text) {
        check_error(&warning);
    }
    assert!(NetworkConfig::unknown_keys(text).len() <= text.len());
    let named = NetworkConfig::named_keys(text);
    let config = match config {
        Ok(config) => config,
        Err(error) => return check_error(&error.to_string()),
    };
    assert!(named.contains(&"Network"), "a config without a network is accepted");
    let NetworkConfig { network, subnet_len, subnet_min, subnet_max, port, ref services } = config;
    if let Some(services) = services {
        let pool = services.pool;
        assert!((8..=30).contains(&pool.prefix_len()) && pool == pool.trunc(), "{pool}");
        assert!(services.overlap([network]).is_none(), "{pool} overlaps {network}");
    }
    assert!((1..=28).contains(&network.prefix_len()) && network == network.trunc(), "{network}");
    assert!((network.prefix_len() + 2..=30).contains(&subnet_len) && port != 0);
    assert!(subnet_min <= subnet_max, "no subnet can be assigned");
    for bound in [subnet_min, subnet_max] {
        let prefix = ipnet::Ipv4Net::new(bound, subnet_len).expect("at most 30 bits");
        assert!(network.contains(&prefix) && prefix == prefix.trunc(), "{prefix} is no subnet of {network}");
        assert!(config.may_be_assigned(Subnet::containing(prefix)), "{prefix} cannot be assigned");
    }
    let written = json!({
        "Network": network, "SubnetLen": subnet_len, "SubnetMin": subnet_min, "SubnetMax": subnet_max,
        "Backend": { "Type": "udp", "Port": port },
        "Services": services.as_ref().map(|services| json!({
            "Pool": services.pool, "Domain": services.domain, "LoadBalancing": services.load_balancing,
        })),
    });
    assert_eq!(NetworkConfig::parse(&written.to_string()), Ok(config), "its effective values are a config");
    assert!(NetworkConfig::of_network(network).is_ok(), "the defaults of {network}");
}
