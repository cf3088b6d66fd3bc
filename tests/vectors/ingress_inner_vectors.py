"""The ingress vectors about the inner packet: its shape, who may send it, where it may go, and how it is rewritten."""

from ingress_frames import POD_A, POD_B, datagram, frame, ping, segment
from packets import (
    CE,
    DF,
    ECT0,
    ECT1,
    ESP,
    GRE,
    ICMP,
    MF,
    NOT_ECT,
    RESERVED,
    SCTP,
    TCP,
    UDP,
    gre,
    ident_for,
    ipv4,
    pattern,
    sctp,
    tcp,
    udp,
)
from vector import vector

NOP4 = b"\x01\x01\x01\x00"


def inner_vectors():
    """All of them, in the order of the rules."""
    return [
        *shape(),
        *merged(),
        *sources(),
        *destinations(),
        *ttl(),
        *ecn(),
        *checksums(),
        *transports(),
        *fragments(),
        *sizes(),
        *precedence(),
    ]


def shape():
    bare, whole = ipv4(POD_B, POD_A, UDP), ping()
    record_route = ipv4(POD_B, POD_A, ICMP, options=bytes([7, 39, 4]) + bytes(36) + b"\0")
    for name, why, inner, expect in [
        (
            "empty_payload_is_truncated",
            "UDP length 8: there is no byte that could name a version.",
            b"",
            "drop truncated",
        ),
        (
            "one_byte_of_version_4_is_truncated",
            "A header has at least 20 bytes (RFC 791 section 3.1).",
            b"\x45",
            "drop truncated",
        ),
        (
            "nineteen_bytes_of_version_6_are_truncated",
            "No IP header is shorter than 20 bytes, whatever its version.",
            b"\x60" + bytes(18),
            "drop truncated",
        ),
        ("one_byte_of_version_0_is_truncated", "There is no header to have a version.", b"\x00", "drop truncated"),
        (
            "inner_ipv6_is_dropped",
            "The overlay is IPv4; flannel mangles IPv6.",
            b"\x60" + bytes(5) + b"\x3b\x40" + pattern(32),
            "drop ipv6",
        ),
        ("inner_version_5_is_bad_version", "RFC 791 defines version 4 only.", ping(version=5), "drop bad_version"),
        ("nineteen_bytes_are_truncated", "One byte less than a header.", bare[:19], "drop truncated"),
        ("twenty_bytes_are_a_whole_packet", "A header without payload is legal.", bare, "decap"),
        (
            "inner_ihl_0_is_bad",
            "A header has at least 5 words (RFC 791 section 3.1).",
            ping(ihl=0),
            "drop bad_header_length",
        ),
        ("inner_ihl_4_is_bad", "One word less than a header.", ping(ihl=4), "drop bad_header_length"),
        (
            "inner_ihl_6_beyond_the_payload_is_truncated",
            "The header claims 24 bytes and 20 are there.",
            ipv4(POD_B, POD_A, UDP, ihl=6),
            "drop truncated",
        ),
        (
            "inner_ihl_15_one_byte_short_is_truncated",
            "The header claims 60 bytes and 59 are there.",
            record_route[:59],
            "drop truncated",
        ),
        (
            "inner_ihl_15_exactly_is_decapsulated",
            "The longest header, 60 bytes, without payload.",
            record_route,
            "decap",
        ),
        (
            "inner_options_are_carried_untouched",
            "An overlay is one IP hop that does not process inner options.",
            datagram(options=NOP4),
            "decap",
        ),
        ("inner_total_length_0_is_bad", "Zero never covers a header.", ping(total=0), "drop bad_total_length"),
        (
            "inner_total_length_19_is_bad",
            "Total length covers the header (RFC 791 section 3.1).",
            ping(total=19),
            "drop bad_total_length",
        ),
        (
            "inner_total_length_below_options_is_bad",
            "Total length 20 does not cover a header of 24 bytes.",
            ipv4(POD_B, POD_A, ICMP, options=NOP4, total=20),
            "drop bad_total_length",
        ),
        (
            "inner_total_length_one_beyond_the_payload_is_truncated",
            "flannel forwards such a packet; its end is missing.",
            ping(total=len(whole) + 1),
            "drop truncated",
        ),
        (
            "inner_total_length_65535_of_a_short_payload_is_truncated",
            "The claim must not be taken for a buffer size.",
            ping(total=0xFFFF),
            "drop truncated",
        ),
    ]:
        yield vector(name, why, frame(inner), expect)


