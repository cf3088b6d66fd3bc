"""One vector as its author writes it, before the oracle adds the verdicts."""


def vector(name, why, packet, expect, **stated):
    """What is sent, what must happen, and why.

    `expect` is the outcome by hand, compared with the oracle's: "encap PEER", "decap", "pass", "drop REASON"
    or "punt REASON"; where fast and slow path differ, both with " / " between.
    `stated` holds further facts by hand: `tun` (who disposes of the packet on the tun rung; "shell" if absent),
    `gso_size` (payload of each segment of a super-packet, on egress), `checksum` (of the resulting inner header), `tos` (of the inner header after decap), `outer_tos` and `port`
    (the outer source port after encap).
    """
    return {"name": name, "why": why, "packet": packet, "expect": expect, **stated}
