//! Flows that may skip the host's stack because it has let them through unchanged a moment ago (the idea of ONCache, NSDI 2025).
//!
//! A program at the entrance of the host looks up the flow of each packet: one that is new, or not confirmed, takes the host's stack. A
//! program at the exit, behind firewall and NAT, confirms flows that arrive there with the same addresses and ports. A confirmed
//! flow skips the stack, but for one packet in each [`SAMPLE_INTERVAL`]; when none of these reaches the exit for [`LIFETIME`],
//! because a rule drops or changes it now, the flow takes the stack again.

use bytemuck::{Pod, Zeroable};

use crate::wire::{
    Bytes, Ipv4,
    ipv4::{PROTOCOL_TCP, PROTOCOL_UDP},
};

/// How often a packet of a confirmed flow takes the host's stack, in nanoseconds.
pub const SAMPLE_INTERVAL: u64 = 1_000_000_000;
/// How long a flow skips the host's stack without a confirmation, in nanoseconds.
pub const LIFETIME: u64 = 3_000_000_000;
/// How soon after a confirmation another one changes nothing, in nanoseconds.
const FRESH: u64 = SAMPLE_INTERVAL / 2;
/// Age in nanoseconds from which it pays to ask the agent about a flow.
const LONG_ENOUGH: u64 = 20_000_000;
/// Shortest time between two questions about one flow, in nanoseconds.
const PATIENCE: u64 = 100_000_000;

/// TCP flags (RFC 9293 section 3.1), in the byte behind the data offset.
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// A flow in one direction: the key of the maps `FLOWS` and `RELEASED`. Network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
    /// Source and destination port.
    pub ports: [u8; 4],
    /// TCP or UDP.
    pub protocol: u8,
    reserved: [u8; 3],
}

impl FlowKey {
    /// The key of these addresses, ports and protocol.
    #[inline(always)]
    pub fn new(source: [u8; 4], destination: [u8; 4], ports: [u8; 4], protocol: u8) -> Self {
        Self { source, destination, ports, protocol, reserved: [0; 3] }
    }
}

/// A packet's flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Which one.
    pub key: FlowKey,
    /// Whether the packet opens or ends a TCP connection: the host's connection tracking must see it.
    pub is_control: bool,
}

impl Flow {
    /// The flow of the packet at `offset` in `packet`, whose `header` has no options. `None` for other protocols than TCP and UDP, and
    /// for fragments.
    #[inline(always)]
    pub fn of<P: Bytes + ?Sized>(packet: &P, offset: usize, header: &Ipv4) -> Option<Self> {
        if header.is_fragment() || header.header_len() != Ipv4::LEN {
            return None;
        }
        let transport = offset + Ipv4::LEN;
        let is_control = match header.protocol() {
            PROTOCOL_UDP => false,
            PROTOCOL_TCP => {
                // Two bytes: the verifier does not follow a comparison for one.
                let [_, flags] = *packet.view::<[u8; 2]>(transport + 12)?;
                flags & (SYN | FIN | RST) != 0
            }
            _ => return None,
        };
        let ports = *packet.view::<[u8; 4]>(transport)?;
        let key = FlowKey::new(header.source(), header.destination(), ports, header.protocol());
        Some(Self { key, is_control })
    }
}

/// What is known about a flow: the value of the map `FLOWS`. Times in nanoseconds, of a clock that only the programs read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FlowState {
    /// When its first packet arrived.
    pub began: u64,
    /// When a packet of it was last sent through the host's stack to see whether it gets through.
    pub sampled: u64,
    /// When the stack last let a packet through unchanged; 0 for never.
    pub confirmed: u64,
    /// When the agent was last asked about it.
    pub asked: u64,
}

/// Where a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Past the host's stack.
    Bypass,
    /// Through the stack.
    Stack,
    /// Through the stack, to see whether it still lets the flow through: [`FlowState::sampled`] becomes the present.
    Sample,
}

impl FlowState {
    /// A flow that begins.
    #[inline(always)]
    pub fn new(now: u64) -> Self {
        Self { began: now, sampled: now, confirmed: 0, asked: 0 }
    }