def merged():
    first, second = datagram(ident=1), datagram(ident=2)
    expect = "punt outer_gro / drop trailing_bytes"
    yield vector(
        "two_merged_datagrams_are_punted",
        "Receive offload has put two datagrams under one UDP header; the socket splits them.",
        frame(first + second),
        expect,
    )
    yield vector(
        "one_trailing_byte_is_punted",
        "The fast path cannot tell a merged datagram from a broken one.",
        frame(first + b"\0"),
        expect,
    )
    yield vector(
        "trailing_bytes_behind_a_bare_header_are_punted",
        "Total length 20 with more behind it.",
        frame(ipv4(POD_B, POD_A, ICMP, pattern(8), total=20)),
        expect,
    )


def sources():
    held, other = "the sender holds the subnet", "the subnet is another host's"
    spoofed, unknown = "drop spoofed_source", "drop unknown_source"
    for src, outer_src, why, expect in [
        ("10.244.2.0", 2, held, "decap"),
        ("10.244.2.255", 2, held, "decap"),
        ("10.244.3.0", 3, held, "decap"),
        ("10.244.3.0", 2, other, spoofed),
        ("10.244.2.2", 3, other, spoofed),
        ("10.244.2.2", 66, "a host without a lease claims it", spoofed),
        ("10.244.128.0", 9, "the first address of the /17", "decap"),
        ("10.244.199.255", 9, "the last address before the /24 inside the /17", "decap"),
        ("10.244.200.7", 4, "the /24 inside the /17 wins", "decap"),
        ("10.244.200.7", 9, "the /24 inside the /17 is taken from its holder", spoofed),
        ("10.244.201.7", 9, "behind the /24 the /17 is back", "decap"),
        ("10.244.201.7", 4, "the holder of the /24 does not hold the /17", spoofed),
        ("10.244.127.255", 9, "one address before the /17", unknown),
        ("10.244.77.9", 2, "an address of the overlay that nobody holds", unknown),
        ("192.168.77.2", 2, "an underlay address is nobody's lease", unknown),
        ("0.0.0.0", 2, "an unspecified source is nobody's lease", unknown),
        ("127.0.0.1", 2, "a loopback source is nobody's lease", unknown),
        ("10.244.1.9", 2, "a peer claims an address of our own subnet", spoofed),
        ("10.244.1.0", 2, "a peer claims our own device address", spoofed),
    ]:
        verb = {"decap": "is_accepted", spoofed: "is_spoofed", unknown: "is_unknown"}[expect]
        yield vector(
            f"source_{src.replace('.', '_')}_from_peer_{outer_src}_{verb}",
            f"The outer source must hold the longest prefix of the inner source: {why}.",
            frame(ping(src=src), src=f"192.168.77.{outer_src}"),
            expect,
        )
    yield vector(
        "outer_source_of_our_own_is_spoofed",
        "This host is no peer of its own; the kernel takes it for a martian.",
        frame(ping(), src="192.168.77.1"),
        spoofed,
        tun="kernel",
    )


def destinations():
    for dst, why, expect in [
        ("10.244.1.0", "the host's own overlay address", "decap"),
        ("10.244.1.1", "the first address of a bridge", "decap"),
        ("10.244.1.255", "the last address of the subnet", "decap"),
        ("10.244.0.255", "one address before the subnet", "drop not_for_us"),
        ("10.244.2.0", "one address beyond the subnet", "drop not_for_us"),
        ("10.244.3.5", "this host is no router between peers", "drop not_for_us"),
        ("192.168.77.1", "the underlay address is reached without the overlay", "drop not_for_us"),
        ("127.0.0.1", "a loopback address would reach local services", "drop not_for_us"),
        ("224.0.0.1", "multicast does not cross", "drop not_for_us"),
        ("255.255.255.255", "broadcast does not cross", "drop not_for_us"),
    ]:
        verb = "is_ours" if expect == "decap" else "is_not_for_us"
        yield vector(
            f"destination_{dst.replace('.', '_')}_{verb}",
            f"Only our own subnet is delivered: {why}.",
            frame(ping(dst=dst)),
            expect,
        )


