"""Frames as a peer sends them, for the ingress vectors: right unless told to be wrong."""

from packets import DF, ICMP, PAYLOAD, TCP, UDP, ethernet, icmp_echo, ipv4, tcp, udp

OUR_IP, PEER_IP = "192.168.77.1", "192.168.77.2"
POD_A, POD_B = "10.244.1.2", "10.244.2.2"


def outer(payload, *, src=PEER_IP, dst=OUR_IP, ident=0, flags=DF, **fields):
    """A frame whose IPv4 payload is `payload`, a UDP datagram or a part of one."""
    return ethernet(ipv4(src, dst, UDP, payload, ident=ident, flags=flags, **fields))


def frame(inner, *, src=PEER_IP, dst=OUR_IP, sport=50123, dport=8285, udp_length=None, udp_csum=0, **fields):
    """A frame that carries `inner`, without UDP checksum unless `udp_csum` is None (the right one) or a value."""
    return outer(udp(src, dst, sport, dport, inner, length=udp_length, csum=udp_csum), src=src, dst=dst, **fields)


def ping(src=POD_B, dst=POD_A, payload=PAYLOAD, **fields):
    return ipv4(src, dst, ICMP, icmp_echo(payload, kind=0), **fields)


def datagram(src=POD_B, dst=POD_A, sport=53, dport=40000, payload=PAYLOAD, **fields):
    return ipv4(src, dst, UDP, udp(src, dst, sport, dport, payload), **fields)


def segment(src=POD_B, dst=POD_A, sport=80, dport=40000, payload=PAYLOAD, **fields):
    return ipv4(src, dst, TCP, tcp(src, dst, sport, dport, payload), **fields)
