"""The ingress vectors about the outer headers: whose frame it is, what the kernel gets, who is understood."""

import struct

from ingress_frames import OUR_IP, PEER_IP, POD_A, POD_B, datagram, frame, outer, ping
from ingress_inner_vectors import inner_vectors
from oracle import source_port
from packets import (
    DF,
    IPIP,
    MF,
    RESERVED,
    TCP,
    UDP,
    UDPLITE,
    ethernet,
    fold_sum,
    ipv4,
    pattern,
    pseudo_header,
    tcp,
    udp,
)
from vector import vector

NOP4 = b"\x01\x01\x01\x00"


def vectors():
    """All ingress vectors, in the order of the rules."""
    return [*not_ours(), *groups(), *left_to_the_kernel(), *partial_checksums(), *senders(), *inner_vectors()]


def passed(name, why, packet):
    return vector(name, why, packet, "pass", tun="kernel")


def not_ours():
    whole = frame(ping())
    yield passed("empty_frame_passes", "Nothing to judge.", b"")
    yield passed("ethernet_header_alone_passes", "14 bytes hold no IP header.", whole[:14])
    yield passed("frame_of_33_bytes_passes", "One byte less than an IPv4 header.", whole[:33])
    yield passed("frame_of_34_bytes_passes", "An IPv4 header for us, without the UDP header.", whole[:34])
    yield passed("frame_of_41_bytes_passes", "One byte less than a UDP header.", whole[:41])
    yield passed(
        "arp_passes", "Another EtherType.", ethernet(bytes.fromhex("0001080006040001") + bytes(20), ethertype=0x0806)
    )
    yield passed(
        "frame_for_another_mac_passes",
        "A promiscuous device shows it; the kernel does not take it (net/ethernet/eth.c: PACKET_OTHERHOST).",
        ethernet(whole[14:], to=bytes.fromhex("020000000003")),
    )
    yield passed(
        "frame_for_a_mac_one_bit_off_passes", "All 48 bits count.", ethernet(whole[14:], to=bytes.fromhex("020000000000"))
    )
    yield passed("ipv6_passes", "Another EtherType.", ethernet(b"\x60" + whole[15:], ethertype=0x86DD))
    yield passed("ethertype_0801_passes", "Both bytes of the EtherType count.", ethernet(whole[14:], ethertype=0x0801))
    yield passed(
        "vlan_tagged_frame_passes",
        "The VLAN device on top receives it untagged (IEEE 802.1Q).",
        ethernet(b"\x00\x2a\x08\x00" + whole[14:], ethertype=0x8100),
    )
    yield passed(
        "service_tagged_frame_passes",
        "A second tag changes nothing (IEEE 802.1ad).",
        ethernet(b"\x00\x2a\x08\x00" + whole[14:], ethertype=0x88A8),
    )
    yield passed(
        "outer_version_6_passes", "EtherType and version disagree; the kernel discards it.", frame(ping(), version=6)
    )
    yield passed("outer_ihl_4_passes", "No IPv4 header is that short; the kernel discards it.", frame(ping(), ihl=4))
    yield passed("outer_ihl_0_passes", "A header of no length must not stop the parser.", frame(ping(), ihl=0))
    yield passed(
        "tcp_to_our_port_passes",
        "The port counts for UDP only.",
        ethernet(ipv4(PEER_IP, OUR_IP, TCP, tcp(PEER_IP, OUR_IP, 40000, 8285, pattern(8)))),
    )
    yield passed(
        "udp_lite_to_our_port_passes",
        "UDP-Lite looks alike and is another protocol (RFC 3828).",
        ethernet(ipv4(PEER_IP, OUR_IP, UDPLITE, udp(PEER_IP, OUR_IP, 40000, 8285, ping()))),
    )
    yield passed("ipip_passes", "The same inner packet without UDP.", ethernet(ipv4(PEER_IP, OUR_IP, IPIP, ping())))
    yield passed(
        "destination_of_another_host_passes",
        "It is forwarded or discarded by the kernel.",
        frame(ping(), dst="192.168.77.2"),
    )
    yield passed(
        "destination_one_bit_off_passes", "All 32 bits of the address count.", frame(ping(), dst="192.168.77.0")
    )
    yield passed("underlay_broadcast_passes", "Overlay packets are unicast.", frame(ping(), dst="192.168.77.255"))
    yield passed(
        "fragment_at_offset_1_passes", "It has no UDP header: the kernel reassembles.", frame(ping(), flags=0, offset=1)
    )
    yield passed(
        "middle_fragment_passes", "It has no UDP header: the kernel reassembles.", frame(ping(), flags=MF, offset=185)
    )
    yield passed(
        "fragment_at_offset_4096_passes",
        "The highest bit of the offset alone makes a fragment.",
        frame(ping(), flags=0, offset=0x1000),
    )
    yield passed(
        "fragment_at_the_highest_offset_passes",
        "All 13 bits of the offset count.",
        frame(ping(), flags=0, offset=0x1FFF),
    )
    yield passed(
        "fragment_with_options_passes",
        "The offset is judged before the options.",
        frame(ping(), flags=0, offset=1, options=NOP4),
    )
    yield passed("port_8284_passes", "One below ours.", frame(ping(), dport=8284))
    yield passed("port_8286_passes", "One above ours.", frame(ping(), dport=8286))
    yield passed("byte_swapped_port_passes", "8285 read in the wrong byte order.", frame(ping(), dport=0x5D20))
    yield passed("vxlan_port_passes", "Another overlay on the same host.", frame(ping(), dport=8472))
    yield passed(
        "source_port_8285_alone_passes", "The destination port decides.", frame(ping(), sport=8285, dport=40000)
    )
    yield passed(
        "options_that_read_like_our_port_pass",
        "Ports stand behind the options, not at byte 34.",
        frame(ping(), dport=53, options=struct.pack("!BBH", 0x01, 0x01, 8285)),
    )
    yield passed(
        "udp_header_behind_60_bytes_not_in_the_frame_passes",
        "IHL 15 puts the UDP header beyond the frame.",
        outer(bytes(29), ihl=15),
    )


