"""Says what must happen to a packet: the rules of the packet core, written a second time and in another language.

It follows the RFCs and the rules in plain integers and shares no code, no table and no constant with the product, so
that the two can disagree. `egress` and `ingress` return the verdict of the fast path (xdp, tc), that of the slow path
(tun), and who disposes of the packet on the tun rung.
"""

import ipaddress
import struct

from packets import CE, DF, ECT0, ECT1, ICMP, MF, NOT_ECT, SCTP, TCP, UDP, checksum, fold_sum

CONFIG = {
    "public_ip": "192.168.77.1",
    "mac": "020000000001",
    "network": "10.244.0.0/16",
    "subnet": "10.244.1.0/24",
    "port": 8285,
}
ROUTES = [
    {"subnet": "10.244.2.0/24", "peer": "192.168.77.2"},
    {"subnet": "10.244.3.0/24", "peer": "192.168.77.3"},
    {"subnet": "10.244.128.0/17", "peer": "192.168.77.9"},
    {"subnet": "10.244.200.0/24", "peer": "192.168.77.4"},
    {"subnet": "10.244.5.0/24", "peer": "192.168.77.5", "mtu": 1400},
    {"subnet": "10.244.6.0/24", "peer": "192.168.77.6", "ifindex": 0},
    {"subnet": "10.244.7.0/24", "peer": "192.168.77.7", "slow_path": True},
    {"subnet": "10.244.8.0/24", "peer": "192.168.77.8", "finished_only": True},
]

PUBLIC_IP = ipaddress.IPv4Address(CONFIG["public_ip"])
NETWORK = ipaddress.IPv4Network(CONFIG["network"])
SUBNET = ipaddress.IPv4Network(CONFIG["subnet"])
ROUTE_TABLE = [(ipaddress.IPv4Network(r["subnet"]), r) for r in ROUTES]

DROP_REASONS = {
    "egress": {
        "truncated",
        "ipv6",
        "bad_version",
        "bad_header_length",
        "bad_total_length",
        "trailing_bytes",
        "spoofed_source",
        "no_route",
        "ttl_expired",
        "too_long",
        "mtu_exceeded",
        "peer_unreachable",
    },
    "ingress": {
        "truncated",
        "ipv6",
        "bad_version",
        "bad_header_length",
        "bad_total_length",
        "trailing_bytes",
        "spoofed_source",
        "unknown_source",
        "not_for_us",
        "ttl_expired",
        "ecn_congestion",
    },
}
PUNT_REASONS = {
    "egress": {"segmented_datagrams", "too_long", "rejected", "path_mtu", "unfinished", "slow_peer"},
    "ingress": {
        "rejected",
        "slow_peer",
        "outer_options",
        "outer_fragment",
        "outer_header_checksum",
        "outer_length",
        "outer_checksum_partial",
        "outer_gro",
    },
}


def drop(reason):
    return {"verdict": "drop", "reason": reason}


def punt(reason):
    return {"verdict": "punt", "reason": reason}


PASS = {"verdict": "pass"}


def egress(packet, gso_size=0):
    """The verdicts on an inner packet that was routed to the overlay device, in segments with this payload if not 0."""
    fault = inner_fault(packet)
    if fault:
        return drop(fault), drop(fault), "shell"
    if len(packet) > u16(packet, 2):
        return drop("trailing_bytes"), drop("trailing_bytes"), "shell"
    slow = egress_well_formed(packet, gso_size)
    return fast_path(packet, slow, gso_size), slow, "shell"


def fast_path(packet, slow, gso_size):
    """The verdict of a program where the slow path's is `slow`: the slow path answers, fragments and finishes."""
    reason = slow.get("reason")
    if slow["verdict"] == "encap" and gso_size and packet[9] not in (TCP, UDP):
        return punt("segmented_datagrams")
    if reason in ("no_route", "ttl_expired", "peer_unreachable", "mtu_exceeded") and may_answer(packet):
        return punt("rejected")
    if reason == "too_long":
        return punt("too_long")
    if slow["verdict"] == "fragment":
        return punt("path_mtu")
    if slow["verdict"] == "encap":
        hop = route(address(packet, 16))
        if hop.get("slow_path"):
            return punt("slow_peer")
        if hop.get("finished_only") and (gso_size or inner_looks_partial(packet)):
            return punt("unfinished")
    return slow


def may_answer(packet):
    """Whether a router may answer with an ICMP error (RFC 1812 section 4.3.2.7)."""
    for at in (12, 16):
        if packet[at] in (0, 127) or packet[at] >= 224:
            return False
    if u16(packet, 6) & 0x1FFF:
        return False
    header = (packet[0] & 15) * 4
    return packet[9] != ICMP or (len(packet) > header + 1 and packet[header] in (0, 8, 13, 14, 15, 16, 17, 18))


