"""The egress vectors that decide: shape, source, destination and TTL of an inner packet, and which comes first."""

from egress_carried_vectors import carried_vectors
from egress_path_vectors import path_vectors
from egress_packets import HOST_A, POD_A, POD_B, TO_B, TO_C, TO_NARROW, TO_WIDE, datagram, ping
from packets import ICMP, IGMP, UDP, ipv4
from vector import vector


def vectors():
    """All egress vectors, in the order of the rules."""
    return [*shape(), *sources(), *destinations(), *ttl(), *carried_vectors(), *path_vectors(), *precedence()]


def shape():
    router_solicitation = bytes.fromhex(
        "6000000000083afffe800000000000000000000000000001ff02000000000000000000000000000285007bb900000000"
    )
    bare = ipv4(POD_A, POD_B, UDP)
    record_route = bytes([7, 39, 4]) + bytes(36) + b"\0"
    whole = ping()
    yield vector("empty_packet_is_truncated", "There is no byte that could name a version.", b"", "drop truncated")
    yield vector(
        "one_byte_of_version_4_is_truncated",
        "A header has at least 20 bytes (RFC 791 section 3.1).",
        b"\x45",
        "drop truncated",
    )
    yield vector(
        "nineteen_bytes_of_version_6_are_truncated",
        "No IP header is shorter than 20 bytes, whatever its version.",
        b"\x60" + bytes(18),
        "drop truncated",
    )
    yield vector(
        "one_byte_of_version_0_is_truncated", "There is no header to have a version.", b"\x00", "drop truncated"
    )
    yield vector(
        "router_solicitation_is_ipv6",
        "The kernel sends one by itself on a new device; flannel mangles IPv6.",
        router_solicitation,
        "drop ipv6",
    )
    yield vector("version_5_is_bad_version", "RFC 791 defines version 4 only.", ping(version=5), "drop bad_version")
    yield vector(
        "version_15_is_bad_version",
        "The highest version nibble is no IPv4 either.",
        ping(version=15),
        "drop bad_version",
    )
    yield vector("nineteen_bytes_are_truncated", "One byte less than a header.", bare[:19], "drop truncated")
    yield vector(
        "twenty_bytes_are_a_whole_packet", "A header without payload is legal, and has no ports to hash.", bare, TO_B
    )
    yield vector(
        "ihl_0_is_bad", "A header has at least 5 words (RFC 791 section 3.1).", ping(ihl=0), "drop bad_header_length"
    )
    yield vector("ihl_4_is_bad", "One word less than a header.", ping(ihl=4), "drop bad_header_length")
    yield vector(
        "ihl_6_beyond_the_packet_is_truncated",
        "The header claims 24 bytes and 20 are there.",
        ipv4(POD_A, POD_B, UDP, ihl=6),
        "drop truncated",
    )
    yield vector(
        "ihl_15_one_byte_short_is_truncated",
        "The header claims 60 bytes and 59 are there.",
        ipv4(POD_A, POD_B, ICMP, options=record_route)[:59],
        "drop truncated",
    )
    yield vector(
        "ihl_15_exactly_is_carried",
        "The longest header, 60 bytes, without payload.",
        ipv4(POD_A, POD_B, ICMP, options=record_route),
        TO_B,
    )
    yield vector(
        "options_are_carried_untouched",
        "An overlay is one IP hop that does not process inner options; a no-operation list.",
        datagram(options=b"\x01\x01\x01\x00"),
        TO_B,
    )
    yield vector(
        "record_route_is_carried_untouched",
        "The longest option list with a payload behind it; ports start at byte 60.",
        datagram(options=record_route),
        TO_B,
    )
    yield vector(
        "total_length_0_is_bad",
        "Zero means a super-packet only when more than 65535 bytes are there.",
        ping(total=0),
        "drop bad_total_length",
    )
    yield vector(
        "total_length_19_is_bad",
        "Total length covers the header (RFC 791 section 3.1).",
        ping(total=19),
        "drop bad_total_length",
    )
    yield vector(
        "total_length_below_options_is_bad",
        "Total length 20 does not cover a header of 24 bytes.",
        ipv4(POD_A, POD_B, ICMP, options=b"\x01\x01\x01\x00", total=20),
        "drop bad_total_length",
    )
    yield vector(
        "total_length_one_beyond_the_packet_is_truncated",
        "flannel forwards such a packet; its end is missing.",
        ping(total=len(whole) + 1),
        "drop truncated",
    )
    yield vector(
        "total_length_65535_of_a_short_packet_is_truncated",
        "The claim must not be taken for a buffer size.",
        ping(total=0xFFFF),
        "drop truncated",
    )
    yield vector(
        "one_trailing_byte_is_dropped",
        "The receiver could not tell it from a merged datagram.",
        whole + b"\0",
        "drop trailing_bytes",
    )
    yield vector(
        "ethernet_padding_is_trailing_bytes",
        "A tun device carries no padding, so a sender that adds it is broken.",
        ping(payload=b"") + bytes(18),
        "drop trailing_bytes",
    )