def groups():
    """Frames for a group are received; of what they carry, IP decides (RFC 1122 section 3.2.1.3)."""
    packet = frame(ping())[14:]
    for name, mac in [("broadcast", "ffffffffffff"), ("multicast", "01005e000001"), ("local_group", "030000000001")]:
        why = "The kernel hands it to IP, which takes it for its unicast address."
        yield vector(f"frame_to_a_{name}_mac_is_ours", why, ethernet(packet, to=bytes.fromhex(mac)), "decap")


def left_to_the_kernel():
    packet = ping()
    length = 8 + len(packet)

    def punted(name, why, data, reason):
        return vector(name, why, data, f"punt {reason}", tun="kernel")

    yield punted(
        "outer_options_are_punted",
        "The kernel processes options and hands the payload to the socket.",
        frame(packet, options=NOP4),
        "outer_options",
    )
    yield punted(
        "longest_outer_header_is_punted",
        "IHL 15 with the UDP header right behind it.",
        frame(packet, options=b"\x01" * 39 + b"\0"),
        "outer_options",
    )
    yield punted(
        "options_come_before_fragment",
        "Both are the kernel's; one reason is counted.",
        frame(packet, options=NOP4, flags=MF),
        "outer_options",
    )
    yield punted(
        "first_outer_fragment_is_punted",
        "The kernel reassembles, and the socket receives the whole.",
        frame(packet, flags=MF, total=20 + length - 4),
        "outer_fragment",
    )
    yield punted(
        "fragment_comes_before_length",
        "A first fragment always disagrees with its UDP length.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, packet, length=1480, csum=0), flags=MF),
        "outer_fragment",
    )
    yield punted(
        "outer_fragment_with_df_is_punted",
        "A contradiction that the kernel settles.",
        frame(packet, flags=DF | MF),
        "outer_fragment",
    )
    yield punted(
        "outer_total_one_beyond_the_frame_is_punted",
        "A byte is missing; the kernel counts and discards.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, packet, length=length + 1, csum=0), total=20 + length + 1),
        "outer_length",
    )
    yield punted(
        "outer_total_65535_of_a_short_frame_is_punted",
        "The claim must not be taken for a buffer size.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, packet, length=65515, csum=0), total=65535),
        "outer_length",
    )
    yield punted(
        "outer_total_0_is_punted",
        "A super-packet of the kernel's own states no length.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, packet, length=0, csum=0), total=0),
        "outer_length",
    )
    yield punted(
        "outer_total_19_with_udp_65535_is_punted",
        "19 - 20 is 65535 in 16 bits: the comparison must not wrap.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, packet, length=65535, csum=0), total=19),
        "outer_length",
    )
    yield punted(
        "udp_length_0_is_punted",
        "Zero is legal for IPv6 jumbograms only (RFC 2675 section 4).",
        frame(packet, udp_length=0),
        "outer_length",
    )
    yield punted(
        "udp_length_7_is_punted", "UDP length covers its header (RFC 768).", frame(packet, udp_length=7), "outer_length"
    )
    yield punted(
        "udp_length_7_is_punted_although_total_agrees",
        "20 + 7 = 27: agreement is not enough.",
        outer(udp(PEER_IP, OUR_IP, 40000, 8285, length=7, csum=0), total=27),
        "outer_length",
    )
    yield punted(
        "udp_length_one_above_the_total_is_punted",
        "The kernel discards a short datagram.",
        frame(packet, udp_length=length + 1),
        "outer_length",
    )
    yield punted(
        "udp_length_one_below_the_total_is_punted",
        "The kernel trims the datagram to its UDP length.",
        frame(packet, udp_length=length - 1),
        "outer_length",
    )
    yield punted(
        "udp_length_one_below_in_a_padded_frame_is_punted",
        "The comparison is with the total length, not with the frame.",
        frame(packet, udp_length=length - 1) + bytes(4),
        "outer_length",
    )