def inner_looks_partial(packet):
    """Whether the checksum of TCP or UDP is the one that a sender leaves for its device to finish."""
    header = (packet[0] & 15) * 4
    place = header + {TCP: 16, UDP: 6}.get(packet[9], 0)
    if place == header or u16(packet, 6) & 0x3FFF or len(packet) < place + 2:
        return False
    pseudo_header = packet[12:20] + struct.pack("!HH", packet[9], len(packet) - header)
    return u16(packet, place) != 0 and u16(packet, place) == fold_sum(pseudo_header)


def longest_segment(packet, gso_size):
    """The length of the longest packet that leaves, with headers."""
    header = (packet[0] & 15) * 4
    if not gso_size:
        return len(packet)
    transport = 8
    if packet[9] == TCP:
        transport = (packet[header + 12] >> 4) * 4 if len(packet) > header + 13 else 60
    return min(header + transport + gso_size, len(packet))


def egress_well_formed(packet, gso_size):
    src, dst = address(packet, 12), address(packet, 16)
    if src in NETWORK and src not in SUBNET:
        return drop("spoofed_source")
    hop = route(dst)
    if dst in SUBNET or hop is None:
        return drop("no_route")
    if packet[8] <= 1:
        return drop("ttl_expired")
    if hop.get("ifindex") == 0:
        return drop("peer_unreachable")
    if len(packet) + 28 > 0xFFFF:
        return drop("too_long")
    is_cut_later = gso_size and packet[9] not in (TCP, UDP)
    if not is_cut_later and longest_segment(packet, gso_size) > hop.get("mtu", 0xFFFF):
        return drop("mtu_exceeded") if u16(packet, 6) & DF else {"verdict": "fragment"}
    peer = ipaddress.IPv4Address(hop["peer"])
    inner = rewrite(packet, tos=packet[1])
    udp = struct.pack("!HHHH", source_port(packet), CONFIG["port"], 8 + len(inner), 0)
    outer = struct.pack(
        "!BBHHHBBH4s4s", 0x45, packet[1], 28 + len(inner), 0, DF, 64, UDP, 0, PUBLIC_IP.packed, peer.packed
    )
    outer = outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:]
    return {"verdict": "encap", "bytes": (outer + udp + inner).hex()}


def ingress(frame):
    """The verdicts on a frame that was received on the underlay device."""
    header = 14 + (frame[14] & 15) * 4 if len(frame) > 14 else 0
    if not is_ours(frame, header):
        return PASS, PASS, "kernel"
    refusal = outer_refusal(frame)
    if refusal:
        return punt(refusal), punt(refusal), "kernel"

    datagram = frame[34 : 14 + u16(frame, 16)]
    slow = decap(datagram[8:], address(frame, 26), frame[15])
    tun = "shell" if reaches_socket(frame, datagram) else "kernel"
    if looks_partial(frame, datagram):
        return punt("outer_checksum_partial"), slow, tun
    # The merged payload of receive offload begins with a whole inner packet and goes on after it.
    if slow == drop("trailing_bytes"):
        return punt("outer_gro"), slow, tun
    if slow == drop("ttl_expired") and may_answer(datagram[8:]):
        return punt("rejected"), slow, tun
    if slow["verdict"] == "decap" and route(address(datagram[8:], 12)).get("slow_path"):
        return punt("slow_peer"), slow, tun
    return slow, slow, tun


def is_ours(frame, udp):
    """Whether the frame is an IPv4 UDP datagram (or its first fragment) to this host's overlay port."""
    if len(frame) < 34 or u16(frame, 12) != 0x0800 or frame[14] >> 4 != 4 or frame[14] & 15 < 5:
        return False
    if frame[23] != UDP or address(frame, 30) != PUBLIC_IP:
        return False
    if u16(frame, 20) & 0x1FFF or len(frame) < udp + 8:
        return False
    # A device receives frames for its own address and for groups; a promiscuous one shows others, too.
    if frame[:6].hex() != CONFIG["mac"] and not frame[0] & 1:
        return False
    return u16(frame, udp + 2) == CONFIG["port"]


def outer_refusal(frame):
    """Why the outer headers are left to the kernel's IP and UDP layers."""
    if frame[14] & 15 > 5:
        return "outer_options"
    if u16(frame, 20) & MF:
        return "outer_fragment"
    if fold_sum(frame[14:34]) != 0xFFFF:
        return "outer_header_checksum"
    outer_total, udp_length = u16(frame, 16), u16(frame, 38)
    if outer_total > len(frame) - 14 or udp_length < 8 or udp_length != outer_total - 20:
        return "outer_length"
    return None


