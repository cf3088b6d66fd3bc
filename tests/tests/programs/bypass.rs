//! The programs of the bypass, on packets between a container and a peer.

use overlay_agent::datapath::ebpf::{
    Hook, LoadOptions, Metadata, Outcome, OverlaySet,
    overlay_set::{EGRESS_ETHERNET, FROM_LOCAL, INGRESS, TO_LOCAL},
    self_test::TC_ACT_REDIRECT,
};
use overlay_ebpf::{
    abi::{Config, Endpoint, NextHop, Prefix, UnderlayValue},
    bypass::Bypass,
    wire::{Ethernet, Ipv4, OVERHEAD},
};
use tokio::runtime::Runtime;

use crate::rungs::{TC_ACT_UNSPEC, object};

/// The device of a test run: the loopback device.
const DEVICE: u32 = 1;
const OVERLAY: u32 = 77;
const CONTAINER: [u8; 4] = [10, 244, 1, 2];
const REMOTE: [u8; 4] = [10, 244, 2, 2];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OWN: [u8; 4] = [192, 168, 77, 1];
const PEER: [u8; 4] = [192, 168, 77, 2];
const ACK: u8 = 0x10;
const SYN: u8 = 2;

/// Loaded programs of a host with one container and one peer.
struct Host {
    set: OverlaySet,
    /// Answers the programs' questions.
    _runtime: Runtime,
}

impl Host {
    fn new(bypass: Bypass) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let guard = runtime.enter();
        let mut set = OverlaySet::load(&object(), LoadOptions { bypass, log: false }).unwrap();
        drop(guard);
        set.show_alive().unwrap();
        let own = Prefix::new([10, 244, 1, 0], 24);
        let config = Config::new(OWN, Prefix::new([10, 244, 0, 0], 16), own, 8285).with_device(OVERLAY);
        set.set_config(&config).unwrap();
        set.set_underlays(&[(DEVICE, UnderlayValue::new([0; 6], true))].into()).unwrap();
        let next_hop = NextHop { peer: PEER, ifindex: DEVICE, mtu: 1472, ..NextHop::default() };
        set.set_routes(&[("10.244.2.0/24".parse().unwrap(), next_hop)].into()).unwrap();
        let endpoint = Endpoint { ifindex: DEVICE, mac: MAC, gateway_mac: GATEWAY, flags: 0 };
        assert_eq!(set.set_endpoints(&[(CONTAINER.into(), endpoint)].into()).unwrap(), 0);
        assert_eq!(set.endpoints().unwrap().len(), 1);
        for hook in [FROM_LOCAL, TO_LOCAL, EGRESS_ETHERNET, INGRESS] {
            set.programs.load_program(hook).unwrap();
        }
        Self { set, _runtime: runtime }
    }

    fn run(&mut self, hook: Hook, frame: &[u8], ingress_ifindex: u32) -> Outcome {
        self.set.programs.test_run_with(hook, frame, Metadata { gso_size: 0, ingress_ifindex }).unwrap()
    }

    /// Whether a frame of the container leaves at once.
    fn leaves(&mut self, frame: &[u8]) -> bool {
        let outcome = self.run(FROM_LOCAL, frame, 0);
        match outcome.action {
            TC_ACT_REDIRECT => true,
            TC_ACT_UNSPEC => {
                assert_eq!(outcome.packet, frame);
                false
            }
            action => panic!("action {action}"),
        }
    }

    /// Whether an outer packet enters the container at once.
    fn enters(&mut self, outer: &[u8]) -> bool {
        let outcome = self.run(INGRESS, outer, 0);
        assert_eq!(outcome.action, TC_ACT_REDIRECT);
        outcome.packet[..6] == MAC
    }

    fn bypassed(&self) -> (u64, u64) {
        let counters = self.set.counters().unwrap();
        (counters.egress_bypass_packets, counters.ingress_bypass_packets)
    }
}

/// A TCP or UDP packet with ports 4660 and 80, and a right header checksum.
fn packet(ttl: u8, protocol: u8, flags: u8, [source, destination]: [[u8; 4]; 2]) -> Vec<u8> {
    let header = Ipv4::new(0, 60, 0, ttl, protocol, source, destination);
    let mut packet = bytemuck::bytes_of(&header).to_vec();
    packet.extend([0x12, 0x34, 0, 80]);
    packet.resize(60, 0x5a);
    packet[33] = flags;
    packet
}