def partial_checksums():
    inner = datagram(src=POD_B, dst=POD_A)

    def partial(packet, **fields):
        return frame(packet, udp_csum=partial_of(packet), **fields)

    def partial_of(packet):
        return fold_sum(pseudo_header(PEER_IP, OUR_IP, UDP, 8 + len(packet)))

    why = "A sender on the same machine leaves the checksum to a device that never finishes it"
    yield vector(
        "partial_outer_checksum_is_punted",
        f"{why}; the socket receives it all the same.",
        partial(inner),
        "punt outer_checksum_partial / decap",
    )
    yield vector(
        "partial_outer_checksum_of_an_expired_ttl_is_dropped_later",
        f"{why}; the inner packet is judged behind the socket.",
        partial(ping(src=POD_B, dst=POD_A, ttl=1)),
        "punt outer_checksum_partial / drop ttl_expired",
    )
    yield vector(
        "partial_outer_checksum_comes_before_merged_datagrams",
        f"{why}; one reason is counted.",
        partial(inner + inner),
        "punt outer_checksum_partial / drop trailing_bytes",
    )
    yield vector(
        "partial_outer_checksum_of_an_empty_datagram_is_punted",
        f"{why}; the payload is not looked at before.",
        partial(b""),
        "punt outer_checksum_partial / drop truncated",
    )
    yield vector(
        "partial_outer_checksum_of_ipv6_is_punted",
        f"{why}; the payload is not looked at before.",
        partial(b"\x60" + bytes(39)),
        "punt outer_checksum_partial / drop ipv6",
    )
    yield vector(
        "outer_length_comes_before_partial_checksum",
        "Lengths are judged first.",
        partial(inner, udp_length=9 + len(inner)),
        "punt outer_length",
        tun="kernel",
    )
    yield vector(
        "complemented_pseudo_header_sum_is_not_partial",
        "A partial checksum is the sum itself, not its complement.",
        frame(inner, udp_csum=partial_of(inner) ^ 0xFFFF),
        "decap",
        tun="kernel",
    )
    yield vector(
        "pseudo_header_sum_plus_one_is_not_partial",
        "All 16 bits count.",
        frame(inner, udp_csum=partial_of(inner) + 1),
        "decap",
        tun="kernel",
    )
    sport = next(
        p
        for p in range(49152, 65536)
        if udp(PEER_IP, OUR_IP, p, 8285, inner)[6:8] == struct.pack("!H", partial_of(inner))
    )
    yield vector(
        "finished_checksum_that_reads_like_a_partial_one_is_punted",
        "One datagram in 65536 is right and looks unfinished; it takes the slow path and is not lost.",
        frame(inner, sport=sport, udp_csum=None),
        "punt outer_checksum_partial / decap",
    )