def ttl():
    yield vector(
        "ttl_zero_is_dropped",
        "flannel wraps it around to 255; RFC 1812 section 5.3.1 discards it.",
        frame(ping(ttl=0)),
        "punt rejected / drop ttl_expired",
    )
    yield vector(
        "ttl_one_is_dropped",
        "One decrement makes it 0 (RFC 1812 section 5.3.1).",
        frame(ping(ttl=1)),
        "punt rejected / drop ttl_expired",
    )
    yield vector(
        "ttl_one_of_an_icmp_error_is_dropped",
        "An ICMP error is never answered with another (RFC 1812 section 4.3.2.7).",
        frame(ipv4(POD_B, POD_A, ICMP, bytes([11, 0, 0, 0]) + bytes(32), ttl=1)),
        "drop ttl_expired",
    )
    slow_peer = "10.244.7.9"
    yield vector(
        "packet_of_a_slow_peer_is_left_to_the_kernel",
        "The kernel's IPsec policies decide about it.",
        frame(ping(src=slow_peer), src="192.168.77.7"),
        "punt slow_peer / decap",
    )
    yield vector(
        "spoofed_packet_of_a_slow_peer_is_dropped",
        "Its source is checked first.",
        frame(ping(src=slow_peer), src="192.168.77.2"),
        "drop spoofed_source",
    )
    yield vector("ttl_two_is_delivered_with_one", "The lowest TTL that arrives.", frame(ping(ttl=2)), "decap")
    yield vector(
        "ttl_63_is_delivered_with_62", "What host to host ping shows, as with flannel.", frame(ping(ttl=63)), "decap"
    )
    yield vector(
        "ttl_64_is_delivered_with_63", "A sender that does not decrement, as FOU.", frame(ping(ttl=64)), "decap"
    )
    yield vector("ttl_255_is_delivered_with_254", "The highest TTL.", frame(ping(ttl=255)), "decap")


def ecn():
    label = {NOT_ECT: "not_ect", ECT1: "ect1", ECT0: "ect0", CE: "ce"}
    # Rows of RFC 6040 section 4.2, figure 4: inner field, then the result for each outer field; None is a drop.
    for inner, results in [
        (NOT_ECT, {NOT_ECT: NOT_ECT, ECT0: NOT_ECT, ECT1: NOT_ECT, CE: None}),
        (ECT0, {NOT_ECT: ECT0, ECT0: ECT0, ECT1: ECT1, CE: CE}),
        (ECT1, {NOT_ECT: ECT1, ECT0: ECT1, ECT1: ECT1, CE: CE}),
        (CE, {NOT_ECT: CE, ECT0: CE, ECT1: CE, CE: CE}),
    ]:
        for outer, result in results.items():
            packet = frame(segment(tos=0x48 | inner), tos=outer)
            expect = {"expect": "drop ecn_congestion"} if result is None else {"expect": "decap", "tos": 0x48 | result}
            verdict = "is_dropped" if result is None else f"becomes_{label[result]}"
            yield vector(
                f"ecn_inner_{label[inner]}_outer_{label[outer]}_{verdict}",
                "RFC 6040 section 4.2, figure 4.",
                packet,
                **expect,
            )
    yield vector(
        "ecn_mark_leaves_all_dscp_bits",
        "CE is set and the six bits beside it stay.",
        frame(segment(tos=0xFE), tos=0x03),
        "decap",
        tos=0xFF,
    )
    yield vector(
        "outer_dscp_beside_ce_is_ignored",
        "Outer 0xff is CE with another DSCP.",
        frame(segment(tos=0x02), tos=0xFF),
        "decap",
        tos=0x03,
    )