fn frame(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    [bytemuck::bytes_of(&Ethernet::ipv4(destination, source)), packet].concat()
}

/// A frame of the container for the peer.
fn leaving(protocol: u8, flags: u8) -> Vec<u8> {
    frame(GATEWAY, MAC, &packet(64, protocol, flags, [CONTAINER, REMOTE]))
}

/// An outer packet of the peer for the container, as another host with the same programs makes it.
fn arriving(ttl: u8, protocol: u8, flags: u8) -> Vec<u8> {
    let mut peer = Host::new(Bypass::Off);
    let own = Prefix::new([10, 244, 2, 0], 24);
    peer.set.set_config(&Config::new(PEER, Prefix::new([10, 244, 0, 0], 16), own, 8285)).unwrap();
    let next_hop = NextHop { peer: OWN, ifindex: DEVICE, mtu: 1472, ..NextHop::default() };
    peer.set.set_routes(&[("10.244.1.0/24".parse().unwrap(), next_hop)].into()).unwrap();
    let inner = packet(ttl, protocol, flags, [REMOTE, CONTAINER]);
    let outer = peer.run(EGRESS_ETHERNET, &frame([0; 6], [0; 6], &inner), 0);
    assert_eq!(outer.action, TC_ACT_REDIRECT);
    outer.packet
}

#[test]
fn a_packet_that_skips_the_stack_is_as_the_stack_would_have_made_it() {
    let mut host = Host::new(Bypass::All);
    let sent = leaving(17, 0);
    let outcome = host.run(FROM_LOCAL, &sent, 0);
    assert_eq!(outcome.action, TC_ACT_REDIRECT);
    // What the stack forwards has one hop less; the program behind it encapsulates that.
    let forwarded = frame([0; 6], [0; 6], &packet(63, 17, 0, [CONTAINER, REMOTE]));
    let expected = host.run(EGRESS_ETHERNET, &forwarded, DEVICE);
    assert_eq!(outcome.packet, expected.packet);
    assert_eq!(outcome.packet.len(), sent.len() + OVERHEAD);

    let outcome = host.run(INGRESS, &arriving(64, 17, 0), 0);
    // One hop on the other host, two on this one.
    let expected = frame(MAC, GATEWAY, &packet(61, 17, 0, [REMOTE, CONTAINER]));
    assert_eq!((outcome.action, outcome.packet), (TC_ACT_REDIRECT, expected));
    assert_eq!(host.bypassed(), (1, 1));
}

#[test]
fn what_the_bypass_does_not_know_takes_the_stack() {
    let mut host = Host::new(Bypass::All);
    let spoofed = frame(GATEWAY, MAC, &packet(64, 17, 0, [[10, 244, 1, 3], REMOTE]));
    let foreign = frame(GATEWAY, GATEWAY, &packet(64, 17, 0, [CONTAINER, REMOTE]));
    let unrouted = frame(GATEWAY, MAC, &packet(64, 17, 0, [CONTAINER, [10, 244, 9, 9]]));
    let dying = frame(GATEWAY, MAC, &packet(2, 17, 0, [CONTAINER, REMOTE]));
    let mut long = leaving(17, 0);
    long.resize(Ethernet::LEN + 1500, 0);
    long[16..18].copy_from_slice(&1500_u16.to_be_bytes());
    let mut padded = leaving(17, 0);
    padded.push(0);
    for frame in [&spoofed, &foreign, &unrouted, &dying, &long, &padded, &leaving(17, 0)[..34].to_vec()] {
        assert!(!host.leaves(frame), "{frame:02x?}");
    }
    assert!(host.leaves(&leaving(17, 0)));
    assert!(!host.enters(&arriving(3, 17, 0)), "its TTL ends at this host");
    assert!(host.enters(&arriving(4, 17, 0)));
    host.set.set_endpoints(&[].into()).unwrap();
    assert!(!host.enters(&arriving(64, 17, 0)) && !host.leaves(&leaving(17, 0)), "the container is gone");
    assert_eq!(host.bypassed(), (1, 1));
    // Nothing that the stack decides about is counted here.
    let counters = host.set.counters().unwrap();
    assert_eq!((counters.egress_packets, counters.drops.iter().sum::<u64>()), (1, 0));
}

