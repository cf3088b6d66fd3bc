//! Frames that no well-behaved container sends: with and without a bypass, the same packets arrive and the same are counted.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, thread, time::Duration};

use anyhow::{Result, ensure};
use overlay_tests::{
    netns::Netns,
    sandbox::Sandbox,
    topology::UPLINK,
    traffic::{checksum::sum, udp::passes},
};

use super::place::{BRIDGE_MAC, Container, Kind, Place, address, skipped};
use crate::{
    frames::{self, Capture, from_hex},
    guard::{INNER_PORT, bind, datagram},
};

/// How often each frame is sent: the first of a flow takes the stack in any case.
const REPEATS: usize = 4;
/// Pause between frames.
const PAUSE: Duration = Duration::from_millis(2);
/// How long nothing may arrive at the end.
const QUIET: Duration = Duration::from_millis(300);
const UDP: u8 = 17;
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);

/// What a run has shown.
#[derive(Debug, PartialEq)]
struct Seen {
    /// UDP packets that the container of the peer got, and those that other containers of the host got, with their numbers.
    arrived: [BTreeMap<Vec<u8>, usize>; 2],
    /// What the agents have dropped, by reason.
    drops: [BTreeMap<String, u64>; 2],
}

pub(super) fn compared(sandbox: &Arc<Sandbox>) -> Result<()> {
    let expected = run(sandbox, "off")?;
    let kinds = expected.arrived.iter().map(BTreeMap::len).sum::<usize>();
    ensure!(kinds > 10, "only {kinds} kinds of packets have arrived without a bypass: {expected:?}");
    for bypass in ["flows", "all"] {
        let seen = run(sandbox, bypass)?;
        for (place, (seen, expected)) in ["the peer's container", "another container"]
            .iter()
            .zip(seen.arrived.iter().zip(&expected.arrived))
        {
            for packet in seen.keys().chain(expected.keys()) {
                let counts = [seen, expected].map(|packets| packets.get(packet).copied().unwrap_or(0));
                ensure!(
                    counts[0] == counts[1],
                    "{bypass}: {place} got {} of {}, without bypass {}",
                    counts[0],
                    describe(packet),
                    counts[1]
                );
            }
        }
        ensure!(seen.drops == expected.drops, "{bypass}: {:?}, without: {:?}", seen.drops, expected.drops);
    }
    Ok(())
}

/// The name of the frame, which is its payload, and its header.
fn describe(packet: &[u8]) -> String {
    let name = packet.get(28..).map(|name| String::from_utf8_lossy(name).into_owned());
    format!("{:?} ({:02x?})", name.unwrap_or_default(), packet.get(..28).unwrap_or(packet))
}

fn run(sandbox: &Arc<Sandbox>, bypass: &str) -> Result<Seen> {
    let place = Place::start(sandbox, Kind::Bridge, bypass)?;
    let (sender, other) = (place.add(3)?, place.add(4)?);
    for container in [&sender, &other] {
        ensure!(passes(place.remote(), container.end(), 100)?, "a container is not reached");
    }
    if bypass != "off" {
        place.skips(&sender)?;
        place.skips(&other)?;
    }
    // So that no sender is told of a closed port.
    let _receiver = bind(place.remote().netns, REMOTE, INNER_PORT)?;
    let capture = |netns: &Netns| netns.run(|| Capture::start(UPLINK))?;
    let captures = [capture(place.remote().netns)?, capture(&other.netns)?];
    let drops = || -> Result<_> {
        let counters = place.pair.counters()?;
        Ok(counters.map(|counters| {
            let mut drops = counters.drops;
            drops.remove("ipv6");
            drops
        }))
    };
    let before = drops()?;
    for (name, container, frame) in forged(&sender, &other)? {
        let sent = container.netns.run(|| {
            (0..REPEATS).try_fold(0, |sent, _| {
                thread::sleep(PAUSE);
                Ok::<_, anyhow::Error>(sent + frames::send(UPLINK, std::slice::from_ref(&frame))?)
            })
        })??;
        ensure!(sent == REPEATS, "{name} was sent {sent} times");
    }
    let mut arrived = [BTreeMap::new(), BTreeMap::new()];
    loop {
        thread::sleep(QUIET);
        let mut is_quiet = true;
        for (capture, arrived) in captures.iter().zip(&mut arrived) {
            for packet in capture.packets()?.into_iter().filter(|packet| packet.get(9) == Some(&UDP)) {
                is_quiet = false;
                *arrived.entry(packet).or_default() += 1;
            }
        }
        if is_quiet {
            break;
        }
    }
    let mut grown = drops()?;
    for (grown, before) in grown.iter_mut().zip(before) {
        for (reason, count) in grown.iter_mut() {
            *count -= before.get(reason).copied().unwrap_or(0);
        }
        grown.retain(|_, count| *count > 0);
    }
    let [out, _] = skipped(&place.agent().counters()?);
    ensure!((out > 0) == (bypass != "off"), "{bypass}: {out} packets have skipped the stack");
    place.runs()?;
    Ok(Seen { arrived, drops: grown })
}

