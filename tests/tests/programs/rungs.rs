//! The same question to each implementation: what becomes of this packet? The answer in the words of the vector files.

use overlay_agent::{
    datapath::{
        ebpf::{
            Hook, HookKind, LoadOptions, OverlaySet,
            self_test::{TC_ACT_REDIRECT, XDP_PASS},
        },
        tun::{Lookup, shell},
    },
    route::NextHops,
};
use overlay_ebpf::{
    abi::{Config, Counters, UnderlayValue},
    egress,
    hop::Rewrite,
    ingress,
    reason::{DropReason, PuntReason},
    source::Sender,
    verdict::{EgressVerdict, IngressVerdict, InnerVerdict},
    wire::{Ethernet, Ipv4, OVERHEAD},
};

use crate::vectors::Verdict;

/// `TC_ACT_UNSPEC` and `TC_ACT_SHOT` (linux/pkt_cls.h), `XDP_DROP` (linux/bpf.h).
pub(crate) const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const XDP_DROP: u32 = 1;

/// What `BPF_PROG_TEST_RUN` takes at most for tc programs: a page less the kernel's own part of it. XDP programs get longer frames
/// in several buffers, as from a driver.
const LONGEST_TEST_RUN: usize = 3500;
const LONGEST_XDP_TEST_RUN: usize = 65_549;

/// The device of test runs, the loopback device, and the hardware address of this host in the vectors.
const TEST_IFINDEX: u32 = 1;
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The link-layer header in front of inner packets in test runs of the egress program.
const ETHERNET: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];

fn rewritten(packet: &[u8], rewrite: Rewrite) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let header: &mut Ipv4 = bytemuck::from_bytes_mut(&mut packet[..Ipv4::LEN]);
    rewrite.apply(header);
    packet
}

pub(crate) fn core_egress(packet: &[u8], gso_size: usize, config: &Config, routes: &Lookup) -> Verdict {
    match egress::decide(packet, 0, packet.len(), gso_size, config, routes) {
        EgressVerdict::Encap(encap) => Verdict::Encap {
            bytes: [bytemuck::bytes_of(&encap.outer), &rewritten(packet, encap.rewrite)].concat(),
        },
        EgressVerdict::SlowEncap(reason, _) => Verdict::punted(reason),
        EgressVerdict::Fragment(_) => Verdict::punted(PuntReason::PathMtu),
        EgressVerdict::TooLong => Verdict::punted(PuntReason::TooLong),
        EgressVerdict::Reject(_) => Verdict::punted(PuntReason::Rejected),
        EgressVerdict::Drop(reason) => Verdict::dropped(reason),
    }
}

/// What the core wants the slow path to do with a packet that is no super-packet.
pub(crate) fn core_egress_slow(packet: &[u8], config: &Config, routes: &Lookup) -> Verdict {
    match egress::decide(packet, 0, packet.len(), 0, config, routes) {
        EgressVerdict::Encap(encap) | EgressVerdict::SlowEncap(_, encap) => Verdict::Encap {
            bytes: [bytemuck::bytes_of(&encap.outer), &rewritten(packet, encap.rewrite)].concat(),
        },
        EgressVerdict::Fragment(_) => Verdict::Fragment,
        EgressVerdict::TooLong => Verdict::dropped(DropReason::TooLong),
        EgressVerdict::Reject(rejection) => Verdict::dropped(rejection.reason()),
        EgressVerdict::Drop(reason) => Verdict::dropped(reason),
    }
}

/// What the core wants the slow path to do with a datagram that reaches its socket.
pub(crate) fn core_ingress_slow(frame: &[u8], config: &Config, routes: &Lookup) -> Verdict {
    let (payload, sender) = datagram(frame);
    match ingress::decide_inner(&payload[..], 0, payload.len(), sender, frame[15], config, routes) {
        InnerVerdict::Decap(decap) => Verdict::Decap { bytes: rewritten(&payload, decap.rewrite) },
        InnerVerdict::TrailingBytes => Verdict::dropped(DropReason::TrailingBytes),
        InnerVerdict::Reject(rejection) => Verdict::dropped(rejection.reason()),
        InnerVerdict::Drop(reason) => Verdict::dropped(reason),
    }
}

/// What a UDP socket makes of a frame: the payload and its sender.
fn datagram(frame: &[u8]) -> (Vec<u8>, Sender) {
    let end = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let address = [frame[26], frame[27], frame[28], frame[29]];
    (frame[42..end].to_vec(), Sender { address, device: 0 })
}

/// Whether a program's verdict is the core's: of too many rejected packets, a program discards some instead of punting them.
pub(crate) fn is_same(decided: &Verdict, core: &Verdict) -> bool {
    let rejected =
        [DropReason::TtlExpired, DropReason::NoRoute, DropReason::PeerUnreachable, DropReason::MtuExceeded];
    decided == core
        || (*core == Verdict::punted(PuntReason::Rejected)
            && rejected.into_iter().any(|reason| *decided == Verdict::dropped(reason)))
}