def checksums():
    for inner_ecn, outer_ecn, result, before, after, why in [
        (
            NOT_ECT,
            NOT_ECT,
            NOT_ECT,
            0xFEFF,
            0x0000,
            "RFC 1141 gives 0xffff here, which is the trap that RFC 1624 section 3 closes",
        ),
        (NOT_ECT, NOT_ECT, NOT_ECT, 0x0000, 0x0100, "a right checksum may be zero"),
        (NOT_ECT, NOT_ECT, NOT_ECT, 0xFF00, 0x0001, "the carry goes around the end"),
        (NOT_ECT, NOT_ECT, NOT_ECT, 0xFFFE, 0x00FF, "the highest right checksum carries around the end"),
        (ECT0, CE, CE, 0xFF00, 0x0000, "TOS and TTL together give zero"),
        (ECT0, CE, CE, 0xFEFF, 0xFFFE, "the TTL alone would give zero, and the TOS takes one more away"),
        (ECT0, CE, CE, 0x0001, 0x0100, "the TOS alone would give zero, and the TTL carries on from it"),
        (ECT0, CE, CE, 0x0000, 0x00FF, "the TOS takes one away from zero"),
        (ECT0, ECT1, ECT1, 0x0000, 0x0101, "a lower TOS raises the checksum"),
        (ECT0, ECT1, ECT1, 0xFEFE, 0x0000, "a lower TOS and a lower TTL together give zero"),
        (ECT1, CE, CE, 0xFF01, 0x0000, "TOS plus two and TTL minus one together give zero"),
    ]:

        def numbered(ident, tos=inner_ecn):
            return datagram(ident=ident, tos=tos)

        yield vector(
            f"checksum_{before:04x}_becomes_{after:04x}_with_tos_{inner_ecn}_under_{outer_ecn}",
            f"RFC 1624 equation 3: {why}.",
            frame(numbered(ident_for(before, numbered)), tos=outer_ecn),
            "decap",
            checksum=after,
            tos=result,
        )
    plus_zero = ident_for(0x0000, lambda ident: datagram(ident=ident))
    yield vector(
        "checksum_ffff_becomes_0100",
        "Minus zero is right by RFC 1071 and comes out as from plus zero.",
        frame(datagram(ident=plus_zero, csum=0xFFFF)),
        "decap",
        checksum=0x0100,
    )
    yield vector(
        "wrong_inner_checksum_stays_wrong",
        "An update keeps the error, so that the endpoint sees it (RFC 1624 section 4).",
        frame(datagram(csum=0xBEEF)),
        "decap",
        checksum=0xBFEF,
    )


def transports():
    partial_tcp = ipv4(POD_B, POD_A, TCP, tcp(POD_B, POD_A, 80, 40000, pattern(64), partial=True))
    super_packet = ipv4(POD_B, POD_A, TCP, tcp(POD_B, POD_A, 5201, 40000, pattern(2864), partial=True))
    for name, why, inner in [
        ("tcp_is_delivered", "Byte for byte but TTL and checksum.", segment()),
        (
            "udp_without_checksum_is_delivered",
            "Zero means 'none' and is the inner sender's choice (RFC 768).",
            ipv4(POD_B, POD_A, UDP, udp(POD_B, POD_A, 53, 40000, pattern(8), csum=0)),
        ),
        (
            "sctp_is_delivered",
            "A transport that the core does not know by more than its ports.",
            ipv4(POD_B, POD_A, SCTP, sctp(3868, 40000)),
        ),
        (
            "gre_is_delivered",
            "A tunnel inside the overlay.",
            ipv4(POD_B, POD_A, GRE, gre(ping("172.16.0.2", "172.16.0.1"))),
        ),
        ("esp_is_delivered", "A transport without ports.", ipv4(POD_B, POD_A, ESP, pattern(40))),
        ("inner_udp_to_our_port_is_delivered", "Only the outermost header is taken off.", datagram(dport=8285)),
        ("partial_inner_checksum_is_delivered_as_it_is", "Only the device or the receiver finishes it.", partial_tcp),
        (
            "tso_super_packet_is_delivered_whole",
            "Between containers of one machine segmentation may never happen.",
            super_packet,
        ),
    ]:
        yield vector(name, why, frame(inner), "decap")


