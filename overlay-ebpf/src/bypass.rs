//! Bypass: which packets go straight between a container and the underlay, past the host's stack.
//!
//! The host's stack would forward such a packet unchanged but for its TTL. So a program may do that only for what it recognises beyond
//! doubt: a plain IPv4 packet between a known container and a peer. Everything else is left to the stack, which also tells
//! senders about errors.

use crate::{
    abi::{Config, Endpoint},
    wire::{Ethernet, Ipv4},
};

/// The containers of this host.
pub trait Endpoints {
    /// The container with this address; `None` if it is not known.
    fn endpoint(&self, address: [u8; 4]) -> Option<Endpoint>;
}

/// What the kernel was told by `--bypass`: a constant of the loaded programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Bypass {
    /// No packet bypasses the host's stack.
    #[default]
    Off = 0,
    /// Packets of flows that the stack has let through unchanged a moment ago.
    Flows = 1,
    /// All packets between known containers and peers.
    All = 2,
}

/// Whether a frame that arrived on the device `ifindex` comes from the container that holds its source address, and asks its gateway
/// to forward it to another host: `ethernet` and `header` are its headers.
#[inline(always)]
pub fn leaves_container(
    ethernet: &Ethernet,
    header: &Ipv4,
    ifindex: u32,
    config: &Config,
    endpoints: &impl Endpoints,
) -> bool {
    if !is_plain(ethernet, header) || !is_to_peer(header, config) {
        return false;
    }
    let Some(endpoint) = endpoints.endpoint(header.source()) else { return false };
    endpoint.ifindex == ifindex
        && ethernet.is_from(endpoint.mac)
        && ethernet.is_to(endpoint.gateway_mac)
        // This host's stack and the overlay device decrement it.
        && header.ttl() > 2
        && header.has_valid_checksum()
}

/// The container to which a decapsulated packet with the inner `header` can be handed at once, `None` when the stack has to
/// forward it.
#[inline(always)]
pub fn enters_container(header: &Ipv4, endpoints: &impl Endpoints) -> Option<Endpoint> {
    if header.header_len() != Ipv4::LEN || header.ttl() <= 1 || !header.has_valid_checksum() {
        return None;
    }
    endpoints.endpoint(header.destination())
}

/// Whether a frame is IPv4 without options, which routers may have to act on (RFC 791 section 3.1).
#[inline(always)]
fn is_plain(ethernet: &Ethernet, header: &Ipv4) -> bool {
    ethernet.ethertype() == crate::wire::ethernet::ETHERTYPE_IPV4
        && header.version() == 4
        && header.header_len() == Ipv4::LEN
}

#[inline(always)]
fn is_to_peer(header: &Ipv4, config: &Config) -> bool {
    config.network.contains(header.destination()) && !config.subnet.contains(header.destination())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Prefix;

    const DEVICE: u32 = 5;
    const CONTAINER: [u8; 4] = [10, 244, 1, 2];
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

    struct One;

    impl Endpoints for One {
        fn endpoint(&self, address: [u8; 4]) -> Option<Endpoint> {
            let endpoint =
                Endpoint { ifindex: DEVICE, mac: MAC, gateway_mac: GATEWAY, flags: Endpoint::PEER };
            (address == CONTAINER).then_some(endpoint)
        }
    }

    fn header(ttl: u8, source: [u8; 4], destination: [u8; 4]) -> Ipv4 {
        Ipv4::new(0, 84, 0, ttl, 1, source, destination)
    }

    fn with_options(header: Ipv4) -> Ipv4 {
        let mut bytes: [u8; 20] = bytemuck::cast(header);
        bytes[0] = 0x46;
        // So that nothing else is wrong: the checksum of the first 20 bytes, as if the options added up to nothing.
        let checksum = crate::checksum::update(header.checksum(), 0x4500, 0x4600);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        bytemuck::cast(bytes)
    }

    fn with_wrong_checksum(header: Ipv4) -> Ipv4 {
        let mut bytes: [u8; 20] = bytemuck::cast(header);
        bytes[10] ^= 1;
        bytemuck::cast(bytes)
    }

    #[test]
    fn only_a_container_that_sends_to_a_peer_through_its_gateway_bypasses_the_stack() {
        let own = Prefix::new([10, 244, 1, 0], 24);
        let config = Config::new([192, 168, 77, 1], Prefix::new([10, 244, 0, 0], 16), own, 8285);
        let frame = Ethernet::ipv4(GATEWAY, MAC);
        let arp: Ethernet = bytemuck::cast([0xff_u8, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 2, 8, 6]);
        let packet = header(64, CONTAINER, [10, 244, 2, 2]);
        let cases = [
            ("to a peer", frame, packet, DEVICE, true),
            ("enough TTL for both hops", frame, header(3, CONTAINER, [10, 244, 2, 2]), DEVICE, true),
            ("the stack tells about this one", frame, header(2, CONTAINER, [10, 244, 2, 2]), DEVICE, false),
            (
                "a source of another container",
                frame,
                header(64, [10, 244, 1, 3], [10, 244, 2, 2]),
                DEVICE,
                false,
            ),
            ("another device", frame, packet, DEVICE + 1, false),
            ("another hardware address", Ethernet::ipv4(GATEWAY, GATEWAY), packet, DEVICE, false),
            ("not to the gateway", Ethernet::ipv4(MAC, MAC), packet, DEVICE, false),
            ("to all", Ethernet::ipv4([0xff; 6], MAC), packet, DEVICE, false),
            ("to a container of this host", frame, header(64, CONTAINER, [10, 244, 1, 9]), DEVICE, false),
            ("out of the overlay", frame, header(64, CONTAINER, [10, 245, 2, 2]), DEVICE, false),
            ("options", frame, with_options(packet), DEVICE, false),
            ("a wrong checksum, which the stack drops", frame, with_wrong_checksum(packet), DEVICE, false),
            ("not IPv4", arp, packet, DEVICE, false),
        ];
        for (name, ethernet, header, ifindex, expected) in cases {
            assert_eq!(leaves_container(&ethernet, &header, ifindex, &config, &One), expected, "{name}");
        }
    }

    #[test]
    fn a_packet_enters_a_known_container_if_the_stack_would_forward_it() {
        let enters = |header: Ipv4| enters_container(&header, &One).is_some();
        let from_peer = |ttl, destination| header(ttl, [10, 244, 2, 2], destination);
        assert!(enters(from_peer(64, CONTAINER)) && enters(from_peer(2, CONTAINER)));
        assert!(!enters(from_peer(1, CONTAINER)), "the stack tells its sender");
        assert!(!enters(from_peer(64, [10, 244, 1, 3])));
        assert!(!enters(with_options(from_peer(64, CONTAINER))));
        assert!(!enters(with_wrong_checksum(from_peer(64, CONTAINER))), "the stack drops it");
    }
}
