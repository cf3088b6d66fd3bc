//! More routes than the kernel's map holds.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use overlay_agent::{
    datapath::ebpf::{LoadOptions, OverlaySet},
    route::{NextHops, RouteChange, Subnet},
};
use overlay_ebpf::abi::{MAX_ROUTES, NextHop};

use crate::rungs::object;

const PEER: NextHop = NextHop { peer: [192, 168, 77, 2], ifindex: 2, mtu: 1472, flags: 0 };
const OTHER: NextHop =
    NextHop { peer: [192, 168, 77, 3], ifindex: 3, mtu: 1372, flags: NextHop::FINISHED_ONLY };

fn subnet(number: u32) -> Subnet {
    let base = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (number << 2));
    Subnet::containing(Ipv4Net::new(base, 30).unwrap())
}

#[test]
fn a_full_route_map_says_so_and_still_follows_what_it_holds() {
    let mut programs = OverlaySet::load(&object(), LoadOptions::default()).unwrap();
    let mut routes: NextHops = (0..MAX_ROUTES).map(|number| (subnet(number), PEER)).collect();
    programs.set_routes(&routes).unwrap();

    let too_many = [RouteChange::set(subnet(MAX_ROUTES), PEER), RouteChange::Remove(subnet(MAX_ROUTES + 1))];
    let error = programs.apply_routes(&too_many).unwrap_err().to_string();
    assert!(error.contains("65536") && error.contains("1 more"), "{error}");
    assert_eq!(programs.routes().unwrap(), routes);

    // One is removed, so another one that stands before it in the list has room.
    let exchange = [RouteChange::set(subnet(MAX_ROUTES), OTHER), RouteChange::Remove(subnet(7))];
    programs.apply_routes(&exchange).unwrap();
    routes.remove(&subnet(7));
    routes.insert(subnet(MAX_ROUTES), OTHER);
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