def fragments():
    body = udp(POD_B, POD_A, 53, 40000, pattern(64))
    for name, why, inner in [
        (
            "first_inner_fragment_is_delivered",
            "The endpoint reassembles.",
            ipv4(POD_B, POD_A, UDP, body[:24], flags=MF),
        ),
        (
            "middle_inner_fragment_is_delivered",
            "The endpoint reassembles.",
            ipv4(POD_B, POD_A, UDP, body[24:48], flags=MF, offset=3),
        ),
        (
            "last_inner_fragment_is_delivered",
            "The endpoint reassembles.",
            ipv4(POD_B, POD_A, UDP, body[48:], flags=0, offset=6),
        ),
        ("inner_packet_without_df_is_delivered", "DF is the inner sender's choice.", datagram(flags=0)),
        (
            "inner_reserved_flag_is_delivered",
            "A bit that nobody reads crosses all the same.",
            datagram(flags=RESERVED | DF),
        ),
    ]:
        yield vector(name, why, frame(inner), "decap")


def sizes():
    for length in (21, 29, 61, 1471, 1472):
        why = (
            "1472 + 28 bytes fill an Ethernet frame" if length == 1472 else "an odd length has no pad byte on the wire"
        )
        yield vector(
            f"inner_packet_of_{length}_bytes_is_delivered",
            f"Sizes: {why}.",
            frame(ipv4(POD_B, POD_A, ESP, pattern(length - 20))),
            "decap",
        )
    yield vector(
        "inner_packet_of_65507_bytes_is_delivered",
        "65507 + 28 = 65535, the largest total length (RFC 791 section 3.1).",
        frame(datagram(payload=pattern(65507 - 28))),
        "decap",
    )
    yield vector(
        "inner_packet_of_65508_bytes_in_the_largest_outer_is_truncated",
        "No outer packet can hold it.",
        frame(datagram(payload=pattern(65508 - 28))[:65507]),
        "drop truncated",
    )


def precedence():
    strange = {"src": "10.244.77.9", "dst": "8.8.8.8"}
    for name, why, data, expect in [
        (
            "ipv6_comes_before_bad_ihl",
            "The version is judged first.",
            frame(b"\x60" + bytes(19)),
            "drop ipv6",
        ),
        (
            "bad_ihl_comes_before_bad_total_length",
            "The header length is judged first.",
            frame(ping(ihl=4, total=0)),
            "drop bad_header_length",
        ),
        (
            "merged_datagrams_come_before_unknown_source",
            "The slow path judges them one by one.",
            frame(ping(**strange) * 2),
            "punt outer_gro / drop trailing_bytes",
        ),
        (
            "truncation_comes_before_unknown_source",
            "Addresses of a broken packet prove nothing.",
            frame(ping(total=100, **strange)),
            "drop truncated",
        ),
        (
            "own_source_comes_before_not_for_us",
            "A claim of our own subnet is an attack or a loop.",
            frame(ping(src="10.244.1.9", dst="8.8.8.8")),
            "drop spoofed_source",
        ),
        (
            "unknown_source_comes_before_not_for_us",
            "Who sends is judged before where to.",
            frame(ping(**strange)),
            "drop unknown_source",
        ),
        (
            "spoofed_source_comes_before_not_for_us",
            "Who sends is judged before where to.",
            frame(ping(src="10.244.3.7", dst="8.8.8.8")),
            "drop spoofed_source",
        ),
        (
            "spoofed_source_comes_before_ttl",
            "Who sends is judged before how far.",
            frame(ping(src="10.244.3.7", ttl=1)),
            "drop spoofed_source",
        ),
        (
            "not_for_us_comes_before_ttl",
            "Where to is judged before how far.",
            frame(ping(dst="8.8.8.8", ttl=1)),
            "drop not_for_us",
        ),
        (
            "ttl_comes_before_ecn",
            "An expired packet is dropped whatever the congestion.",
            frame(ping(ttl=1), tos=CE),
            "punt rejected / drop ttl_expired",
        ),
    ]:
        yield vector(name, why, data, expect)
