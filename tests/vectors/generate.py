#!/usr/bin/env python3
"""Writes egress.json and ingress.json, the golden packet vectors, or says with --check whether they are current.

Before a file is written, each of its vectors must give the verdict that its author wrote down and pass an audit that
does not use the oracle: lengths, full checksums, untouched payload.
"""

import sys

# Nothing but the vectors may appear beside the vectors.
sys.dont_write_bytecode = True

import argparse
import json
import pathlib
import re
import struct

import egress_vectors
import ingress_vectors
import oracle
from packets import DF, UDP, addr, fold_sum

HERE = pathlib.Path(__file__).resolve().parent
KEYS = ("name", "why", "packet", "gso_size", "fast", "slow", "tun")


def main():
    parser = argparse.ArgumentParser(description="write the golden packet vectors")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not current")
    check = parser.parse_args().check

    stale = []
    for name, vectors, judge in [
        ("egress", egress_vectors.vectors(), oracle.egress),
        ("ingress", ingress_vectors.vectors(), oracle.ingress),
    ]:
        judged = [judged_vector(vector, judge) for vector in vectors]
        audit_set(name, judged)
        document = {
            "config": oracle.CONFIG,
            "routes": oracle.ROUTES,
            "vectors": [{key: vector[key] for key in KEYS if key in vector} for vector in judged],
        }
        text = json.dumps(document, indent=1) + "\n"
        path = HERE / f"{name}.json"
        current = path.exists() and path.read_text(encoding="ascii") == text
        if not current and check:
            stale.append(path.name)
        elif not current:
            path.write_text(text, encoding="ascii")
        print(f"{path.name}: {len(judged)} vectors, {'current' if current else 'stale' if check else 'written'}")
    if stale:
        sys.exit(f"{', '.join(stale)}: not what generate.py writes; run it without --check and review the difference")


def judged_vector(vector, judge):
    """The vector with the oracle's verdicts, which must be the ones its author expects."""
    name, packet = vector["name"], vector["packet"]
    gso_size = vector.get("gso_size", 0)
    fast, slow, tun = judge(packet, gso_size) if gso_size else judge(packet)
    verdicts = [summary(fast), summary(slow)]
    expected = vector["expect"].split(" / ")
    require(
        name, verdicts == [expected[0], expected[-1]], f"expected {vector['expect']}, computed {' / '.join(verdicts)}"
    )
    require(
        name, tun == vector.get("tun", "shell"), f"the tun rung: expected {vector.get('tun', 'shell')}, computed {tun}"
    )
    for verdict in (fast, slow):
        audit_bytes(vector, verdict)
    return {**vector, "packet": packet.hex(), "fast": fast, "slow": slow, "tun": tun}


def summary(verdict):
    """A verdict as the vector lists write it."""
    if verdict["verdict"] == "encap":
        return "encap " + ".".join(str(byte) for byte in bytes.fromhex(verdict["bytes"])[16:20])
    return " ".join(verdict[key] for key in ("verdict", "reason") if key in verdict)


def audit_bytes(vector, verdict):
    """Checks computed bytes against the packet by full checksums and by what the vector states by hand."""
    if "bytes" not in verdict:
        return
    name, result = vector["name"], bytes.fromhex(verdict["bytes"])
    if verdict["verdict"] == "encap":
        before, after = vector["packet"], result[28:]
        outer = struct.unpack("!BBHHHBBH4s4s", result[:20])
        sport, dport, udp_length, udp_csum = struct.unpack("!HHHH", result[20:28])
        require(name, outer[:7] == (0x45, before[1], len(result), 0, DF, 64, UDP), "an outer field is wrong")
        require(
            name,
            outer[8] == addr("192.168.77.1") and fold_sum(result[:20]) == 0xFFFF,
            "outer source or checksum is wrong",
        )
        require(name, (dport, udp_length, udp_csum) == (8285, len(after) + 8, 0), "a UDP field is wrong")
        require(name, 49152 <= sport == vector.get("port", sport), "the source port is wrong")
        require(name, outer[1] == vector.get("outer_tos", outer[1]), "the outer TOS is wrong")
        require(name, after[1] == before[1], "the inner TOS was changed")
    else:
        before, after = vector["packet"][42 : 42 + len(result)], result
        require(name, after[1] == vector.get("tos", before[1]), "the inner TOS is wrong")
    require(name, len(after) == struct.unpack_from("!H", after, 2)[0], "the inner length is wrong")
    require(name, after[8] == before[8] - 1, "the inner TTL is wrong")
    kept = [before[:1] + before[2:8] + before[9:10] + before[12:], after[:1] + after[2:8] + after[9:10] + after[12:]]
    require(name, kept[0] == kept[1], "an inner byte was changed")
    header = (before[0] & 15) * 4
    right = [fold_sum(packet[:header]) == 0xFFFF for packet in (before, after)]
    require(name, right[0] == right[1], "a right header checksum became wrong, or a wrong one right")
    updated = struct.unpack_from("!H", after, 10)[0]
    require(name, updated == vector.get("checksum", updated), f"the inner header checksum is {updated:#06x}")


def audit_set(direction, judged):
    """Checks that names are unique and that every reason has a vector."""
    names = [vector["name"] for vector in judged]
    require(direction, len(names) == len(set(names)), "a name is used twice")
    for vector in judged:
        require(
            vector["name"], re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", vector["name"]), "the name is not in snake case"
        )
        require(vector["name"], re.fullmatch(r"[A-Za-z0-9][ -~]+\.", vector["why"]), "the reason is not a sentence")
    verdicts = [verdict for vector in judged for verdict in (vector["fast"], vector["slow"])]
    for kind, wanted in (("drop", oracle.DROP_REASONS), ("punt", oracle.PUNT_REASONS)):
        seen = {verdict["reason"] for verdict in verdicts if verdict["verdict"] == kind}
        require(
            direction,
            seen == wanted[direction],
            f"{kind} reasons without or beyond a vector: {seen ^ wanted[direction]}",
        )


def require(name, holds, message):
    if not holds:
        sys.exit(f"vector {name}: {message}")


if __name__ == "__main__":
    main()
