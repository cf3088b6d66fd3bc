//! UDP header (RFC 768).

use bytemuck::{Pod, Zeroable};

/// The 8 bytes of a UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Udp {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    length: [u8; 2],
    checksum: [u8; 2],
}

impl Udp {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// A header without checksum (zero, which IPv4 allows: RFC 768). `length` counts this header and the payload.
    #[inline(always)]
    pub fn new(source_port: u16, destination_port: u16, length: u16) -> Self {
        Self {
            source_port: source_port.to_be_bytes(),
            destination_port: destination_port.to_be_bytes(),
            length: length.to_be_bytes(),
            checksum: [0; 2],
        }
    }

    accessors! { udp:
        /// Source port.
        source_port -> u16 { u16::from_be_bytes(udp.source_port) }
        /// Destination port.
        destination_port -> u16 { u16::from_be_bytes(udp.destination_port) }
        /// Length of header and payload in bytes, as the header says; valid from 8.
        length -> usize { u16::from_be_bytes(udp.length) as usize }
        /// Checksum over pseudo header, header and payload; 0 when the sender made none.
        checksum -> u16 { u16::from_be_bytes(udp.checksum) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accessors_read_the_fields_of_rfc_768() {
        let header: Udp = bytemuck::cast([0xc0u8, 0x01, 0x20, 0x5d, 0x00, 0x5c, 0x12, 0x34]);
        assert_eq!((header.source_port(), header.destination_port()), (49153, 8285));
        assert_eq!((header.length(), header.checksum()), (92, 0x1234));
        assert_eq!(Udp::new(49153, 8285, 92).checksum(), 0);
    }
}
