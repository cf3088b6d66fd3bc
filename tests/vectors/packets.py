"""Builds packets byte by byte: IPv4, transports, UDP encapsulation and Ethernet, right unless told to be wrong.

Every field that a receiver checks can be overridden, so that a vector states exactly what is broken in it.
"""

import ipaddress
import struct

ICMP, IGMP, IPIP, TCP, UDP, GRE, ESP, SCTP, UDPLITE = 1, 2, 4, 6, 17, 47, 50, 132, 136

# The flags half of the IPv4 flags-and-offset word (RFC 791 section 3.1).
RESERVED, DF, MF = 0x8000, 0x4000, 0x2000

NOT_ECT, ECT1, ECT0, CE = 0, 1, 2, 3

OUR_MAC = bytes.fromhex("020000000001")
PEER_MAC = bytes.fromhex("020000000002")


def fold_sum(data):
    """The ones-complement sum of RFC 1071 over `data`, folded to 16 bits and not complemented."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data):
    """The Internet checksum of RFC 1071 over `data`, whose checksum field must be zero."""
    return fold_sum(data) ^ 0xFFFF


def addr(text):
    """The four bytes of a dotted address."""
    return ipaddress.IPv4Address(text).packed


def pattern(length):
    """Payload without a short period, so that a shifted or repeated copy cannot compare equal."""
    return bytes((i * 131 + (i >> 8) * 29 + 7) & 0xFF for i in range(length))


PAYLOAD = pattern(8)


def pseudo_header(src, dst, proto, length):
    """The pseudo header of RFC 768 and RFC 9293."""
    return addr(src) + addr(dst) + struct.pack("!BBH", 0, proto, length)


def ipv4(
    src,
    dst,
    proto,
    payload=b"",
    *,
    version=4,
    ihl=None,
    tos=0,
    total=None,
    ident=0x1C46,
    flags=DF,
    offset=0,
    ttl=64,
    csum=None,
    options=b"",
):
    """An IPv4 packet: `offset` in units of 8 bytes, `options` a multiple of 4 bytes, the right checksum if None."""
    ihl = 5 + len(options) // 4 if ihl is None else ihl
    total = 20 + len(options) + len(payload) if total is None else total

    def header(value):
        return (
            struct.pack(
                "!BBHHHBBH4s4s",
                version << 4 | ihl,
                tos,
                total,
                ident,
                flags | offset,
                ttl,
                proto,
                value,
                addr(src),
                addr(dst),
            )
            + options
        )

    return header(checksum(header(0)) if csum is None else csum) + payload


def udp(src, dst, sport, dport, payload=b"", *, length=None, csum=None):
    """A UDP datagram (RFC 768). `csum=None` is the right checksum, sent as 0xffff when it computes to zero."""
    length = 8 + len(payload) if length is None else length
    if csum is None:
        header = struct.pack("!HHHH", sport, dport, length, 0)
        csum = checksum(pseudo_header(src, dst, UDP, length) + header + payload) or 0xFFFF
    return struct.pack("!HHHH", sport, dport, length, csum) + payload


def tcp(src, dst, sport, dport, payload=b"", *, partial=False):
    """A TCP segment with ACK and PSH (RFC 9293). `partial` leaves the checksum as an offloading sender does."""

    def segment(value):
        return struct.pack("!HHIIBBHHH", sport, dport, 0x01020304, 0x0A0B0C0D, 5 << 4, 0x18, 64240, value, 0) + payload

    pseudo = pseudo_header(src, dst, TCP, 20 + len(payload))
    return segment(fold_sum(pseudo) if partial else checksum(pseudo + segment(0)))


def icmp_echo(payload=b"", *, kind=8):
    """An ICMP echo message (RFC 792): `kind` 8 is the request, 0 the reply."""

    def message(value):
        return struct.pack("!BBHHH", kind, 0, value, 0x2A17, 1) + payload

    return message(checksum(message(0)))


def sctp(sport, dport):
    """An SCTP packet with one COOKIE ACK chunk (RFC 9260) and its CRC32c."""

    def packet(crc):
        return struct.pack("!HHI", sport, dport, 0x5EED1234) + struct.pack("<I", crc) + struct.pack("!BBH", 11, 0, 4)

    return packet(crc32c(packet(0)))


def crc32c(data):
    """CRC32c (RFC 9260 appendix A), bit by bit: nothing here is large."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def gre(payload):
    """A GRE header (RFC 2784) without checksum, carrying IPv4."""
    return struct.pack("!HH", 0, 0x0800) + payload


def ethernet(payload, *, ethertype=0x0800, to=OUR_MAC):
    """An Ethernet frame from the peer to this host, without frame check sequence."""
    return to + PEER_MAC + struct.pack("!H", ethertype) + payload


def ident_for(wanted, build):
    """The IPv4 identification with which `build(ident)` gets the right header checksum `wanted`."""
    for ident in range(0x10000):
        packet = build(ident)
        if struct.unpack_from("!H", packet, 10)[0] == wanted:
            return ident
    raise ValueError(f"no identification gives header checksum {wanted:#06x}")
