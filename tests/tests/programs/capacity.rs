//! More routes than the kernel's map holds.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use overlay_agent::{
    datapath::ebpf::{LoadOptions, OverlaySet},
    route::{NextHops, RouteChange, Subnet},
};
use overlay_ebpf::abi::{Config, DEFAULT_ROUTES, NextHop, Prefix};

use crate::rungs::object;

const PEER: NextHop =
    NextHop { peer: [192, 168, 77, 2], ifindex: 2, mtu: 1472, flags: 0, mac: [0; 6], source_mac: [0; 6] };
const OTHER: NextHop =
    NextHop { peer: [192, 168, 77, 3], ifindex: 3, mtu: 1372, flags: NextHop::FINISHED_ONLY, ..PEER };

fn subnet(number: u32) -> Subnet {
    let base = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (number << 2));
    Subnet::containing(Ipv4Net::new(base, 30).unwrap())
}

/// A host of 10.0.0.0 with `network` bits and subnets of `length` bits.
fn config(network: u8, length: u8) -> Config {
    let own = Prefix::new([10, 255, 255, 252], length);
    Config::new([192, 168, 77, 1], Prefix::new([10, 0, 0, 0], network), own, 8285)
}

#[test]
fn a_large_network_has_room_for_all_of_its_subnets() {
    let config = config(8, 30);
    let mut programs = OverlaySet::load_for(&object(), LoadOptions::default(), &config, None).unwrap();
    programs.set_config(&config).unwrap();
    let routes: NextHops = (0..200_000).map(|number| (subnet(number), PEER)).collect();
    let start = std::time::Instant::now();
    programs.set_routes(&routes).unwrap();
    println!("wrote {} routes in {:?}", routes.len(), start.elapsed());
    assert_eq!(programs.check_routes().unwrap(), 0);
    assert_eq!(programs.routes().unwrap(), routes);
    assert_eq!(programs.config().unwrap(), config);
}

#[test]
fn a_full_route_map_says_so_and_still_follows_what_it_holds() {
    // The hash takes the subnets of 30 bits, or the trie all of them.
    for length in [30, 24] {
        fill(&config(14, length));
    }
}

fn fill(config: &Config) {
    let mut programs = OverlaySet::load_for(&object(), LoadOptions::default(), config, None).unwrap();
    programs.set_config(config).unwrap();
    let mut routes: NextHops = (0..DEFAULT_ROUTES).map(|number| (subnet(number), PEER)).collect();
    programs.set_routes(&routes).unwrap();

    let too_many =
        [RouteChange::set(subnet(DEFAULT_ROUTES), PEER), RouteChange::Remove(subnet(DEFAULT_ROUTES + 1))];
    let error = programs.apply_routes(&too_many).unwrap_err().to_string();
    assert!(error.contains("65536") && error.contains("1 more"), "{error}");
    assert_eq!(programs.routes().unwrap(), routes);

    // One is removed, so another one that stands before it in the list has room.
    let exchange = [RouteChange::set(subnet(DEFAULT_ROUTES), OTHER), RouteChange::Remove(subnet(7))];
    programs.apply_routes(&exchange).unwrap();
    routes.remove(&subnet(7));
    routes.insert(subnet(DEFAULT_ROUTES), OTHER);
    assert_eq!(programs.routes().unwrap(), routes);

    // Of too many, those that fit are there.
    routes.insert(subnet(7), PEER);
    assert!(programs.set_routes(&routes).is_err());
    routes.remove(&subnet(7));
    assert_eq!(programs.routes().unwrap(), routes);

    let start = std::time::Instant::now();
    assert_eq!(programs.check_routes().unwrap(), 0);
    println!("read {} routes back in {:?}", routes.len(), start.elapsed());
}