#[test]
fn a_flow_that_leaves_skips_the_stack_once_the_stack_has_let_it_through() {
    let mut host = Host::new(Bypass::Flows);
    let udp = leaving(17, 0);
    assert!(!host.leaves(&udp) && !host.leaves(&udp), "nothing is known about it");
    // Masqueraded, or to another destination: that is another flow.
    for addresses in [[[10, 244, 1, 0], REMOTE], [CONTAINER, [10, 244, 2, 9]]] {
        host.run(EGRESS_ETHERNET, &frame([0; 6], [0; 6], &packet(63, 17, 0, addresses)), DEVICE);
        assert!(!host.leaves(&udp));
    }
    let forwarded = frame([0; 6], [0; 6], &packet(63, 17, 0, [CONTAINER, REMOTE]));
    host.run(EGRESS_ETHERNET, &forwarded, 0);
    assert!(!host.leaves(&udp), "the host itself has sent that packet");
    host.run(EGRESS_ETHERNET, &forwarded, DEVICE);
    assert!(host.leaves(&udp) && host.leaves(&udp));
    assert!(!host.leaves(&leaving(6, ACK)), "another protocol is another flow");
}

#[test]
fn a_flow_that_arrives_skips_the_stack_once_the_stack_has_let_it_through() {
    let mut host = Host::new(Bypass::Flows);
    let outer = arriving(64, 17, 0);
    assert!(!host.enters(&outer));
    let forwarded = frame(MAC, GATEWAY, &packet(61, 17, 0, [REMOTE, CONTAINER]));
    for from in [0, DEVICE] {
        assert_eq!(host.run(TO_LOCAL, &forwarded, from).action, TC_ACT_UNSPEC);
        assert!(!host.enters(&outer), "it came from elsewhere");
    }
    let translated = frame(MAC, GATEWAY, &packet(61, 17, 0, [[10, 96, 0, 1], CONTAINER]));
    host.run(TO_LOCAL, &translated, OVERLAY);
    assert!(!host.enters(&outer), "its source was translated");
    host.run(TO_LOCAL, &forwarded, OVERLAY);
    assert!(host.enters(&outer));
}

#[test]
fn packets_that_open_or_end_a_connection_take_the_stack_and_confirm_nothing() {
    let mut host = Host::new(Bypass::Flows);
    let forwarded = |flags| frame([0; 6], [0; 6], &packet(63, 6, flags, [CONTAINER, REMOTE]));
    assert!(!host.leaves(&leaving(6, ACK)));
    for flags in [SYN, SYN | ACK, ACK | 1, 4] {
        host.run(EGRESS_ETHERNET, &forwarded(flags), DEVICE);
        assert!(!host.leaves(&leaving(6, ACK)), "flags {flags}");
    }
    host.run(EGRESS_ETHERNET, &forwarded(ACK), DEVICE);
    for (flags, bypasses) in [(ACK, true), (SYN, false), (ACK | 1, false), (4, false), (ACK | 8, true)] {
        assert_eq!(host.leaves(&leaving(6, flags)), bypasses, "flags {flags}");
    }
}

#[test]
fn one_packet_in_a_second_takes_the_stack_and_an_unconfirmed_flow_all() {
    let mut host = Host::new(Bypass::Flows);
    let udp = leaving(17, 0);
    host.leaves(&udp);
    let forwarded = frame([0; 6], [0; 6], &packet(63, 17, 0, [CONTAINER, REMOTE]));
    host.run(EGRESS_ETHERNET, &forwarded, DEVICE);
    // Whatever this machine's pauses: in four seconds without a confirmation, it ends after one to three samples.
    let started = std::time::Instant::now();
    let (mut samples, mut bypassed) = (0, 0);
    while started.elapsed() < std::time::Duration::from_secs(4) {
        match host.leaves(&udp) {
            true => bypassed += 1,
            false if started.elapsed() < std::time::Duration::from_millis(2900) => samples += 1,
            false => {}
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!((1..=2).contains(&samples), "{samples} samples, {bypassed} bypassed");
    assert!(bypassed > 10 && !host.leaves(&udp));
    host.run(EGRESS_ETHERNET, &forwarded, DEVICE);
    // The last sample is long ago.
    assert!(!host.leaves(&udp) && host.leaves(&udp), "confirmed again");
}
