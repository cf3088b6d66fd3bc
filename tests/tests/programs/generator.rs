//! Makes packets: valid ones, with boundary values in every field, with wrong lengths, nested and cut, and golden vectors with
//! bytes changed. Nothing here comes from the packet core.

use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{rungs::MAC, vectors::File};

const OUR_IP: [u8; 4] = [192, 168, 77, 1];
const PORT: u16 = 8285;

/// Addresses at the edges of what the vectors' configuration and routes distinguish.
const INNER: [[u8; 4]; 24] = [
    [10, 244, 5, 1],
    [10, 244, 6, 1],
    [10, 244, 7, 1],
    [10, 244, 8, 1],
    [10, 244, 1, 0],
    [10, 244, 1, 2],
    [10, 244, 1, 255],
    [10, 244, 0, 255],
    [10, 244, 2, 0],
    [10, 244, 2, 2],
    [10, 244, 2, 255],
    [10, 244, 3, 7],
    [10, 244, 4, 0],
    [10, 244, 127, 255],
    [10, 244, 128, 0],
    [10, 244, 199, 255],
    [10, 244, 200, 1],
    [10, 244, 255, 255],
    [10, 243, 255, 255],
    [10, 245, 0, 0],
    [0, 0, 0, 0],
    [255, 255, 255, 255],
    [224, 0, 0, 1],
    [192, 168, 77, 2],
];
const OUTER: [[u8; 4]; 8] = [
    [192, 168, 77, 7],
    [192, 168, 77, 2],
    [192, 168, 77, 3],
    [192, 168, 77, 4],
    [192, 168, 77, 9],
    [192, 168, 77, 8],
    OUR_IP,
    [10, 244, 2, 2],
];
const PROTOCOLS: [u8; 10] = [1, 6, 17, 17, 4, 41, 47, 50, 132, 255];
/// Longest payload of a transport: what a test run takes is about 3500 bytes with headers.
const LONGEST: usize = 2800;

/// One of `usual`, most of the time the first.
fn mostly<T: Copy>(rng: &mut StdRng, usual: T, others: &[T]) -> T {
    if rng.random_bool(0.85) { usual } else { *others.choose(rng).unwrap_or(&usual) }
}

fn pick<T: Copy>(rng: &mut StdRng, choice: &[T]) -> T {
    choice[rng.random_range(0..choice.len())]
}

/// The ones' complement sum of `bytes` (RFC 1071), not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A length that is right, or at a boundary.
fn length(rng: &mut StdRng, right: usize) -> u16 {
    let right = right.min(0xffff) as u16;
    let wrong = [right.wrapping_sub(1), right.wrapping_add(1), 0, 7, 8, 19, 20, 27, 28, 60, 0x7fff, 0xffff];
    mostly(rng, right, &wrong)
}