def sources():
    own, outside, inside = "its own subnet", "an address outside the overlay", "an overlay address of another host"
    for src, what, expect in [
        ("10.244.1.0", own, TO_B),
        ("10.244.1.1", own, TO_B),
        ("10.244.1.255", own, TO_B),
        ("10.244.0.255", inside, "drop spoofed_source"),
        ("10.244.2.0", inside, "drop spoofed_source"),
        ("10.244.3.7", inside, "drop spoofed_source"),
        ("10.244.77.5", inside, "drop spoofed_source"),
        ("10.244.0.0", inside, "drop spoofed_source"),
        ("10.244.255.255", inside, "drop spoofed_source"),
        ("10.243.255.255", outside, TO_B),
        ("10.245.0.0", outside, TO_B),
        ("192.168.77.1", outside, TO_B),
    ]:
        verb = "is_spoofed" if expect.startswith("drop") else "is_carried"
        tail = "receivers decide" if what == outside else "only the host that holds the subnet may send from it"
        yield vector(
            f"source_{src.replace('.', '_')}_{verb}", f"The host sends from {what}: {tail}.", ping(src=src), expect
        )


def destinations():
    for dst, why, expect in [
        ("10.244.2.0", "the network address of a subnet is the peer's own device address", TO_B),
        ("10.244.2.255", "the broadcast address of a subnet is routed like any other", TO_B),
        ("10.244.3.0", "the next subnet belongs to the next peer", TO_C),
        ("10.244.3.255", "the last address of the subnet", TO_C),
        ("10.244.4.0", "one address beyond the subnet", "punt rejected / drop no_route"),
        ("10.244.77.1", "an address of the overlay that nobody holds", "punt rejected / drop no_route"),
        ("10.244.127.255", "one address before the /17", "punt rejected / drop no_route"),
        ("10.244.128.0", "the first address of the /17", TO_WIDE),
        ("10.244.199.255", "the last address of the /17 before the /24 inside it", TO_WIDE),
        ("10.244.200.0", "the /24 inside the /17 wins from its first address", TO_NARROW),
        ("10.244.200.255", "the /24 inside the /17 wins to its last address", TO_NARROW),
        ("10.244.201.0", "behind the /24 the /17 is back", TO_WIDE),
        ("10.244.255.255", "the last address of the /17 and of the overlay", TO_WIDE),
        ("10.244.1.9", "an address of our own subnet is never wrapped, or it would loop", "punt rejected / drop no_route"),
        ("10.244.1.0", "the first address of our own subnet", "punt rejected / drop no_route"),
        ("10.244.1.255", "the last address of our own subnet", "punt rejected / drop no_route"),
        ("10.245.0.1", "an address beyond the overlay", "punt rejected / drop no_route"),
        ("255.255.255.255", "limited broadcast has no peer, and no answer", "drop no_route"),
    ]:
        verb = "has_no_route" if expect.endswith("no_route") else f"goes_to_peer_{expect.rsplit('.', 1)[1]}"
        yield vector(
            f"destination_{dst.replace('.', '_')}_{verb}", f"Longest prefix match: {why}.", ping(dst=dst), expect
        )
    yield vector(
        "igmp_report_has_no_route",
        "The kernel sends one by itself, with TTL 1 and router alert (RFC 3376).",
        ipv4(
            HOST_A,
            "224.0.0.22",
            IGMP,
            bytes.fromhex("2200f9fb0000000104000000e00000fb"),
            ttl=1,
            tos=0xC0,
            options=b"\x94\x04\0\0",
        ),
        "drop no_route",
    )
    error = bytes([3, 1, 0, 0]) + bytes(4) + ping()[:28]
    for name, why, packet, expect in [
        ("icmp_error", "An ICMP error is never answered with another", ipv4(POD_A, "10.244.77.1", ICMP, error), "drop no_route"),
        ("icmp_of_unknown_type", "It may be an error", ipv4(POD_A, "10.244.77.1", ICMP, bytes([40]) + bytes(7)), "drop no_route"),
        ("icmp_without_type", "It may be an error", ipv4(POD_A, "10.244.77.1", ICMP), "drop no_route"),
        ("later_fragment", "One answer to the first fragment is enough", datagram(dst="10.244.77.1", flags=0, offset=2), "drop no_route"),
        ("timestamp_request", "A query is answered like any packet", ipv4(POD_A, "10.244.77.1", ICMP, bytes([13]) + bytes(19)), "punt rejected / drop no_route"),
    ]:
        yield vector(f"{name}_without_a_route", f"{why} (RFC 1812 section 4.3.2.7).", packet, expect)