/// The frames: name, sender, bytes.
fn forged<'a>(
    sender: &'a Container,
    other: &'a Container,
) -> Result<Vec<(&'static str, &'a Container, Vec<u8>)>> {
    let hardware = |mac: &str| from_hex(&mac.replace(':', ""));
    let (own, foreign, gateway) = (hardware(&sender.mac)?, hardware(&other.mac)?, hardware(BRIDGE_MAC)?);
    let frame = |to: &[u8], from: &[u8], packet: &[u8]| [to, from, &[8, 0], packet].concat();
    let udp = |source: Ipv4Addr, destination: Ipv4Addr, name: &str| {
        datagram((source, 5000), (destination, INNER_PORT), name.as_bytes())
    };
    let mut frames = vec![(
        "other, as it should be",
        other,
        frame(&gateway, &foreign, &udp(other.address, REMOTE, "a flow of another container")?),
    )];
    // By source and destination.
    for (name, source, destination) in [
        ("as it should be", sender.address, REMOTE),
        ("source of another container", other.address, REMOTE),
        ("source of no container", address(77), REMOTE),
        ("source of another host's container", Ipv4Addr::new(10, 244, 2, 9), REMOTE),
        ("source of the receiver", REMOTE, REMOTE),
        ("source of the gateway", address(1), REMOTE),
        ("source of the host", address(0), REMOTE),
        ("source of the underlay", Ipv4Addr::new(192, 168, 77, 1), REMOTE),
        ("source of the peer's host", Ipv4Addr::new(192, 168, 77, 2), REMOTE),
        ("source outside", Ipv4Addr::new(192, 0, 2, 1), REMOTE),
        ("source of all", address(255), REMOTE),
        ("source of loopback", Ipv4Addr::LOCALHOST, REMOTE),
        ("source of no host", Ipv4Addr::UNSPECIFIED, REMOTE),
        ("source of a group", Ipv4Addr::new(224, 0, 0, 5), REMOTE),
        ("to another container", sender.address, other.address),
        ("to no container", sender.address, address(78)),
        ("to no subnet", sender.address, Ipv4Addr::new(10, 244, 9, 9)),
        ("to no container of the peer", sender.address, Ipv4Addr::new(10, 244, 2, 78)),
        ("to all of the peer", sender.address, Ipv4Addr::new(10, 244, 2, 255)),
        ("to all of the network", sender.address, Ipv4Addr::new(10, 244, 255, 255)),
        ("to a group", sender.address, Ipv4Addr::new(224, 0, 0, 5)),
        ("to the first address of the peer", sender.address, Ipv4Addr::new(10, 244, 2, 0)),
    ] {
        frames.push((name, sender, frame(&gateway, &own, &udp(source, destination, name)?)));
    }
    // By header. Each is the same flow, which skips the stack.
    for (name, change) in CHANGES {
        let mut packet = udp(sender.address, REMOTE, name)?;
        change(&mut packet);
        frames.push((name, sender, frame(&gateway, &own, &packet)));
    }
    let good = |name| udp(sender.address, REMOTE, name);
    frames.push(("padding", sender, [frame(&gateway, &own, &good("padding")?), vec![0; 30]].concat()));
    for (name, tag) in [("VLAN 5", [0x81, 0, 0, 5]), ("priority tag", [0x81, 0, 0xe0, 0])] {
        let tagged = [&gateway[..], &own, &tag, &[8, 0], &good(name)?].concat();
        frames.push((name, sender, tagged));
    }
    frames.push(("not IPv4", sender, [&gateway[..], &own, &[0x86, 0xdd], &good("not IPv4")?].concat()));
    // By hardware address. The last ones move an address to another port.
    for (name, to, from, source) in [
        ("to all stations", &[0xff; 6][..], &own[..], sender.address),
        ("to a group of stations", &[1, 0, 0x5e, 0, 0, 5], &own, sender.address),
        ("to another container's station", &foreign, &own, sender.address),
        ("to no station", &[2, 9, 9, 9, 9, 9], &own, sender.address),
        ("from no station", &gateway, &[2, 9, 9, 9, 9, 8], sender.address),
        ("from another station", &gateway, &foreign, sender.address),
        ("from another station and its container", &gateway, &foreign, other.address),
    ] {
        frames.push((name, sender, frame(to, from, &udp(source, REMOTE, name)?)));
    }
    frames.push((
        "other, again",
        other,
        frame(&gateway, &foreign, &udp(other.address, REMOTE, "another container again")?),
    ));
    Ok(frames)
}