pub(crate) fn core_ingress(frame: &[u8], config: &Config, routes: &Lookup) -> Verdict {
    match ingress::decide(
        frame,
        frame.len(),
        || Some((UnderlayValue::new(MAC, true), TEST_IFINDEX)),
        config,
        routes,
    ) {
        IngressVerdict::Pass => Verdict::Pass,
        IngressVerdict::Decap(decap) => {
            let inner = &frame[ingress::INNER_OFFSET..ingress::INNER_OFFSET + decap.inner_len];
            Verdict::Decap { bytes: rewritten(inner, decap.rewrite) }
        }
        IngressVerdict::Punt(reason) => Verdict::punted(reason),
        IngressVerdict::Reject(_) => Verdict::punted(PuntReason::Rejected),
        IngressVerdict::Drop(reason) => Verdict::dropped(reason),
    }
}

/// The tun shell's answer, with the outer headers that the vector expects where only the kernel's socket makes them: the
/// peer and the TOS are the shell's and are compared.
pub(crate) fn tun_egress(packet: &[u8], config: &Config, routes: &Lookup, expected: &Verdict) -> Verdict {
    let mut packet = packet.to_vec();
    match shell::egress(&mut packet, config, routes) {
        Ok(to) if to.fragment => Verdict::Fragment,
        Ok(to) => {
            let mut outer = match expected {
                Verdict::Encap { bytes } => bytes[..28].to_vec(),
                Verdict::Pass
                | Verdict::Decap { .. }
                | Verdict::Fragment
                | Verdict::Punt { .. }
                | Verdict::Drop { .. } => vec![0; 28],
            };
            outer[1] = to.tos;
            outer[16..20].copy_from_slice(&to.next_hop.peer);
            Verdict::Encap { bytes: [outer, packet].concat() }
        }
        Err(refusal) => Verdict::dropped(refusal.reason()),
    }
}

pub(crate) fn tun_ingress(frame: &[u8], config: &Config, routes: &Lookup) -> Verdict {
    let (mut payload, sender) = datagram(frame);
    match shell::ingress(&mut payload, sender, frame[15], config, routes) {
        Ok(()) => Verdict::Decap { bytes: payload },
        Err(refusal) => Verdict::dropped(refusal.reason()),
    }
}

/// The frame by which to show a packet to a loaded program, or `None` when the kernel does not take it for a test run.
pub(crate) fn test_frame(hook: Hook, packet: &[u8]) -> Option<Vec<u8>> {
    let frame = match hook.kind {
        HookKind::TcEgress => [&ETHERNET[..], packet].concat(),
        HookKind::TcIngress | HookKind::Xdp => packet.to_vec(),
    };
    // For tc programs, kernel 6.18 wants the header that the EtherType announces (net/bpf/test_run.c).
    let shortest = match (hook.kind, frame.get(12..14)) {
        (HookKind::TcEgress | HookKind::TcIngress, Some([0x08, 0x00])) => 14 + 20,
        (HookKind::TcEgress | HookKind::TcIngress, Some([0x86, 0xdd])) => 14 + 40,
        _ => 14,
    };
    let longest = match hook.kind {
        HookKind::TcEgress | HookKind::TcIngress => LONGEST_TEST_RUN,
        HookKind::Xdp => LONGEST_XDP_TEST_RUN,
    };
    (shortest..=longest).contains(&frame.len()).then_some(frame)
}

/// The compiled programs.
pub(crate) fn object() -> Vec<u8> {
    let object = std::env::var("OVERLAY_EBPF_OBJECT")
        .expect("OVERLAY_EBPF_OBJECT names the eBPF object: run the tests with `cargo xtask test`");
    std::fs::read(&object).unwrap_or_else(|error| panic!("{object}: {error}"))
}

/// The programs as the kernel runs them.
pub(crate) struct Kernel {
    hook: Hook,
    set: OverlaySet,
    counted: Counters,
}

impl Kernel {
    pub(crate) fn load(hook: Hook, config: &Config, routes: &NextHops) -> Self {
        let set = OverlaySet::load(&object(), LoadOptions::default()).expect("the maps load, as root");
        Self::fill(hook, set, config, routes)
    }

    /// With maps made for the network of `config`.
    pub(crate) fn load_for(hook: Hook, config: &Config, routes: &NextHops) -> Self {
        let set = OverlaySet::load_for(&object(), LoadOptions::default(), config, None).unwrap();
        Self::fill(hook, set, config, routes)
    }

    fn fill(hook: Hook, mut set: OverlaySet, config: &Config, routes: &NextHops) -> Self {
        set.programs.load_program(hook).unwrap();
        set.set_config(config).unwrap();
        assert_eq!(&set.config().unwrap(), config);
        set.set_underlays(&[(TEST_IFINDEX, UnderlayValue::new(MAC, true))].into()).unwrap();
        set.set_routes(routes).unwrap();
        assert_eq!(&set.routes().unwrap(), routes);
        Self { hook, set, counted: Counters::ZERO }
    }

    /// The loaded maps and programs.
    pub(crate) fn set(&mut self) -> &mut OverlaySet {
        &mut self.set
    }

