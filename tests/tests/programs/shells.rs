//! What the programs decide without the packet core, and which no vector shows.

use std::{
    thread,
    time::{Duration, Instant},
};

use overlay_agent::datapath::ebpf::overlay_set::{EGRESS_ETHERNET, INGRESS};
use overlay_ebpf::{
    abi::NextHop,
    reason::{DropReason, PuntReason},
};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use crate::{
    rungs::Kernel,
    vectors::{File, Vector, Verdict},
};

const UDP: u8 = 17;

/// More than the programs hand to the slow path in a tenth of a second, by far.
const FLOOD: usize = 5000;
/// What they hand over of a flood at least.
const TOLD: usize = 100;
/// Ample time for the next packet to be told.
const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn segmented_datagrams_are_left_to_the_slow_path() {
    let file = File::read("ingress.json");
    let mut kernel = Kernel::load(INGRESS, &file.config(), &file.routes());
    let is_datagram = |vector: &&Vector| matches!(&vector.fast, Verdict::Decap { bytes } if bytes[9] == UDP);
    let mut datagrams = 0;
    for Vector { name, packet, .. } in file.vectors.iter().filter(is_datagram) {
        let verdict = kernel.verdict(packet, 100);
        datagrams += usize::from(verdict.is_some());
        let segmented = Verdict::punted(PuntReason::SegmentedDatagrams);
        assert!(verdict.is_none_or(|verdict| verdict == segmented), "{name}");
    }
    assert!(datagrams > 5, "{datagrams} vectors are datagrams");
}

#[test]
fn subnets_of_30_bits_are_found() {
    let file = File::read("egress.json");
    let next_hop = |last| NextHop { peer: [192, 168, 77, last], ifindex: 1, mtu: 1472, ..NextHop::default() };
    let routes = [("10.244.9.0/24", 2), ("10.244.9.4/30", 3), ("10.244.9.8/30", 4)];
    let routes = routes.map(|(subnet, last)| (subnet.parse().unwrap(), next_hop(last))).into();
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &file.config(), &routes);
    for (address, peer) in [(3, 2), (4, 3), (7, 3), (8, 4), (11, 4), (12, 2)] {
        let packet = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 47, 0, 0, 10, 244, 1, 2, 10, 244, 9, address];
        let verdict = kernel.verdict(&packet, 0);
        let outer_destination = [192, 168, 77, peer];
        let is_right =
            matches!(&verdict, Some(Verdict::Encap { bytes }) if bytes[16..20] == outer_destination);
        assert!(is_right, "10.244.9.{address}: {verdict:?}");
    }
}

#[test]
fn the_link_layer_header_is_the_next_hops_or_left_to_the_kernel() {
    let file = File::read("egress.json");
    let (mac, source_mac) = ([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 9]);
    let unresolved = NextHop { peer: [192, 168, 77, 2], ifindex: 1, mtu: 1472, ..NextHop::default() };
    let resolved = unresolved.resolved(mac, source_mac);
    let packet = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 47, 0, 0, 10, 244, 1, 2, 10, 244, 9, 3];
    let outer = [unresolved, resolved].map(|next_hop| {
        // Of the usual length, and of another: the latter is in the other map.
        ["10.244.9.0/24", "10.244.8.0/23"].map(|subnet| {
            let routes = [(subnet.parse().unwrap(), next_hop)].into();
            Kernel::load(EGRESS_ETHERNET, &file.config(), &routes).redirected(&packet)
        })
    });
    let headers = outer.clone().map(|frames| frames.map(|frame| frame[..14].to_vec()));
    let expected =
        [vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0], vec![2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 9, 8, 0]];
    assert_eq!(headers, expected.map(|header| [header.clone(), header]));
    let rest: Vec<_> = outer.iter().flatten().map(|frame| &frame[14..]).collect();
    assert!(rest.iter().all(|bytes| bytes == &rest[0]), "the packets behind it differ");
}

#[test]
fn few_rejected_packets_of_a_flood_are_told_and_later_ones_again() {
    // Each CPU has its own limit.
    let mut one = CpuSet::new();
    one.set(sched_getcpu());
    sched_setaffinity(None, &one).unwrap();
    let file = File::read("egress.json");
    let mut kernel = Kernel::load(EGRESS_ETHERNET, &file.config(), &file.routes());
    let rejected = Verdict::punted(PuntReason::Rejected);
    let is_rejected =
        |vector: &&Vector| vector.fast == rejected && vector.slow == Verdict::dropped(DropReason::NoRoute);
    let packet = &file.vectors.iter().find(is_rejected).unwrap().packet;
    let mut verdict = || kernel.verdict(packet, 0).unwrap();

    let verdicts: Vec<_> = (0..FLOOD).map(|_| verdict()).collect();
    let count = |wanted: &Verdict| verdicts.iter().filter(|verdict| *verdict == wanted).count();
    let (told, dropped) = (count(&rejected), count(&Verdict::dropped(DropReason::NoRoute)));
    assert!(told >= TOLD && dropped > 0 && told + dropped == FLOOD, "{told} told, {dropped} dropped");

    let start = Instant::now();
    while verdict() != rejected {
        assert!(start.elapsed() < TIMEOUT, "no packet is told after a flood");
        thread::sleep(Duration::from_millis(20));
    }
}
