//! Runs the programs on packets made for it before real packets reach them: a kernel may accept a program although its
//! helpers do not do what they promise.

use anyhow::{Result, bail};
use overlay_ebpf::{
    abi::{Config, NextHop, Prefix, UnderlayValue},
    wire::{Ethernet, OVERHEAD},
};

use super::{Hook, HookKind, LoadOptions, OverlaySet, overlay_set::EGRESS_ETHERNET};
use crate::route::{NextHops, Subnet, abi_prefix};

/// `TC_ACT_REDIRECT` (linux/pkt_cls.h).
pub const TC_ACT_REDIRECT: u32 = 7;
/// `XDP_PASS` (linux/bpf.h).
pub const XDP_PASS: u32 = 2;

/// Underlay address and subnet.
type Host = ([u8; 4], &'static str);

// Addresses for documentation and benchmarks (RFC 5737, RFC 2544), which no host has.
const SENDER: Host = ([192, 0, 2, 1], "198.18.0.0/24");
const RECEIVER: Host = ([192, 0, 2, 2], "198.18.1.0/24");

/// The device of a test run: the loopback device.
const TEST_IFINDEX: u32 = 1;
/// Its hardware address, as far as the programs know: that of [`Ethernet::UNRESOLVED_IPV4`].
const MAC: [u8; 6] = [0; 6];

/// Sends a packet through the egress program of one copy of the set and `ingress` of another: the result must be the packet,
/// two hops older. An error names the program that fails.
pub(crate) fn run(object: &[u8], ingress: Hook) -> Result<()> {
    let inner = inner_packet();
    let frame = [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0][..], &inner].concat();
    let sender = load(object, EGRESS_ETHERNET, SENDER, RECEIVER)?;
    let outer = run_on(sender, EGRESS_ETHERNET, &frame, TC_ACT_REDIRECT)?;
    if outer.len() != frame.len() + OVERHEAD {
        bail!("self-test: {} did not encapsulate a packet: {} bytes", EGRESS_ETHERNET.program, outer.len());
    }
    // The kernel returns XDP's metadata in front of the packet.
    let receiver = load(object, ingress, RECEIVER, SENDER)?;
    let mark = receiver.config()?.mark();
    let (action, mark) = match ingress.kind {
        HookKind::Xdp => (XDP_PASS, bytemuck::bytes_of(&mark)),
        HookKind::TcIngress | HookKind::TcEgress => (TC_ACT_REDIRECT, &[][..]),
    };
    let got = run_on(receiver, ingress, &outer, action)?;
    let packet = got.strip_prefix(mark).and_then(|frame| frame.get(Ethernet::LEN..));
    if packet != Some(&two_hops_older(&inner)[..]) {
        bail!("self-test: {} did not decapsulate a packet: {} bytes", ingress.program, got.len());
    }
    Ok(())
}

fn run_on(mut set: OverlaySet, hook: Hook, frame: &[u8], action: u32) -> Result<Vec<u8>> {
    let outcome = set.programs.test_run(hook, frame, 0)?;
    if outcome.action != action {
        bail!("self-test: {} returned {} instead of {action}", hook.program, outcome.action);
    }
    Ok(outcome.packet)
}

/// A copy of the set for `own` with `peer` as its only peer.
fn load(object: &[u8], hook: Hook, own: Host, peer: Host) -> Result<OverlaySet> {
    let mut set = OverlaySet::load(object, LoadOptions::default())?;
    set.programs.load_program(hook)?;
    let subnet = abi_prefix(own.1.parse::<Subnet>()?.prefix());
    let config = Config::new(own.0, Prefix::new([198, 18, 0, 0], 15), subnet, 8285);
    set.set_config(&config.with_device(TEST_IFINDEX))?;
    set.set_underlays(&[(TEST_IFINDEX, UnderlayValue::new(MAC, true))].into())?;
    let next_hop = NextHop { peer: peer.0, ifindex: TEST_IFINDEX, mtu: 1472, ..NextHop::default() };
    set.set_routes(&NextHops::from([(peer.1.parse()?, next_hop)]))?;
    Ok(set)
}

/// ICMP echo request from 198.18.0.2 to 198.18.1.2, TTL 64.
fn inner_packet() -> Vec<u8> {
    let mut packet =
        vec![0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 1, 0xae, 0x7f, 198, 18, 0, 2, 198, 18, 1, 2, 8, 0];
    packet.resize(84, 0xa5);
    packet
}

/// The same packet with TTL two less and the checksum to match: TTL is the upper byte of a word, so it grows by 0x0200.
fn two_hops_older(packet: &[u8]) -> Vec<u8> {
    let mut older = packet.to_vec();
    if let Some([ttl, _, checksum, _]) = older.get_mut(8..12) {
        *ttl -= 2;
        *checksum += 2;
    }
    older
}
