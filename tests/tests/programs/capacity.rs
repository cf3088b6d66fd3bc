//! More routes than the kernel's map holds.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use overlay_agent::{
    datapath::ebpf::{Hook, Programs},
    route_table::Change,
};
use overlay_ebpf::abi::MAX_ROUTES;

const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 3);

fn subnet(number: u32) -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (number << 2)), 30).unwrap()
}

#[test]
fn a_full_route_map_says_so_and_still_follows_what_it_holds() {
    let object = std::env::var("OVERLAY_EBPF_OBJECT")
        .expect("OVERLAY_EBPF_OBJECT names the eBPF object: run the tests with `cargo xtask test`");
    let mut programs = Programs::load(&std::fs::read(object).unwrap(), &[Hook::Egress], 0).unwrap();
    let mut routes: BTreeMap<_, _> = (0..MAX_ROUTES).map(|number| (subnet(number), PEER)).collect();
    programs.set_routes(&routes).unwrap();

    let too_many = [Change::Set(subnet(MAX_ROUTES), PEER), Change::Remove(subnet(MAX_ROUTES + 1))];
    let error = programs.change_routes(&too_many).unwrap_err().to_string();
    assert!(error.contains("65536") && error.contains("1 more"), "{error}");
    assert_eq!(programs.routes().unwrap(), routes);

    // One goes, another one that was told of before it comes in its place.
    let exchange = [Change::Set(subnet(MAX_ROUTES), OTHER), Change::Remove(subnet(7))];
    programs.change_routes(&exchange).unwrap();
    routes.remove(&subnet(7));
    routes.insert(subnet(MAX_ROUTES), OTHER);
    assert_eq!(programs.routes().unwrap(), routes);

    // What fits of too many is there.
    routes.insert(subnet(7), PEER);
    assert!(programs.set_routes(&routes).is_err());
    routes.remove(&subnet(7));
    assert_eq!(programs.routes().unwrap(), routes);
}
