"""The egress vectors of packets that are carried: how the inner header is rewritten and the outer headers are made."""

from egress_packets import POD_A, POD_B, TO_B, datagram, ping, segment
from packets import (
    CE,
    DF,
    ECT0,
    ECT1,
    ESP,
    GRE,
    IPIP,
    MF,
    NOT_ECT,
    RESERVED,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
    gre,
    ident_for,
    ipv4,
    pattern,
    sctp,
    tcp,
    udp,
)
from vector import vector


def carried_vectors():
    """All of them, in the order of the rewriting."""
    return [*checksums(), *tos(), *transports(), *fragments(), *sizes()]


def checksums():
    def numbered(ident):
        return datagram(ident=ident, ttl=64)

    for before, after, why in [
        (0xFEFF, 0x0000, "RFC 1141 gives 0xffff here, which is the trap that RFC 1624 section 3 closes"),
        (0x0000, 0x0100, "a right checksum may be zero; it is no 'not computed' in IPv4"),
        (0xFF00, 0x0001, "the carry goes around the end"),
        (0xFFFE, 0x00FF, "the highest right checksum carries around the end"),
        (0xFEFE, 0xFFFE, "one below the trap: no carry"),
        (0x0001, 0x0101, "the lowest checksum that is not zero"),
    ]:
        yield vector(
            f"checksum_{before:04x}_becomes_{after:04x}",
            f"RFC 1624 equation 3: {why}.",
            numbered(ident_for(before, numbered)),
            TO_B,
            checksum=after,
        )
    yield vector(
        "checksum_ffff_becomes_0100",
        "Minus zero is right by RFC 1071 and comes out as from plus zero.",
        datagram(ident=ident_for(0x0000, numbered), csum=0xFFFF),
        TO_B,
        checksum=0x0100,
    )
    yield vector(
        "wrong_checksum_stays_wrong",
        "An update keeps the error (RFC 1624 section 4); computing anew would hide it.",
        datagram(csum=0xBEEF),
        TO_B,
        checksum=0xBFEF,
    )
    yield vector(
        "zeroed_checksum_stays_wrong",
        "A field that was never filled in is a wrong checksum.",
        datagram(csum=0),
        TO_B,
        checksum=0x0100,
    )


def tos():
    for ecn, label in [(NOT_ECT, "not_ect"), (ECT1, "ect1"), (ECT0, "ect0"), (CE, "ce")]:
        yield vector(
            f"ecn_{label}_is_copied_to_the_outer",
            "Normal mode copies the field (RFC 6040 section 4.1).",
            segment(tos=ecn),
            TO_B,
            outer_tos=ecn,
        )
    yield vector(
        "dscp_ef_is_copied_to_the_outer",
        "Uniform model of RFC 2983 on the way in.",
        datagram(tos=0xB8),
        TO_B,
        outer_tos=0xB8,
    )
    yield vector(
        "dscp_cs6_with_ect0_is_copied_whole", "DSCP and ECN share the byte.", datagram(tos=0xC2), TO_B, outer_tos=0xC2
    )
    yield vector("tos_ff_is_copied_whole", "Every bit of the byte crosses.", datagram(tos=0xFF), TO_B, outer_tos=0xFF)


def transports():
    unhashed = "has no ports that are known, so addresses and protocol alone make the flow"
    tso = ipv4(POD_A, POD_B, TCP, tcp(POD_A, POD_B, 40000, 5201, pattern(2864), partial=True))
    yield vector("tcp_is_carried", "Ports are part of the flow.", segment(), TO_B)
    yield vector(
        "tcp_of_another_port_takes_another_source_port",
        "Flows between two pods spread over queues and paths.",
        segment(sport=40001),
        TO_B,
    )
    yield vector("udp_is_carried", "Ports are part of the flow.", datagram(), TO_B)
    yield vector(
        "udp_without_checksum_is_carried",
        "Zero means 'none' and is the inner sender's choice (RFC 768).",
        ipv4(POD_A, POD_B, UDP, udp(POD_A, POD_B, 40000, 53, pattern(8), csum=0)),
        TO_B,
    )
    yield vector("sctp_is_carried", "Ports are part of the flow.", ipv4(POD_A, POD_B, SCTP, sctp(40000, 3868)), TO_B)
    yield vector("icmp_is_carried", "ICMP " + unhashed + ".", ping(), TO_B)
    yield vector(
        "gre_is_carried", "GRE " + unhashed + ".", ipv4(POD_A, POD_B, GRE, gre(ping("172.16.0.1", "172.16.0.2"))), TO_B
    )
    yield vector(
        "ipip_is_carried",
        "An overlay inside the overlay " + unhashed + ".",
        ipv4(POD_A, POD_B, IPIP, ping("172.16.0.1", "172.16.0.2")),
        TO_B,
    )
    yield vector("esp_is_carried", "ESP " + unhashed + ".", ipv4(POD_A, POD_B, ESP, pattern(40)), TO_B)
    yield vector("udp_lite_is_carried", "UDP-Lite " + unhashed + ".", ipv4(POD_A, POD_B, UDPLITE, pattern(24)), TO_B)
    yield vector(
        "three_bytes_of_udp_have_no_ports",
        "A hash must not read beyond the packet.",
        ipv4(POD_A, POD_B, UDP, pattern(3)),
        TO_B,
    )
    yield vector(
        "four_bytes_of_udp_have_ports",
        "The boundary: ports and nothing else.",
        ipv4(POD_A, POD_B, UDP, pattern(4)),
        TO_B,
    )
    yield vector(
        "four_bytes_of_tcp_behind_options_have_ports",
        "The ports stand behind the options, not at byte 20.",
        ipv4(POD_A, POD_B, TCP, pattern(4), options=b"\x01\x01\x01\x00"),
        TO_B,
    )
    yield vector(
        "three_bytes_of_sctp_behind_options_have_no_ports",
        "The boundary moves with the header length.",
        ipv4(POD_A, POD_B, SCTP, pattern(3), options=b"\x01\x01\x01\x00"),
        TO_B,
    )
    yield vector(
        "source_port_49152_is_the_lowest",
        "The hash ends in the dynamic ports of RFC 6335.",
        datagram(sport=29333, dport=53),
        TO_B,
        port=49152,
    )
    yield vector(
        "source_port_65535_is_the_highest",
        "The hash ends in the dynamic ports of RFC 6335.",
        datagram(sport=33184, dport=123),
        TO_B,
        port=65535,
    )
    yield vector(
        "tso_super_packet_with_partial_checksum_is_carried_whole",
        "tc meets it before segmentation; the transport checksum is its device's business.",
        tso,
        TO_B,
    )


