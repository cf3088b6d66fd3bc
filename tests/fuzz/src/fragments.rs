//! What must be true of the fragments of a packet: they are the packet, in order, and none is too long.

use overlay_agent::datapath::tun::fragment;

use crate::raw::{self, Packet};

/// Checks one input: two bytes of MTU, then a packet.
pub(crate) fn check(input: &[u8]) {
    let Some((mtu, packet)) = input.split_first_chunk::<2>() else { return };
    let mtu = u16::from_be_bytes(*mtu).into();
    match packet.first() {
        Some(0x40..0x50) => judge(packet, mtu),
        // The core has discarded it; here it only must not panic.
        _ => drop(fragment::fragments(packet, mtu)),
    }
}

/// Checks the fragments of `packet` for a path that carries `mtu` bytes.
pub(crate) fn judge(packet: &[u8], mtu: usize) {
    let fragments = fragment::fragments(packet, mtu);
    let Some(whole) = Packet::new(packet) else {
        assert_eq!(fragments, None, "there is no header");
        return;
    };
    let end = whole.fragment_offset() + whole.transport().len();
    let Some(fragments) = fragments else {
        let is_simple = whole.header_len() == 20 && !whole.dont_fragment() && packet.len() > 20;
        assert!(!is_simple || mtu < 28 || end > 65535, "it can be fragmented");
        return;
    };
    assert!(!whole.dont_fragment(), "a packet with DF is fragmented");
    let mut expected = whole.fragment_offset();
    let mut payload = Vec::new();
    for (index, fragment) in fragments.iter().enumerate() {
        let part = Packet::new(fragment).expect("a fragment has a header");
        assert!(fragment.len() <= mtu, "{} bytes for a path of {mtu}", fragment.len());
        assert_eq!((part.version(), part.total_len()), (4, fragment.len()), "version, total length");
        assert!(part.header_len() >= 20 && part.header_len() < fragment.len(), "the fragment is empty");
        assert_eq!(raw::sum(&fragment[..part.header_len()]), 0xffff, "the checksum is wrong");
        let is_last = index + 1 == fragments.len();
        let has_more = !is_last || whole.fragment_word() & 0x2000 != 0;
        assert_eq!(part.fragment_word() & 0xe000, if has_more { 0x2000 } else { 0 }, "flags");
        assert_eq!(part.fragment_offset(), expected, "the fragments overlap or leave a gap");
        assert_eq!((fragment[1], &fragment[4..6]), (packet[1], &packet[4..6]), "TOS, identification");
        assert_eq!((part.ttl(), part.protocol()), (whole.ttl(), whole.protocol()));
        assert_eq!((part.source(), part.destination()), (whole.source(), whole.destination()));
        if index == 0 {
            let options = 20..part.header_len();
            assert_eq!(fragment.get(options.clone()), packet.get(options), "options of the first");
        }
        assert!(part.transport().len().is_multiple_of(8) || is_last, "the next offset cannot be said");
        expected += part.transport().len();
        payload.extend_from_slice(part.transport());
    }
    assert!(payload == whole.transport(), "the fragments are not the packet");
}