def pseudo(frame, datagram):
    return frame[26:34] + struct.pack("!HH", UDP, len(datagram))


def looks_partial(frame, datagram):
    """Whether the UDP checksum is the one that a sender leaves for its device to finish."""
    return u16(datagram, 6) != 0 and u16(datagram, 6) == fold_sum(pseudo(frame, datagram))


def reaches_socket(frame, datagram):
    """Whether the kernel hands the datagram to the socket: it refuses wrong checksums and its own address as source."""
    if address(frame, 26) == PUBLIC_IP:
        return False
    unchecked = u16(datagram, 6) == 0 or looks_partial(frame, datagram)
    return unchecked or fold_sum(pseudo(frame, datagram) + datagram) == 0xFFFF


def decap(payload, outer_src, outer_tos):
    """What is done with the payload of a datagram that reached the overlay port."""
    fault = inner_fault(payload)
    if fault:
        return drop(fault)
    if len(payload) > u16(payload, 2):
        return drop("trailing_bytes")

    src, dst = address(payload, 12), address(payload, 16)
    if src in SUBNET:
        return drop("spoofed_source")
    if route(src) is None:
        return drop("unknown_source")
    if ipaddress.IPv4Address(route(src)["peer"]) != outer_src:
        return drop("spoofed_source")
    if dst not in SUBNET:
        return drop("not_for_us")
    if payload[8] <= 1:
        return drop("ttl_expired")

    ecn = decap_ecn(payload[1] & 3, outer_tos & 3)
    if ecn is None:
        return drop("ecn_congestion")
    return {"verdict": "decap", "bytes": rewrite(payload, tos=payload[1] & 0xFC | ecn).hex()}


def decap_ecn(inner, outer):
    """The ECN field after decapsulation, or None for drop (RFC 6040 section 4.2, figure 4)."""
    return {
        NOT_ECT: {NOT_ECT: NOT_ECT, ECT0: NOT_ECT, ECT1: NOT_ECT, CE: None},
        ECT0: {NOT_ECT: ECT0, ECT0: ECT0, ECT1: ECT1, CE: CE},
        ECT1: {NOT_ECT: ECT1, ECT0: ECT1, ECT1: ECT1, CE: CE},
        CE: {NOT_ECT: CE, ECT0: CE, ECT1: CE, CE: CE},
    }[inner][outer]


def inner_fault(packet):
    """What keeps `packet` from being an IPv4 packet; bytes after its end are not looked at here."""
    if len(packet) < 20:
        return "truncated"
    if packet[0] >> 4 != 4:
        return "ipv6" if packet[0] >> 4 == 6 else "bad_version"
    header, total = (packet[0] & 15) * 4, u16(packet, 2)
    if header < 20:
        return "bad_header_length"
    if header > len(packet):
        return "truncated"
    if total < header:
        return "bad_total_length"
    return "truncated" if total > len(packet) else None


def rewrite(packet, tos):
    """`packet` with its TTL one lower and the given TOS, the checksum updated by equation 3 of RFC 1624."""
    after = bytearray(packet)
    after[1] = tos
    after[8] -= 1
    total = u16(packet, 10) ^ 0xFFFF
    for at in (0, 8):
        total += (u16(packet, at) ^ 0xFFFF) + u16(after, at)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", after, 10, total ^ 0xFFFF)
    return bytes(after)


def source_port(packet):
    """The outer source port: a hash of addresses, protocol and, where the packet shows them, ports."""
    header, proto = (packet[0] & 15) * 4, packet[9]
    whole = u16(packet, 6) & 0x3FFF == 0
    ports = 0
    if proto in (TCP, UDP, SCTP) and whole and len(packet) >= header + 4:
        (ports,) = struct.unpack_from("!I", packet, header)
    src, dst = struct.unpack_from("!II", packet, 12)
    h = src * 0x9E3779B1 % 2**32
    h = rotate_left(h ^ dst, 15) * 0x85EBCA6B % 2**32
    h = rotate_left(h ^ ports, 13) * 0xC2B2AE35 % 2**32
    h ^= proto
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    return 49152 + (h >> 18)


def rotate_left(value, bits):
    return (value << bits | value >> (32 - bits)) % 2**32


def route(destination):
    """The route with the longest prefix that holds `destination`."""
    held = [(subnet.prefixlen, hop) for subnet, hop in ROUTE_TABLE if destination in subnet]
    return max(held, key=lambda entry: entry[0])[1] if held else None


def address(data, at):
    return ipaddress.IPv4Address(bytes(data[at : at + 4]))


def u16(data, at):
    return struct.unpack_from("!H", data, at)[0]
