"""Inner packets as they are routed to the overlay device, for the egress vectors: right unless told to be wrong."""

from packets import ICMP, PAYLOAD, TCP, UDP, icmp_echo, ipv4, tcp, udp

HOST_A, POD_A, POD_B = "10.244.1.0", "10.244.1.2", "10.244.2.2"
# The outcomes of encap, by the peer that gets the packet.
TO_B, TO_C, TO_WIDE, TO_NARROW = (f"encap 192.168.77.{host}" for host in (2, 3, 9, 4))


def ping(src=POD_A, dst=POD_B, payload=PAYLOAD, **fields):
    return ipv4(src, dst, ICMP, icmp_echo(payload), **fields)


def datagram(src=POD_A, dst=POD_B, sport=40000, dport=53, payload=PAYLOAD, **fields):
    return ipv4(src, dst, UDP, udp(src, dst, sport, dport, payload), **fields)


def segment(src=POD_A, dst=POD_B, sport=40000, dport=80, payload=PAYLOAD, **fields):
    return ipv4(src, dst, TCP, tcp(src, dst, sport, dport, payload), **fields)