type Change = (&'static str, fn(&mut Vec<u8>));

/// Changes of the packet. All but one leave a header whose checksum is right.
const CHANGES: [Change; 16] = [
    ("TTL 0", |packet| set(packet, 8, &[0])),
    ("TTL 1", |packet| set(packet, 8, &[1])),
    ("TTL 2", |packet| set(packet, 8, &[2])),
    ("TTL 3", |packet| set(packet, 8, &[3])),
    ("TTL 4", |packet| set(packet, 8, &[4])),
    ("TTL 255", |packet| set(packet, 8, &[255])),
    ("TOS", |packet| set(packet, 1, &[0xb9])),
    ("don't fragment", |packet| set(packet, 6, &[0x40, 0])),
    ("reserved flag", |packet| set(packet, 6, &[0x80, 0])),
    ("first fragment", |packet| set(packet, 6, &[0x20, 0])),
    ("last fragment", |packet| set(packet, 6, &[0, 100])),
    ("wrong checksum of the header", |packet| {
        for byte in packet.iter_mut().skip(10).take(1) {
            *byte ^= 1;
        }
    }),
    ("longer than the frame", |packet| set(packet, 2, &[1, 0])),
    ("shorter than its headers", |packet| set(packet, 2, &[0, 19])),
    ("version 6", |packet| set(packet, 0, &[0x65])),
    ("options", |packet| {
        // No operation, three times, and the end of the list.
        packet.splice(20..20, [1, 1, 1, 0]);
        let length = u16::try_from(packet.len()).unwrap_or(0);
        set(packet, 2, &length.to_be_bytes());
        set(packet, 0, &[0x46]);
    }),
];

/// Writes into the header of a packet and makes its checksum right.
fn set(packet: &mut [u8], at: usize, bytes: &[u8]) {
    packet.iter_mut().skip(at).zip(bytes).for_each(|(byte, new)| *byte = *new);
    packet.iter_mut().skip(10).take(2).for_each(|byte| *byte = 0);
    let length = if packet.first() == Some(&0x46) { 24 } else { 20 };
    let checksum = !sum([packet.get(..length).unwrap_or_default()]);
    packet.iter_mut().skip(10).zip(checksum.to_be_bytes()).for_each(|(byte, new)| *byte = new);
}