    /// Whether a confirmation is still valid.
    #[inline(always)]
    pub fn is_confirmed(&self, now: u64) -> bool {
        self.confirmed != 0 && now.wrapping_sub(self.confirmed) < LIFETIME
    }

    /// Where a packet goes at this time.
    #[inline(always)]
    pub fn way(&self, now: u64) -> Way {
        if !self.is_confirmed(now) {
            return Way::Stack;
        }
        match now.wrapping_sub(self.sampled) < SAMPLE_INTERVAL {
            true => Way::Bypass,
            false => Way::Sample,
        }
    }

    /// Whether a packet that the stack let through tells nothing new.
    #[inline(always)]
    pub fn is_fresh(&self, now: u64) -> bool {
        self.confirmed != 0 && now.wrapping_sub(self.confirmed) < FRESH
    }

    /// Whether to ask the agent to prepare the connection for the bypass.
    #[inline(always)]
    pub fn is_question_due(&self, now: u64) -> bool {
        now.wrapping_sub(self.began) >= LONG_ENOUGH && now.wrapping_sub(self.asked) >= PATIENCE
    }
}

/// How the kernel's connection tracking sees a packet: `_nfct` of `struct sk_buff` (include/linux/skbuff.h), a pointer whose lowest
/// three bits are `enum ip_conntrack_info` (include/uapi/linux/netfilter/nf_conntrack_common.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracking(pub u64);

impl Tracking {
    const INFO: u64 = 7;
    const ESTABLISHED: u64 = 0;
    const ESTABLISHED_REPLY: u64 = 3;

    /// The connection; 0 when the packet belongs to none, because nothing on the host asks for connection tracking.
    #[inline(always)]
    pub fn connection(self) -> u64 {
        self.0 & !Self::INFO
    }

    /// Whether packets have passed in both directions.
    #[inline(always)]
    pub fn is_established(self) -> bool {
        matches!(self.0 & Self::INFO, Self::ESTABLISHED | Self::ESTABLISHED_REPLY)
    }
}

/// A tracked connection of which the kernel's connection tracking need not see all packets, as the agent has made sure: no helper reads
/// what it carries, and TCP windows are not checked, by which the next packet after some that were not seen would be invalid. The
/// value of the map `RELEASED`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Released {
    /// [`Tracking::connection`].
    pub connection: u64,
    /// [`Question::time`]. The kernel may use the memory of a connection that has ended for another one.
    pub since: u64,
}

/// The programs' request to the agent, through the ring buffer `QUESTIONS`: make this connection [`Released`], if it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Question {
    /// One direction of the connection.
    pub flow: FlowKey,
    /// [`Tracking::connection`].
    pub connection: u64,
    /// When it is asked, in nanoseconds of the programs' clock.
    pub time: u64,
}

/// Whether the stack's decision about a packet may be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may.
    Confirm,
    /// Not yet: the connection is not established in both directions, or the agent has been asked.
    Wait,
    /// Not before the agent has made the connection [`Released`].
    Ask,
}