/// An IPv4 packet around `payload`.
fn ipv4(rng: &mut StdRng, source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let words = mostly(rng, 5, &[0, 1, 4, 6, 7, 15]);
    let options = usize::from(words).saturating_sub(5) * 4;
    let version = mostly(rng, 4, &[0, 5, 6, 15]);
    let total = length(rng, 20 + options + payload.len());
    let [total_high, total_low] = total.to_be_bytes();
    let fragment: u16 = mostly(rng, 0x4000, &[0, 0x2000, 0x8000, 1, 0x1fff, 0x2001, 0x6000, 0xffff]);
    let [fragment_high, fragment_low] = fragment.to_be_bytes();
    let ttl = mostly(rng, 64, &[0, 1, 2, 3, 128, 254, 255]);
    let mut packet =
        vec![version << 4 | words, mostly(rng, 0, &[1, 2, 3, 0xb8, 0xff]), total_high, total_low];
    packet.extend([rng.random(), rng.random(), fragment_high, fragment_low, ttl, protocol, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    packet.extend(std::iter::repeat_n(1, options));
    let right = !sum(&packet);
    let checksum = mostly(rng, right, &[0, 0xffff, right ^ 1, right.swap_bytes()]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// UDP around `payload`; the checksum absent, right, unfinished or wrong.
fn udp(rng: &mut StdRng, ends: [[u8; 4]; 2], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let len = length(rng, 8 + payload.len());
    let mut datagram = Vec::new();
    for word in [ports[0], ports[1], len, 0] {
        datagram.extend(word.to_be_bytes());
    }
    datagram.extend(payload);
    let [source, destination] = ends;
    let pseudo = [&source[..], &destination, &[0, 17], &len.to_be_bytes()].concat();
    let unfinished = sum(&pseudo);
    let whole = !sum(&[&pseudo[..], &datagram].concat());
    let checksum = mostly(rng, 0, &[whole, unfinished, 1, 0xffff]);
    datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
    datagram
}

/// TCP with a data offset at a boundary, and a checksum that is random or unfinished.
fn tcp(rng: &mut StdRng, ends: [[u8; 4]; 2]) -> Vec<u8> {
    let mut segment: Vec<u8> = (0..20).map(|_| rng.random()).collect();
    segment[12] = mostly(rng, 5, &[0, 4, 6, 15]) << 4;
    segment.extend(bytes(rng));
    if rng.random_bool(0.5) {
        let len = segment.len() as u16;
        let unfinished = sum(&[&ends[0][..], &ends[1], &[0, 6], &len.to_be_bytes()].concat());
        segment[16..18].copy_from_slice(&unfinished.to_be_bytes());
    }
    segment
}

fn bytes(rng: &mut StdRng) -> Vec<u8> {
    let len = match rng.random_range(0..20) {
        0..4 => 0,
        4..16 => rng.random_range(1..64),
        16..19 => rng.random_range(64..600),
        _ => rng.random_range(600..LONGEST),
    };
    let byte: u8 = rng.random();
    (0..len).map(|index| byte ^ index as u8).collect()
}

/// An inner packet: of any protocol, or again a packet of this overlay, or a tunnel of another kind.
fn inner(rng: &mut StdRng, ends: [[u8; 4]; 2]) -> Vec<u8> {
    let protocol = pick(rng, &PROTOCOLS);
    let payload = match (protocol, rng.random_range(0..4)) {
        (4, 1..) | (17, 0) => {
            let nested = bytes(rng);
            let nested = ipv4(rng, ends[1], ends[0], 17, &nested);
            if protocol == 4 { nested } else { udp(rng, ends, [PORT, PORT], &nested) }
        }
        (17, _) => {
            let ports = [rng.random(), pick(rng, &[53, PORT, 0, 65535])];
            let payload = bytes(rng);
            udp(rng, ends, ports, &payload)
        }
        (6, _) => tcp(rng, ends),
        _ => bytes(rng),
    };
    ipv4(rng, ends[0], ends[1], protocol, &payload)
}

/// Bytes are cut or follow.
fn cut_or_pad(rng: &mut StdRng, mut packet: Vec<u8>) -> Vec<u8> {
    match rng.random_range(0..20) {
        0 => packet.truncate(rng.random_range(0..=packet.len())),
        1 => packet.extend(std::iter::repeat_n(0xa5, rng.random_range(1..40))),
        _ => {}
    }
    packet
}

/// The payload of each segment in bytes: most packets are one.
pub(crate) fn gso_size(rng: &mut StdRng) -> usize {
    mostly(rng, 0, &[1, 536, 1348, 1360, 1361, 1372, 1400, 1448, 0xffff])
}

/// An inner packet as it is routed to the overlay device.
pub(crate) fn egress(rng: &mut StdRng) -> Vec<u8> {
    let source = mostly(rng, [10, 244, 1, 2], &INNER);
    let destination = pick(rng, &INNER);
    let packet = inner(rng, [source, destination]);
    cut_or_pad(rng, packet)
}

/// A frame as it is received on the underlay.
pub(crate) fn ingress(rng: &mut StdRng) -> Vec<u8> {
    let peer = mostly(rng, [192, 168, 77, 2], &OUTER);
    let source = mostly(rng, [10, 244, 2, 2], &INNER);
    let destination = mostly(rng, [10, 244, 1, 2], &INNER);
    let inner = inner(rng, [source, destination]);
    let inner = cut_or_pad(rng, inner);
    let ours = mostly(rng, OUR_IP, &OUTER);
    let ports = [rng.random(), mostly(rng, PORT, &[0, PORT - 1, PORT + 1, PORT.swap_bytes(), 65535])];
    let datagram = udp(rng, [peer, ours], ports, &inner);
    let protocol = mostly(rng, 17, &PROTOCOLS);
    let packet = ipv4(rng, peer, ours, protocol, &datagram);
    let to =
        mostly(rng, MAC, &[[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 3], [0; 6], [2, 0, 0, 0, 0, 0]]);
    let kind: u16 = mostly(rng, 0x0800, &[0x86dd, 0x0806, 0x8100, 0x88a8, 0x0801, 0]);
    let frame = [&to[..], &[2, 0, 0, 0, 0, 2], &kind.to_be_bytes(), &packet].concat();
    cut_or_pad(rng, frame)
}

/// A golden packet with one to four things changed, most of them in the first `headers` bytes.
pub(crate) fn mutated(rng: &mut StdRng, file: &File, headers: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    while packet.is_empty() || packet.len() >= 2000 {
        packet.clone_from(&file.vectors.choose(rng).expect("there are vectors").packet);
    }
    for _ in 0..rng.random_range(1..=4) {
        let len = packet.len();
        match rng.random_range(0..10) {
            0 => packet.truncate(rng.random_range(0..=len)),
            1 => packet.extend(std::iter::repeat_n(0xa5, rng.random_range(1..40))),
            _ if len == 0 => {}
            2..=5 => packet[rng.random_range(0..len.min(headers))] ^= 1 << rng.random_range(0..8),
            6 => packet[rng.random_range(0..len)] = rng.random(),
            _ => {
                let values = [0, 1, 5, 6, 0x0f, 0x45, 0x46, 0x4f, 0x60, 0x7f, 0x80, 0xfe, 0xff];
                packet[rng.random_range(0..len.min(headers))] = pick(rng, &values);
            }
        }
    }
    packet
}
