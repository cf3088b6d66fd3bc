//! How much work a packet costs, in numbers that do not depend on the machine: lookups, bytes of the packet that are looked at, and
//! calls of helpers that look up, copy or move something.

use std::{cell::Cell, collections::BTreeMap};

use bytemuck::Pod;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};
use overlay_agent::datapath::tun::Lookup;
use overlay_ebpf::{
    abi::{Config, Endpoint, NextHop, UnderlayValue},
    bypass::{self, Endpoints},
    egress, ingress,
    route::Routes,
    wire::{Bytes, Ethernet, Ipv4},
};

use crate::{
    rungs::{MAC, object},
    vectors::File,
};

/// What the egress program makes directly readable of an inner packet without IP options: addresses, ports, TCP's data offset and
/// flags, and the checksum. More would make the kernel rearrange the buffers of packets that are nothing but headers in front.
const EGRESS_BYTES: usize = 38;
/// What the ingress program makes readable of a frame: Ethernet, outer and inner headers, and the type of an ICMP message.
const INGRESS_BYTES: usize = 64;

/// A packet that remembers how far it was read.
struct Watched<'a> {
    bytes: &'a [u8],
    end: Cell<usize>,
}

impl Bytes for Watched<'_> {
    fn view<T: Pod>(&self, offset: usize) -> Option<&T> {
        let view = self.bytes.view::<T>(offset);
        if view.is_some() {
            self.end.set(self.end.get().max(offset + size_of::<T>()));
        }
        view
    }
}

/// Tables that count lookups.
struct Counted<T> {
    table: T,
    lookups: Cell<u32>,
}

impl<T> Counted<T> {
    fn new(table: T) -> Self {
        Self { table, lookups: Cell::new(0) }
    }

    fn count(&self) -> &T {
        self.lookups.set(self.lookups.get() + 1);
        &self.table
    }
}

impl Routes for Counted<&Lookup> {
    fn next_hop(&self, address: [u8; 4]) -> Option<NextHop> {
        self.count().next_hop(address)
    }
}

impl Endpoints for Counted<Endpoint> {
    fn endpoint(&self, _address: [u8; 4]) -> Option<Endpoint> {
        Some(*self.count())
    }
}

/// Lookups and bytes read of each vector whose IPv4 headers, at these `offsets`, have no options.
fn work(
    file: &str,
    offsets: &[usize],
    decide: impl Fn(&Watched<'_>, usize, &Config, &Counted<&Lookup>),
) -> Vec<(String, u32, usize)> {
    let file = File::read(file);
    let (config, routes) = (file.config(), Lookup::new(&file.routes()));
    let has_options = |packet: &[u8], offset: &usize| packet.get(*offset).is_some_and(|first| first & 15 > 5);
    let is_plain = |packet: &[u8]| !offsets.iter().any(|offset| has_options(packet, offset));
    let vectors = file.vectors.iter().filter(|vector| is_plain(&vector.packet));
    vectors
        .map(|vector| {
            let packet = Watched { bytes: &vector.packet, end: Cell::new(0) };
            let routes = Counted::new(&routes);
            decide(&packet, vector.gso_size, &config, &routes);
            (vector.name.clone(), routes.lookups.get(), packet.end.get())
        })
        .collect()
}

fn assert_at_most(work: &[(String, u32, usize)], lookups: u32, bytes: usize) {
    for (name, looked_up, read) in work {
        assert!(*looked_up <= lookups && *read <= bytes, "{name}: {looked_up} lookups, {read} bytes read");
    }
    let most = work.iter().map(|(_, looked_up, read)| (*looked_up, *read)).max();
    assert_eq!(most.map(|(looked_up, _)| looked_up), Some(lookups), "no vector needs a lookup");
}

#[test]
fn a_packet_costs_one_lookup_and_its_headers() {
    let egress = work("egress.json", &[0], |packet, gso_size, config, routes| {
        egress::decide(packet, 0, packet.bytes.len(), gso_size, config, routes);
    });
    assert_at_most(&egress, 1, EGRESS_BYTES);
    let ingress =
        work("ingress.json", &[Ethernet::LEN, ingress::INNER_OFFSET], |frame, _, config, routes| {
            let device = || Some((UnderlayValue::new(MAC, true), 1));
            ingress::decide(frame, frame.bytes.len(), device, config, routes);
        });
    assert_at_most(&ingress, 1, INGRESS_BYTES);
}

#[test]
fn the_bypass_costs_one_lookup_more() {
    let file = File::read("egress.json");
    let config = file.config();
    let (source, destination) = ([10, 244, 1, 2], [10, 244, 2, 2]);
    let endpoint = Endpoint { ifindex: 5, mac: [2; 6], gateway_mac: [4; 6], flags: 0 };
    let endpoints = Counted::new(endpoint);
    let leaving = Ipv4::new(0, 84, 0, 64, 17, source, destination);
    let frame = Ethernet::ipv4(endpoint.gateway_mac, endpoint.mac);
    assert!(bypass::leaves_container(&frame, &leaving, 5, &config, &endpoints));
    assert_eq!(endpoints.lookups.take(), 1);
    let entering = Ipv4::new(0, 84, 0, 64, 17, destination, source);
    assert_eq!(bypass::enters_container(&entering, &endpoints), Some(endpoint));
    assert_eq!(endpoints.lookups.take(), 1);
    let expired = Ipv4::new(0, 84, 0, 1, 17, destination, source);
    assert_eq!(bypass::enters_container(&expired, &endpoints), None);
    assert_eq!(endpoints.lookups.take(), 0);
}

/// Helpers (linux/bpf.h) that look up or write a map entry or a socket's storage, and those that copy or move bytes of a packet.
const WATCHED_HELPERS: [(i32, &str); 16] = [
    (1, "map_lookup_elem"),
    (2, "map_update_elem"),
    (3, "map_delete_elem"),
    (9, "skb_store_bytes"),
    (26, "skb_load_bytes"),
    (31, "skb_change_proto"),
    (38, "skb_change_tail"),
    (39, "skb_pull_data"),
    (43, "skb_change_head"),
    (44, "xdp_adjust_head"),
    (50, "skb_adjust_room"),
    (54, "xdp_adjust_meta"),
    (65, "xdp_adjust_tail"),
    (107, "sk_storage_get"),
    (189, "xdp_load_bytes"),
    (190, "xdp_store_bytes"),
];

/// How often the text of each program of an object, whose names begin with `prefix`, has a call of a watched helper; subprograms count
/// as `shared`.
fn calls(object: &[u8], prefix: &str) -> BTreeMap<String, BTreeMap<&'static str, usize>> {
    let file = object::File::parse(object).unwrap();
    let mut calls: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        let text = section.data_range(symbol.address(), symbol.size()).unwrap().unwrap();
        let name = symbol.name().unwrap();
        let program = if name.starts_with(prefix) { name } else { "shared" };
        let counts = calls.entry(program.to_owned()).or_default();
        // RFC 9669: an opcode, registers, an offset and an immediate value; `call` of a helper has source register 0.
        for instruction in text.as_chunks::<8>().0 {
            let [0x85, registers, _, _, id @ ..] = instruction else { continue };
            let id = i32::from_le_bytes(*id);
            let helper = WATCHED_HELPERS.iter().find(|(watched, _)| *watched == id && registers >> 4 == 0);
            if let Some((_, helper)) = helper {
                *counts.entry(helper).or_default() += 1;
            }
        }
    }
    calls
}

