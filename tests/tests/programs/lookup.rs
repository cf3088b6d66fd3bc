//! Routes of several lengths: the programs find what the slow path finds, whichever map a route is in.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use overlay_agent::{
    datapath::{ebpf::overlay_set::EGRESS_ETHERNET, tun::Lookup},
    route::{NextHops, Subnet},
};
use overlay_ebpf::abi::{Config, NextHop, Prefix};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::rungs::{self, Kernel, is_same};

/// Configurations and sets of routes, one after the other on the same maps.
const STATES: usize = 60;
const PACKETS: usize = 60;

/// This host in 10.244.0.0/16, with a subnet of `length` bits.
fn config(length: u8) -> Config {
    let own = Prefix::new([10, 244, 255, 252], length);
    Config::new([192, 168, 77, 1], Prefix::new([10, 244, 0, 0], 16), own, 8285).with_device(1)
}

fn subnet(third: u8, fourth: u8, length: u8) -> Subnet {
    Subnet::containing(Ipv4Net::new(Ipv4Addr::new(10, 244, third, fourth), length).unwrap())
}

fn next_hop(last: u8) -> NextHop {
    let peer = [192, 168, 77, last];
    NextHop { peer, ifindex: 1, mtu: 1472, ..NextHop::default() }
}

/// Up to 40 routes in a few /24, so that they overlap; often all of one length.
fn routes(random: &mut StdRng) -> NextHops {
    let usual = [24, 26, 28][random.random_range(0..3)];
    let is_mixed = random.random_bool(0.6);
    let count = random.random_range(0..40);
    let route = |_| {
        let length = if is_mixed && random.random_bool(0.5) { random.random_range(17..=32) } else { usual };
        (subnet(random.random_range(0..4), random.random(), length), next_hop(random.random_range(2..250)))
    };
    (0..count).map(route).collect()
}

#[test]
fn programs_find_the_longest_prefix_of_any_mix_of_lengths() {
    let mut random = StdRng::seed_from_u64(4);
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &config(24), &NextHops::new());
    let mut carried = 0;
    for state in 0..STATES {
        let (config, routes) = (config([24, 26, 28][random.random_range(0..3)]), routes(&mut random));
        // Either may change first.
        let set = kernel.set();
        if random.random() {
            set.set_routes(&routes).unwrap();
            set.set_config(&config).unwrap();
        } else {
            set.set_config(&config).unwrap();
            set.set_routes(&routes).unwrap();
        }
        assert_eq!(set.routes().unwrap(), routes);
        assert_eq!(set.config().unwrap(), config);
        assert_eq!(set.check_routes().unwrap(), 0);
        let lookup = Lookup::new(&routes);
        for _ in 0..PACKETS {
            let to = [10, 244, random.random_range(0..5), random.random()];
            let packet = [&[0x45, 0, 0, 20, 0, 0, 0, 0, 64, 47, 0, 0, 10, 244, 255, 253][..], &to].concat();
            let core = rungs::core_egress(&packet, 0, &config, &lookup);
            let decided = kernel.verdict(&packet, 0).unwrap();
            assert!(
                is_same(&decided, &core),
                "state {state}, to {to:?}: {decided:?}, not {core:?}: {routes:?}"
            );
            carried += usize::from(matches!(core, crate::vectors::Verdict::Encap { .. }));
        }
    }
    assert!(carried > STATES * PACKETS / 4, "{carried} packets had a route");
}

#[test]
fn more_subnets_than_the_hash_holds_are_found_all_the_same() {
    // Room for the 256 subnets of a /16; then the host's own subnet becomes longer.
    let mut kernel = Kernel::load_for(EGRESS_ETHERNET, &config(24), &NextHops::new());
    kernel.set().set_config(&config(28)).unwrap();
    let routes: NextHops = (0..1000u32)
        .map(|number| {
            (subnet((number >> 4) as u8, (number << 4) as u8, 28), next_hop(2 + (number % 200) as u8))
        })
        .collect();
    kernel.set().set_routes(&routes).unwrap();
    assert_eq!(kernel.set().routes().unwrap(), routes);
    let lookup = Lookup::new(&routes);
    for number in (0..1000u32).step_by(37) {
        let to = [10, 244, (number >> 4) as u8, (number << 4) as u8 | 3];
        let packet = [&[0x45, 0, 0, 20, 0, 0, 0, 0, 64, 47, 0, 0, 10, 244, 255, 253][..], &to].concat();
        let core = rungs::core_egress(&packet, 0, &config(28), &lookup);
        assert_eq!(kernel.verdict(&packet, 0).unwrap(), core, "{number}");
    }
    kernel.set().set_routes(&NextHops::new()).unwrap();
    assert!(kernel.set().routes().unwrap().is_empty());
    assert_eq!(kernel.set().config().unwrap(), config(28));
}