    /// The frame that the loaded program redirects for a packet.
    pub(crate) fn redirected(&mut self, packet: &[u8]) -> Vec<u8> {
        let input = test_frame(self.hook, packet).unwrap();
        let outcome = self.set.programs.test_run(self.hook, &input, 0).unwrap();
        assert_eq!(outcome.action, TC_ACT_REDIRECT);
        outcome.packet
    }

    /// What the loaded program does with a packet, or `None` when the kernel does not take such a packet for a test run.
    pub(crate) fn verdict(&mut self, packet: &[u8], gso_size: usize) -> Option<Verdict> {
        let input = test_frame(self.hook, packet)?;
        let mut outcome = self
            .set
            .programs
            .test_run(self.hook, &input, gso_size as u32)
            .unwrap_or_else(|error| panic!("{} bytes: {error:#}", input.len()));
        // The kernel returns XDP's metadata in front of the packet.
        let mark = self.set.config().unwrap().mark();
        let mark = bytemuck::bytes_of(&mark);
        let marked = self.hook.kind == HookKind::Xdp && outcome.packet.starts_with(mark);
        if marked {
            outcome.packet.drain(..mark.len());
        }
        let counters = self.set.counters().unwrap();
        let events = events(&self.counted, &counters);
        let bytes = carried_bytes(&counters) - carried_bytes(&self.counted);
        self.counted = counters;
        // In a test run, the kernel knows the size of segments but not their kind, and encapsulates none.
        if gso_size != 0 && events == [Event::Drop(DropReason::EncapFailed)] {
            return None;
        }
        let untouched = outcome.packet == input && !marked;
        let inner = || without_padding(&outcome.packet[Ethernet::LEN..]);
        let verdict = match (self.hook.kind, outcome.action, events.as_slice()) {
            (HookKind::TcEgress, TC_ACT_REDIRECT, [Event::Carried]) => Verdict::Encap { bytes: inner() },
            (HookKind::TcIngress, TC_ACT_REDIRECT, [Event::Carried]) => Verdict::Decap { bytes: inner() },
            (HookKind::Xdp, XDP_PASS, [Event::Carried]) if marked => Verdict::Decap { bytes: inner() },
            (HookKind::TcEgress | HookKind::TcIngress, TC_ACT_SHOT, [Event::Drop(reason)]) => {
                Verdict::dropped(*reason)
            }
            (HookKind::Xdp, XDP_DROP, [Event::Drop(reason)]) => Verdict::dropped(*reason),
            (HookKind::TcEgress | HookKind::TcIngress, TC_ACT_UNSPEC, [Event::Punt(reason)]) if untouched => {
                Verdict::punted(*reason)
            }
            (HookKind::TcIngress, TC_ACT_UNSPEC, []) | (HookKind::Xdp, XDP_PASS, []) if untouched => {
                Verdict::Pass
            }
            (_, action, events) => panic!(
                "{:?} returned {action}, counted {events:?}, left {} of {} bytes{}",
                self.hook,
                outcome.packet.len(),
                input.len(),
                if marked { ", marked" } else { "" }
            ),
        };
        let (carried, link) = match &verdict {
            Verdict::Encap { bytes } => (bytes.len() - OVERHEAD, None),
            Verdict::Decap { bytes } => (bytes.len(), Some(&input[..Ethernet::LEN])),
            Verdict::Pass | Verdict::Fragment | Verdict::Punt { .. } | Verdict::Drop { .. } => (0, None),
        };
        assert_eq!(
            bytes, carried as u64,
            "{:?} counts other bytes than those of the inner packet",
            self.hook
        );
        let has_link_header = link.is_none_or(|link| outcome.packet.starts_with(link));
        assert!(has_link_header, "{:?} does not keep the link-layer header", self.hook);
        Some(verdict)
    }
}

/// The programs leave what lies behind an IP packet (Ethernet padding) for the stack to trim.
fn without_padding(packet: &[u8]) -> Vec<u8> {
    let total_length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    packet[..total_length].to_vec()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Carried,
    Punt(PuntReason),
    Drop(DropReason),
}

fn carried_bytes(counters: &Counters) -> u64 {
    counters.egress_bytes + counters.ingress_bytes
}

/// What was counted between two readings.
fn events(before: &Counters, after: &Counters) -> Vec<Event> {
    let repeat =
        |before: u64, after: u64, event: Event| std::iter::repeat_n(event, (after - before) as usize);
    let carried =
        (before.egress_packets + before.ingress_packets, after.egress_packets + after.ingress_packets);
    let mut events: Vec<Event> = repeat(carried.0, carried.1, Event::Carried).collect();
    for reason in PuntReason::ALL {
        events.extend(repeat(
            before.punts[reason.index()],
            after.punts[reason.index()],
            Event::Punt(*reason),
        ));
    }
    for reason in DropReason::ALL {
        events.extend(repeat(
            before.drops[reason.index()],
            after.drops[reason.index()],
            Event::Drop(*reason),
        ));
    }
    events
}