def ttl():
    yield vector(
        "ttl_zero_is_never_wrapped",
        "flannel wraps it around to 255; RFC 1812 section 5.3.1 discards it.",
        ping(ttl=0),
        "punt rejected / drop ttl_expired",
    )
    yield vector(
        "ttl_one_is_never_wrapped",
        "One decrement makes it 0 (RFC 1812 section 5.3.1).",
        ping(ttl=1),
        "punt rejected / drop ttl_expired",
    )
    yield vector(
        "ttl_two_leaves_with_one",
        "The lowest TTL that survives this host, whatever the next one does.",
        ping(ttl=2),
        TO_B,
    )
    yield vector("ttl_64_leaves_with_63", "The outer TTL of 64 does not depend on it.", ping(ttl=64), TO_B)
    yield vector("ttl_255_leaves_with_254", "The highest TTL.", ping(ttl=255), TO_B)


def precedence():
    yield vector(
        "bad_ihl_comes_before_bad_total_length",
        "The header length is judged first.",
        ping(ihl=4, total=0),
        "drop bad_header_length",
    )
    yield vector(
        "header_beyond_the_packet_comes_before_bad_total_length",
        "Total length 20 is judged after 60 bytes are missing.",
        ipv4(POD_A, POD_B, ICMP, ihl=15),
        "drop truncated",
    )
    yield vector(
        "truncation_comes_before_spoofing",
        "Addresses of a broken packet prove nothing.",
        ping(src="10.244.3.7", total=100),
        "drop truncated",
    )
    yield vector(
        "trailing_bytes_come_before_spoofing",
        "Addresses of a broken packet prove nothing.",
        ping(src="10.244.3.7") + b"\0",
        "drop trailing_bytes",
    )
    yield vector(
        "spoofing_comes_before_no_route",
        "Who sends is judged before where to.",
        ping(src="10.244.3.7", dst="10.244.77.1"),
        "drop spoofed_source",
    )
    yield vector(
        "spoofing_comes_before_ttl",
        "Who sends is judged before how far.",
        ping(src="10.244.3.7", ttl=1),
        "drop spoofed_source",
    )
    yield vector(
        "no_route_comes_before_ttl",
        "Unreachable is the truer answer to a traceroute.",
        ping(dst="10.244.77.1", ttl=1),
        "punt rejected / drop no_route",
    )