def senders():
    inner = datagram(src=POD_B, dst=POD_A)
    zero_sum = next(p for p in range(49152, 65536) if udp(PEER_IP, OUR_IP, p, 8285, inner)[6:8] == b"\xff\xff")
    yield vector(
        "own_form_is_decapsulated", "Hashed source port, no UDP checksum, DF, id 0, TTL 64.", frame(inner), "decap"
    )
    yield vector(
        "flannel_form_is_decapsulated",
        "Source port 8285, a finished checksum, an id, no DF, TOS 0.",
        frame(inner, sport=8285, udp_csum=None, ident=0x9D31, flags=0),
        "decap",
    )
    yield vector(
        "fou_form_is_decapsulated",
        "Linux FOU with IPIP: any source port, no checksum, an id, TTL of its tunnel.",
        frame(inner, sport=45678, ident=0x0411, ttl=255),
        "decap",
    )
    yield vector(
        "fou_form_with_checksum_is_decapsulated",
        "Linux FOU with encap-csum.",
        frame(inner, sport=45678, udp_csum=None, ident=0x0412, ttl=63),
        "decap",
    )
    yield vector(
        "udp_checksum_ffff_is_accepted",
        "A checksum that computes to zero is sent as 0xffff (RFC 768).",
        frame(inner, sport=zero_sum, udp_csum=None),
        "decap",
    )
    yield vector(
        "wrong_udp_checksum_is_accepted",
        "The inner packet has its own; a socket's kernel is stricter and discards it.",
        frame(inner, udp_csum=0xBEEF),
        "decap",
        tun="kernel",
    )
    yield vector(
        "wrong_outer_header_checksum_is_punted",
        "RFC 1812 section 5.2.2: the kernel's stack discards it, on every rung.",
        frame(inner, csum=0xBEEF),
        "punt outer_header_checksum",
        tun="kernel",
    )
    yield vector(
        "padded_frame_is_decapsulated",
        "Bytes behind the outer total length belong to Ethernet.",
        frame(inner) + pattern(4),
        "decap",
    )
    yield vector(
        "one_byte_of_padding_is_ignored", "The inner packet ends where UDP ends.", frame(inner) + b"\xee", "decap"
    )
    yield vector(
        "padding_does_not_complete_an_inner_packet",
        "Its last byte is beyond the UDP payload, though within the frame.",
        frame(inner[:-1]) + inner[-1:] + bytes(5),
        "drop truncated",
    )
    yield vector(
        "reserved_outer_flag_makes_no_fragment",
        "The top bit of the flags is neither MF nor offset.",
        frame(inner, flags=RESERVED | DF),
        "decap",
    )
    yield vector(
        "outer_ttl_1_is_decapsulated",
        "The outer packet has arrived; its TTL has no further use.",
        frame(inner, ttl=1),
        "decap",
    )
    yield vector(
        "source_port_is_no_identity",
        "Peers hash it per flow; the outer address names them.",
        frame(inner, sport=1),
        "decap",
    )
    yield vector(
        "source_port_0_is_accepted", "A sender that wants no reply may use 0 (RFC 768).", frame(inner, sport=0), "decap"
    )
    yield vector(
        "outer_dscp_is_not_copied_to_the_inner",
        "Pipe model of RFC 2983 on the way out.",
        frame(datagram(src=POD_B, dst=POD_A, tos=0x28), tos=0xB8),
        "decap",
        tos=0x28,
    )
    yield vector(
        "what_egress_sends_is_decapsulated",
        "The source port is the one of the egress hash.",
        frame(inner, sport=source_port(inner)),
        "decap",
    )
