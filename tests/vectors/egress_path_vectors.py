"""The egress vectors about the way to the peer: its MTU, its flags, and that there is none."""

from egress_packets import POD_A, datagram, ping, segment
from packets import DF, SCTP, TCP, UDP, fold_sum, ipv4, pseudo_header, sctp
from vector import vector

NARROW, UNREACHABLE, SLOW, FINISHED_ONLY = (f"10.244.{third}.2" for third in (5, 6, 7, 8))
TO_NARROW_PATH, TO_FINISHED_ONLY = "encap 192.168.77.5", "encap 192.168.77.8"


def path_vectors():
    """Vectors whose outcome depends on the route's device, MTU and flags."""
    return [*path_mtu(), *unreachable(), *slow(), *finished_only()]


def path_mtu():
    long, longer = bytes(1400 - 28), bytes(1401 - 28)
    big = bytes(3000)
    for name, why, packet, gso_size, expect in [
        ("as_long_as_the_path_allows_leaves", "1400 bytes fit", datagram(dst=NARROW, payload=long), 0, TO_NARROW_PATH),
        (
            "one_byte_longer_with_df_is_rejected",
            "DF asks for ICMP Fragmentation Needed (RFC 1191)",
            datagram(dst=NARROW, payload=longer, flags=DF),
            0,
            "punt rejected / drop mtu_exceeded",
        ),
        (
            "one_byte_longer_without_df_is_fragmented",
            "Without DF a router fragments (RFC 791)",
            datagram(dst=NARROW, payload=longer, flags=0),
            0,
            "punt path_mtu / fragment",
        ),
        (
            "super_packet_with_segments_that_fit_leaves",
            "20 + 20 + 1360 bytes are 1400",
            segment(dst=NARROW, payload=big, flags=DF),
            1360,
            TO_NARROW_PATH,
        ),
        (
            "super_packet_with_longer_segments_is_rejected",
            "20 + 20 + 1361 bytes are too many",
            segment(dst=NARROW, payload=big, flags=DF),
            1361,
            "punt rejected / drop mtu_exceeded",
        ),
        (
            "super_packet_without_df_is_fragmented",
            "Each of its segments is, after the kernel has cut it",
            segment(dst=NARROW, payload=big, flags=0),
            1361,
            "punt path_mtu / fragment",
        ),
        (
            "super_packet_of_one_short_segment_leaves",
            "No segment is longer than the whole",
            segment(dst=NARROW, flags=DF),
            1400,
            TO_NARROW_PATH,
        ),
    ]:
        yield vector(f"path_mtu_{name}", f"{why}.", packet, expect, gso_size=gso_size)
    yield vector(
        "super_packet_of_sctp_takes_the_slow_path",
        "The kernel does not say how long its segments are.",
        ipv4(POD_A, NARROW, SCTP, sctp(1, 2) + big, flags=DF),
        "punt segmented_datagrams / encap 192.168.77.5",
        gso_size=0xFFFF,
    )
    yield vector(
        "path_mtu_comes_before_finishing",
        "The slow path does both.",
        datagram(dst=NARROW, payload=longer, flags=0),
        "punt path_mtu / fragment",
    )


def unreachable():
    yield vector(
        "peer_without_a_way_is_unreachable",
        "The kernel has no route to the peer.",
        ping(dst=UNREACHABLE),
        "punt rejected / drop peer_unreachable",
    )
    yield vector(
        "ttl_comes_before_an_unreachable_peer",
        "The packet is judged before the way.",
        ping(dst=UNREACHABLE, ttl=1),
        "punt rejected / drop ttl_expired",
    )


def slow():
    yield vector(
        "packet_for_a_slow_peer_takes_the_slow_path",
        "The kernel's IPsec policies decide about it.",
        ping(dst=SLOW),
        "punt slow_peer / encap 192.168.77.7",
    )


def finished_only():
    def partial(proto, place, payload):
        sum_of_header = fold_sum(pseudo_header(POD_A, FINISHED_ONLY, proto, len(payload)))
        payload = payload[:place] + sum_of_header.to_bytes(2, "big") + payload[place + 2 :]
        return ipv4(POD_A, FINISHED_ONLY, proto, payload)

    whole = segment(dst=FINISHED_ONLY)[20:]
    yield vector(
        "finished_packet_for_a_peer_that_finishes_nothing_leaves", "It is complete.", segment(dst=FINISHED_ONLY), TO_FINISHED_ONLY
    )
    for name, packet in [
        ("tcp", partial(TCP, 16, whole)),
        ("udp", partial(UDP, 6, datagram(dst=FINISHED_ONLY)[20:])),
    ]:
        yield vector(
            f"unfinished_{name}_for_a_peer_that_finishes_nothing_is_punted",
            "Its checksum is the bare sum of the pseudo header.",
            packet,
            f"punt unfinished / {TO_FINISHED_ONLY}",
        )
    yield vector(
        "super_packet_for_a_peer_that_finishes_nothing_is_punted",
        "The slow path gets it in segments.",
        segment(dst=FINISHED_ONLY, payload=bytes(3000)),
        f"punt unfinished / {TO_FINISHED_ONLY}",
        gso_size=1000,
    )