#[test]
fn programs_call_no_more_helpers() {
    // On all paths together; a packet takes one of them.
    let limits: [(&str, &[(&str, usize)]); 8] = [
        (
            "ovl_egress",
            &[
                ("map_lookup_elem", 23),
                ("map_update_elem", 1),
                ("skb_adjust_room", 1),
                ("skb_change_head", 1),
                ("skb_pull_data", 2),
            ],
        ),
        (
            "ovl_egress_ethernet",
            &[("map_lookup_elem", 21), ("map_update_elem", 1), ("skb_adjust_room", 1), ("skb_pull_data", 2)],
        ),
        (
            "ovl_from_local",
            &[("map_lookup_elem", 14), ("map_update_elem", 1), ("skb_adjust_room", 1), ("skb_pull_data", 1)],
        ),
        (
            "ovl_ingress",
            &[("map_lookup_elem", 27), ("map_update_elem", 2), ("skb_adjust_room", 1), ("skb_pull_data", 3)],
        ),
        ("ovl_heartbeat", &[("map_lookup_elem", 1)]),
        ("ovl_to_local", &[("map_lookup_elem", 3), ("map_update_elem", 1), ("skb_pull_data", 1)]),
        ("ovl_xdp", &[("map_lookup_elem", 18), ("xdp_adjust_head", 2), ("xdp_adjust_meta", 1)]),
        ("shared", &[]),
    ];
    assert_calls(&calls(&object(), "ovl_"), &limits);
}

#[test]
fn programs_of_services_call_no_more_helpers() {
    let path = std::env::var("OVERLAY_EBPF_OBJECT").unwrap();
    let object = std::fs::read(std::path::Path::new(&path).with_file_name("service-ebpf")).unwrap();
    // On all paths together. A connection is counted in two maps, those of its port and of its endpoint.
    let connect: &[_] =
        &[("map_delete_elem", 1), ("map_lookup_elem", 18), ("map_update_elem", 2), ("sk_storage_get", 2)];
    let send: &[_] = &[("map_lookup_elem", 19), ("map_update_elem", 1), ("sk_storage_get", 2)];
    let release: &[_] = &[("map_delete_elem", 1), ("map_lookup_elem", 19), ("sk_storage_get", 2)];
    let limits: [(&str, &[(&str, usize)]); 11] = [
        ("svc_connect4", connect),
        ("svc_connect6", connect),
        ("svc_outcomes", &[("map_lookup_elem", 4), ("sk_storage_get", 3)]),
        ("svc_peername4", &[("sk_storage_get", 1)]),
        ("svc_peername6", &[("sk_storage_get", 1)]),
        ("svc_recvmsg4", &[("sk_storage_get", 2)]),
        ("svc_recvmsg6", &[("sk_storage_get", 2)]),
        ("svc_release", release),
        ("svc_sendmsg4", send),
        ("svc_sendmsg6", send),
        ("shared", &[]),
    ];
    assert_calls(&calls(&object, "svc_"), &limits);
}

fn assert_calls(
    calls: &BTreeMap<String, BTreeMap<&'static str, usize>>,
    limits: &[(&str, &[(&str, usize)])],
) {
    println!("{calls:#?}");
    assert_eq!(calls.len(), limits.len(), "a program without limits");
    for (program, limits) in limits {
        for (helper, count) in &calls[*program] {
            let limit = limits.iter().find(|(name, _)| name == helper).map_or(0, |(_, limit)| *limit);
            assert!(*count <= limit, "{program} has {count} calls of {helper}, {limit} are allowed");
        }
        assert!(calls[*program].len() == limits.len(), "{program} lost calls: lower its limits");
    }
}
