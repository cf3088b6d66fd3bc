//! The header of the PROXY protocol, version 2 (haproxy.org, `proxy-protocol.txt`, section 2.2), which tells an endpoint its client.

use std::net::SocketAddrV4;

/// What every header of version 2 begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2 in the upper half, the command PROXY in the lower.
const VERSION_AND_COMMAND: u8 = 0x21;
/// Version 2 in the upper half, the command LOCAL in the lower.
const VERSION_AND_LOCAL: u8 = 0x20;
/// AF_INET in the upper half, STREAM in the lower.
const TCP_OVER_IPV4: u8 = 0x11;
/// Bytes of the two addresses and ports.
const ADDRESSES: u16 = 12;
/// Bytes of a header.
pub(super) const LENGTH: usize = 16 + ADDRESSES as usize;

/// The header of a TCP connection from `client` to `destination`, the virtual address.
pub(super) fn tcp_over_ipv4(client: SocketAddrV4, destination: SocketAddrV4) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    let fields: [&[u8]; 8] = [
        &SIGNATURE,
        &[VERSION_AND_COMMAND],
        &[TCP_OVER_IPV4],
        &ADDRESSES.to_be_bytes(),
        &client.ip().octets(),
        &destination.ip().octets(),
        &client.port().to_be_bytes(),
        &destination.port().to_be_bytes(),
    ];
    for (place, byte) in header.iter_mut().zip(fields.into_iter().flatten()) {
        *place = *byte;
    }
    header
}

/// The header of a connection that this node makes for itself, as a health check: without a client, and without addresses.
pub(in crate::service) fn local() -> [u8; 16] {
    let mut header = [0; 16];
    for (place, byte) in header.iter_mut().zip(SIGNATURE.iter().chain(&[VERSION_AND_LOCAL])) {
        *place = *byte;
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_that_haproxy_sends() {
        // Captured from HAProxy: 172.19.0.1:42578 to 172.19.0.3:80.
        let captured = [
            0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x21, 0x11, 0x00, 0x0c,
            0xac, 0x13, 0x00, 0x01, 0xac, 0x13, 0x00, 0x03, 0xa6, 0x52, 0x00, 0x50,
        ];
        let client = "172.19.0.1:42578".parse().unwrap();
        assert_eq!(tcp_over_ipv4(client, "172.19.0.3:80".parse().unwrap()), captured);
    }

    #[test]
    fn a_check_has_no_addresses() {
        // proxy-protocol.txt, section 2.2: the signature, `\x20`, an unspecified family, and no bytes behind.
        let expected =
            [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x20, 0, 0, 0];
        assert_eq!(local(), expected);
    }
}
