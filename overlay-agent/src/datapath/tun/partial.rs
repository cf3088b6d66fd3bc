//! Inner packets with an unfinished checksum.
//!
//! An eBPF host encapsulates a packet as its kernel hands it over. On veth and virtio the kernel leaves TCP and UDP checksums to
//! hardware that does not exist, and may leave segmentation to it too: a plain UDP socket then receives one "inner packet"
//! of up to 64 KiB whose checksum field holds the bare pseudo header's sum. Written to the overlay device as it is, it
//! would be dropped as corrupt. The virtio header in front of a packet on a tun device (kernel doc
//! Documentation/networking/tuntap.rst; the layout is `struct virtio_net_hdr`, virtio 1.2 section 5.1.6) says so instead.

use bytemuck::{Pod, Zeroable};
use overlay_ebpf::{
    unfinished,
    wire::{
        Bytes as _, Ipv4,
        ipv4::{PROTOCOL_TCP, PROTOCOL_UDP},
    },
};

/// `flags`: the checksum is to be completed from `csum_start` on.
const NEEDS_CSUM: u8 = 1;
/// `gso_type`: TCP over IPv4.
const GSO_TCPV4: u8 = 1;
/// `gso_type`, in addition: the first segment carries CWR.
const GSO_ECN: u8 = 0x80;

/// Length of a TCP header without options, in bytes.
const TCP_HEADER: usize = 20;
/// TCP's congestion-window-reduced flag (RFC 3168 section 6.1.2), in the flags byte. Only the first segment keeps it.
const TCP_CWR: u8 = 0x80;

/// `struct virtio_net_hdr` of a tun device: byte order of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct VirtioHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// The virtio header with which to write a valid inner packet to a device of `mtu` bytes: empty, or asking the kernel to
/// complete the checksum, and to treat a TCP packet longer than the MTU as the super-packet it is.
pub fn header(packet: &[u8], mtu: usize) -> VirtioHeader {
    partial(packet, mtu).unwrap_or_default()
}

fn partial(packet: &[u8], mtu: usize) -> Option<VirtioHeader> {
    let ip: &Ipv4 = packet.view(0)?;
    if !unfinished::has_partial_checksum(packet, 0, ip) {
        return None;
    }
    let (transport, checksum_offset) = (ip.header_len(), unfinished::checksum_offset(ip.protocol())?);
    // A header of which not all is there.
    packet.view::<[u8; 2]>(transport + checksum_offset)?;
    let header = VirtioHeader {
        flags: NEEDS_CSUM,
        csum_start: transport as u16,
        csum_offset: checksum_offset as u16,
        ..VirtioHeader::default()
    };
    if ip.protocol() != PROTOCOL_TCP || ip.total_len() <= mtu {
        return Some(header);
    }
    let [data_offset, flags]: [u8; 2] = *packet.view(transport + 12)?;
    // A shorter header is none: the kernel would discard each of the segments, or trust it.
    let tcp_header = usize::from(data_offset >> 4) * 4;
    let headers = transport + (tcp_header >= TCP_HEADER).then_some(tcp_header)?;
    let ecn = if flags & TCP_CWR != 0 { GSO_ECN } else { 0 };
    Some(VirtioHeader {
        gso_type: GSO_TCPV4 | ecn,
        hdr_len: headers as u16,
        // The sender's own segment size is lost; the device's MTU is what every path of this overlay carries.
        gso_size: u16::try_from(mtu.checked_sub(headers).filter(|size| *size > 0)?).ok()?,
        ..header
    })
}