/// Decides about a packet of a flow with this `state` that has passed the stack unchanged.
#[inline(always)]
pub fn decide(state: &FlowState, tracking: Tracking, released: Option<Released>, now: u64) -> Decision {
    let connection = tracking.connection();
    if connection == 0 {
        return Decision::Confirm;
    }
    if !tracking.is_established() {
        return Decision::Wait;
    }
    let is_released = released.is_some_and(|released| {
        released.connection == connection
            && (state.is_confirmed(now) || now.wrapping_sub(released.since) < LIFETIME)
    });
    match (is_released, state.is_question_due(now)) {
        (true, _) => Decision::Confirm,
        (false, true) => Decision::Ask,
        (false, false) => Decision::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn packet(protocol: u8, tcp_flags: u8) -> Vec<u8> {
        let mut packet =
            vec![0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 244, 1, 2, 10, 244, 2, 3];
        packet.extend([0x12, 0x34, 0, 80]);
        packet.resize(60, 0);
        packet[33] = tcp_flags;
        packet
    }

    fn flow(packet: &[u8]) -> Option<Flow> {
        Flow::of(packet, 0, packet.view::<Ipv4>(0).unwrap())
    }

    #[test]
    fn a_flow_is_addresses_ports_and_protocol_of_tcp_and_udp() {
        let key = FlowKey::new([10, 244, 1, 2], [10, 244, 2, 3], [0x12, 0x34, 0, 80], 17);
        assert_eq!(flow(&packet(17, FIN)), Some(Flow { key, is_control: false }));
        let key = FlowKey { protocol: 6, ..key };
        const ACK: u8 = 0x10;
        for (flags, is_control) in
            [(ACK, false), (SYN, true), (SYN | ACK, true), (FIN | ACK, true), (RST, true)]
        {
            assert_eq!(flow(&packet(6, flags)), Some(Flow { key, is_control }));
        }
        assert_eq!(flow(&packet(1, 0)), None);
        let mut fragment = packet(17, 0);
        fragment[6] = 0x20;
        assert_eq!(flow(&fragment), None);
        let mut options = packet(17, 0);
        options[0] = 0x46;
        assert_eq!(flow(&options), None);
        assert_eq!(flow(&packet(6, 0)[..33]), None, "the flags cannot be seen");
        assert_eq!(flow(&packet(17, 0)[..23]), None);
    }

    #[test]
    fn a_flow_skips_the_stack_only_while_it_is_confirmed() {
        let now = 100 * SECOND;
        let mut state = FlowState::new(now);
        assert_eq!(state.way(now), Way::Stack);
        state.confirmed = now;
        assert_eq!(state.way(now), Way::Bypass);
        assert_eq!(state.way(now + SAMPLE_INTERVAL - 1), Way::Bypass);
        assert_eq!(state.way(now + SAMPLE_INTERVAL), Way::Sample);
        state.sampled = now + SAMPLE_INTERVAL;
        assert_eq!(state.way(now + SAMPLE_INTERVAL + 1), Way::Bypass);
        assert_eq!(state.way(now + LIFETIME), Way::Stack, "no sample got through");
        assert!(state.is_fresh(now + FRESH - 1) && !state.is_fresh(now + FRESH));
        assert!(!FlowState::new(now).is_fresh(now));
    }

    #[test]
    fn connection_tracking_has_to_agree() {
        const CONNECTION: u64 = 0xffff_8880_1234_5600;
        let now = 100 * SECOND;
        let young = FlowState::new(now);
        let old = FlowState::new(now - SECOND);
        let confirmed = FlowState { confirmed: now - SECOND, ..old };
        let released = |connection, age| Some(Released { connection, since: now - age });
        let (established, reply) = (Tracking(CONNECTION), Tracking(CONNECTION | 3));
        let cases = [
            ("no connection tracking", young, Tracking(0), None, Decision::Confirm),
            ("untracked", young, Tracking(7), None, Decision::Confirm),
            ("new", old, Tracking(CONNECTION | 2), None, Decision::Wait),
            ("related", old, Tracking(CONNECTION | 1), None, Decision::Wait),
            (
                "new, whatever is released",
                old,
                Tracking(CONNECTION | 2),
                released(CONNECTION, 0),
                Decision::Wait,
            ),
            ("a short connection", young, established, None, Decision::Wait),
            ("a longer one", old, established, None, Decision::Ask),
            ("its other direction", old, reply, None, Decision::Ask),
            ("asked", FlowState { asked: now - 1, ..old }, reply, None, Decision::Wait),
            ("released", old, reply, released(CONNECTION, 1), Decision::Confirm),
            ("another connection", old, reply, released(CONNECTION + 8, 1), Decision::Ask),
            ("perhaps another connection", old, reply, released(CONNECTION, LIFETIME), Decision::Ask),
            (
                "the same all the time",
                confirmed,
                reply,
                released(CONNECTION, 9 * LIFETIME),
                Decision::Confirm,
            ),
        ];
        for (name, state, tracking, released, expected) in cases {
            assert_eq!(decide(&state, tracking, released, now), expected, "{name}");
        }
    }
}
