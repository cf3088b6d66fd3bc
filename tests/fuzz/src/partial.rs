//! What must be true of the virtio header in front of an inner packet: it points into the packet, and the segments that it asks
//! for fit the device.

use overlay_agent::datapath::tun::partial;

use crate::raw::Packet;

/// Checks the header for a valid packet on a device of `mtu` bytes.
pub(crate) fn judge(packet: &[u8], mtu: usize) {
    let header = partial::header(packet, mtu);
    // `struct virtio_net_hdr`: two bytes, then four words in the byte order of the host.
    let bytes = bytemuck::bytes_of(&header);
    let word = |at: usize| usize::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
    let (flags, kind, headers, size) = (bytes[0], bytes[1], word(2), word(4));
    let (start, field) = (word(6), word(8));
    let ip = Packet::new(packet).expect("the packet is valid");
    if flags == 0 {
        assert!(bytes.iter().all(|byte| *byte == 0), "a header without a flag asks for something");
        return;
    }
    assert_eq!(flags, 1, "an unknown flag");
    assert!(ip.is_unfinished(), "the checksum is complete");
    let place = if ip.protocol() == 6 { 16 } else { 6 };
    assert_eq!((start, field), (ip.header_len(), place), "the place of the checksum");
    assert!(start + field + 2 <= packet.len(), "the checksum is outside of the packet");
    if kind == 0 {
        assert_eq!((headers, size), (0, 0), "segments of no kind");
        return;
    }
    assert!(kind & 0x7f == 1 && ip.protocol() == 6, "segments of another protocol than TCP");
    assert!(packet.len() > mtu, "a packet that fits is cut");
    let transport = &ip.transport();
    let data_offset = usize::from(transport[12] / 16) * 4;
    assert_eq!((headers, kind & 0x80), (start + data_offset, transport[13] & 0x80), "headers, CWR");
    assert!(data_offset >= 20, "the kernel refuses TCP headers of {data_offset} bytes");
    assert!(headers < packet.len() && size > 0 && headers + size <= mtu, "{size} bytes behind {headers}");
}