def fragments():
    body = udp(POD_A, POD_B, 40000, 53, pattern(64))
    addresses_only = "all fragments of a packet must share a path, so none is hashed by ports"
    yield vector(
        "first_fragment_is_carried",
        f"It shows ports, but {addresses_only}.",
        ipv4(POD_A, POD_B, UDP, body[:24], flags=MF),
        TO_B,
    )
    yield vector(
        "middle_fragment_is_carried",
        f"It shows no ports: {addresses_only}.",
        ipv4(POD_A, POD_B, UDP, body[24:48], flags=MF, offset=3),
        TO_B,
    )
    yield vector(
        "last_fragment_is_carried",
        f"MF is clear and the offset is not: {addresses_only}.",
        ipv4(POD_A, POD_B, UDP, body[48:], flags=0, offset=6),
        TO_B,
    )
    yield vector(
        "fragment_at_offset_4096_is_carried",
        "The highest bit of the offset alone makes a fragment.",
        ipv4(POD_A, POD_B, UDP, pattern(8), flags=0, offset=0x1000),
        TO_B,
    )
    yield vector(
        "fragment_at_the_highest_offset_is_carried",
        "All 13 bits of the offset count.",
        ipv4(POD_A, POD_B, UDP, pattern(8), flags=0, offset=0x1FFF),
        TO_B,
    )
    yield vector(
        "fragment_with_df_is_carried",
        "A contradiction that is the inner sender's business.",
        ipv4(POD_A, POD_B, UDP, body[:24], flags=DF | MF),
        TO_B,
    )
    yield vector(
        "packet_without_df_gets_an_outer_with_df",
        "The outer is never fragmented on its way, so its id may be 0 (RFC 6864).",
        datagram(flags=0, ident=0x7777),
        TO_B,
    )
    yield vector(
        "reserved_flag_makes_no_fragment",
        "The top bit of the flags is neither MF nor offset, so ports are hashed.",
        datagram(flags=RESERVED | DF),
        TO_B,
    )


def sizes():
    def sized(length, **fields):
        return datagram(payload=pattern(length - 28), **fields)

    yield vector("ping_without_payload_is_carried", "28 bytes.", ping(payload=b""), TO_B)
    yield vector(
        "one_byte_of_payload_is_carried",
        "21 bytes: an odd length has no pad byte on the wire.",
        ipv4(POD_A, POD_B, ESP, b"\xa5"),
        TO_B,
    )
    yield vector("odd_length_of_29_is_carried", "One byte of UDP payload.", sized(29), TO_B)
    yield vector("odd_length_of_1471_is_carried", "One byte below the overlay MTU.", sized(1471), TO_B)
    yield vector("overlay_mtu_of_1472_fills_1500", "1472 + 28 bytes fill an Ethernet frame.", sized(1472), TO_B)
    yield vector(
        "packet_above_the_mtu_is_carried", "The MTU is the device's business, not the packet core's.", sized(1473), TO_B
    )
    yield vector(
        "inner_65507_fills_the_outer",
        "65507 + 28 = 65535, the largest total length (RFC 791 section 3.1).",
        sized(65507),
        TO_B,
    )
    yield vector(
        "inner_65508_is_too_long",
        "One byte more than an outer header can state.",
        sized(65508),
        "punt too_long / drop too_long",
    )