/// Changes a UDP checksum that was completed to zero to all ones, which is the same sum: RFC 768 gives zero the meaning "no
/// checksum". `raw` is what the device delivered, with its virtio header; `packet` is one of the packets that it stands for, whose
/// checksum was completed if the header asked for that. A sender's own zero stays.
pub fn keep_udp_checksum(raw: &[u8], packet: &mut [u8]) {
    if raw.first().is_none_or(|flags| flags & NEEDS_CSUM == 0) {
        return;
    }
    let Some(ip) = packet.view::<Ipv4>(0).filter(|ip| ip.protocol() == PROTOCOL_UDP) else { return };
    let Some(offset) = unfinished::checksum_offset(PROTOCOL_UDP) else { return };
    let start = ip.header_len() + offset;
    if let Some(checksum @ [0, 0]) = packet.get_mut(start..start + 2) {
        checksum.fill(0xff);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TCP from 10.244.1.2 to 10.244.2.2 with the pseudo header's sum in the checksum field, as veth delivers it.
    fn partial_tcp(total_len: u16, flags: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend(total_len.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2]);
        packet.resize(usize::from(total_len), 0);
        packet[32] = 0x80;
        packet[33] = flags;
        // 0x0af4 + 0x0102 + 0x0af4 + 0x0202 + 6 + (total_len - 20), folded by hand for the lengths used here.
        let sum = 0x18ecu32 + 6 + u32::from(total_len) - 20;
        packet[36..38].copy_from_slice(&((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes());
        packet
    }

    #[test]
    fn partial_packets_ask_for_checksums_and_super_packets_for_segments() {
        const ACK: u8 = 0x10;
        let cases = [
            ("short", 100, ACK, (0, 0, 0)),
            ("as long as the MTU", 1472, ACK, (0, 0, 0)),
            ("super-packet", 60_000, ACK, (GSO_TCPV4, 52, 1420)),
            ("CWR", 60_000, ACK | TCP_CWR, (GSO_TCPV4 | GSO_ECN, 52, 1420)),
        ];
        for (name, total_len, flags, segments) in cases {
            let header = header(&partial_tcp(total_len, flags), 1472);
            assert_eq!((header.flags, header.csum_start, header.csum_offset), (NEEDS_CSUM, 20, 16), "{name}");
            assert_eq!((header.gso_type, header.hdr_len, header.gso_size), segments, "{name}");
        }
    }

    #[test]
    fn finished_or_strange_packets_are_written_as_they_are() {
        let changed = |index: usize, value: u8| {
            let mut packet = partial_tcp(100, 0x10);
            packet[index] ^= value;
            packet
        };
        let [finished, fragment, icmp] = [(36, 0x55), (6, 0x60), (9, 7)].map(|(i, value)| changed(i, value));
        let short = &partial_tcp(100, 0x10)[..36];
        let mut bad_offset = partial_tcp(60_000, 0x10);
        bad_offset[32] = 0x40;
        for packet in [&finished[..], &fragment, &icmp, short, &bad_offset, &[]] {
            assert_eq!(header(packet, 1472).flags, 0);
        }
    }

    #[test]
    fn only_a_completed_udp_checksum_of_zero_becomes_all_ones() {
        let with = |protocol, checksum: u8| {
            let mut packet = partial_tcp(100, 0);
            packet[9] = protocol;
            packet[26..28].fill(checksum);
            packet[36..38].fill(checksum);
            packet
        };
        let cases = [
            ("completed to zero", NEEDS_CSUM, PROTOCOL_UDP, 0, true),
            ("the sender's zero", 0, PROTOCOL_UDP, 0, false),
            ("another sum", NEEDS_CSUM, PROTOCOL_UDP, 1, false),
            ("TCP", NEEDS_CSUM, PROTOCOL_TCP, 0, false),
        ];
        for (name, flags, protocol, checksum, is_changed) in cases {
            let raw = bytemuck::bytes_of(&VirtioHeader { flags, ..VirtioHeader::default() }).to_vec();
            let mut packet = with(protocol, checksum);
            let mut expected = packet.clone();
            if is_changed {
                expected[26..28].fill(0xff);
            }
            keep_udp_checksum(&raw, &mut packet);
            assert_eq!(packet, expected, "{name}");
        }
        keep_udp_checksum(&[NEEDS_CSUM], &mut with(PROTOCOL_UDP, 0)[..27]);
        keep_udp_checksum(&[], &mut []);
    }
}
