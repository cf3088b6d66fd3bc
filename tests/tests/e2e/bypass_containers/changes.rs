//! Containers come, go and move under traffic.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    sandbox::Sandbox,
    topology::{Endpoint, UPLINK},
    traffic::{
        steady::without_loss,
        stream::Stream,
        udp::{is_answered, passes, with_echo},
    },
};

use super::place::{BRIDGE, Container, Kind, Place, address};
use crate::containers::batch;

/// Containers that are added.
const CROWD: u8 = 20;
/// How often a container is replaced.
const REPLACED: u8 = 8;

/// Sends datagrams without pause to an address while `work` is done: no container answers there.
fn under_fire<T>(place: &Place, target: std::net::Ipv4Addr, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Endpoint { netns, address } = place.remote();
    let sender = netns.run(|| UdpSocket::bind((address, 0)))?.context("bind the sender")?;
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !finished.load(Relaxed) {
                // Errors are those that ICMP reports.
                let _ = sender.send_to(&[0; 100], (target, 9));
                thread::sleep(Duration::from_micros(500));
            }
        });
        let done = work();
        finished.store(true, Relaxed);
        done
    })
}

/// Streams both ways between a container and the peer, which must lose nothing while `work` is done.
pub(super) fn with_streams<T>(
    place: &Place,
    container: &Container,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let (local, remote) = (container.end(), place.remote());
    let streams = [Stream::start(local, remote)?, Stream::start(remote, local)?];
    let done = without_loss(remote, local, || {
        let done = work()?;
        streams.iter().try_for_each(|stream| stream.advance(1 << 20))?;
        Ok(done)
    });
    let done = done.with_context(|| place.diagnosis("others have traffic"));
    for stream in streams {
        stream.finish()?;
    }
    done
}

pub(super) fn come_and_go(sandbox: &Arc<Sandbox>, kind: Kind, bypass: &str) -> Result<()> {
    let place = Place::start(sandbox, kind, bypass)?;
    let (first, remote) = (place.first(), place.remote());
    with_streams(&place, &first, || {
        let mut containers = Vec::new();
        for last in 10..10 + CROWD {
            let container = place.add(last)?;
            let reached = passes(remote, container.end(), 100)? && passes(container.end(), remote, 100)?;
            ensure!(reached, "{}", place.diagnosis(&format!("container {last} is not reached at once")));
            containers.push(container);
        }
        place.settles(1 + usize::from(CROWD))?;
        for container in &containers {
            place.skips(container)?;
        }
        place.no_strays(&containers)?;
        // Every other one goes, in the middle of its own traffic.
        let mut kept = Vec::new();
        for (index, container) in containers.into_iter().enumerate() {
            if index % 2 == 0 {
                kept.push(container);
            } else {
                under_fire(&place, container.address, || place.remove(&container))?;
            }
        }
        place.settles(1 + kept.len())?;
        for container in &kept {
            place.skips(container)?;
        }
        place.no_strays(&kept)
    })?;
    place.no_strays([&first])?;
    replaced(&place)
}

/// A container is removed and created again with the same address and another hardware address, again and again.
fn replaced(place: &Place) -> Result<()> {
    let (first, other) = (place.first(), place.add(9)?);
    let target = address(7);
    place.skips(&other)?;
    with_streams(place, &first, || {
        let mut container = place.add(7)?;
        place.is_reached(&container, "a container is reached")?;
        place.skips(&container)?;
        under_fire(place, target, || {
            for _ in 0..REPLACED {
                let next = place.prepare(7)?;
                place.remove(&container)?;
                place.connect(&next)?;
                next.announce()?;
                place.is_reached(&next, "the successor is reached")?;
                container = next;
            }
            Ok(())
        })?;
        place.settles(3)?;
        place.skips(&container)?;
        place.no_strays([&container])
    })?;
    place.no_strays([&first, &other])?;
    place.runs()
}

/// Gives a container another address.
fn renumber(place: &Place, container: &mut Container, last: u8) -> Result<()> {
    batch(&container.netns, "ip", &format!("address flush dev {UPLINK}"))?;
    container.address = address(last);
    place.configure(container)?;
    container.announce()
}

pub(super) fn renumbered(sandbox: &Arc<Sandbox>, bypass: &str) -> Result<()> {
    let place = Place::start(sandbox, Kind::Bridge, bypass)?;
    place.forget_neighbours_soon()?;
    let first = place.first();
    with_streams(&place, &first, || {
        let (gone, mut heir) = (place.add(10)?, place.add(11)?);
        for container in [&gone, &heir] {
            place.skips(container)?;
        }
        under_fire(&place, address(10), || {
            place.remove(&gone)?;
            renumber(&place, &mut heir, 10)?;
            place.is_reached(&heir, "a container with the address of one that is gone")
        })?;
        place.skips(&heir)?;

        // Two exchange their addresses.
        let mut other = place.add(12)?;
        place.skips(&other)?;
        for (one, two) in [(12, 10), (10, 12)] {
            batch(&other.netns, "ip", &format!("address flush dev {UPLINK}"))?;
            renumber(&place, &mut heir, one)?;
            renumber(&place, &mut other, two)?;
            for container in [&heir, &other] {
                place.is_reached(container, "a container with the address of another")?;
                place.skips(container)?;
            }
        }

        // Two have the same address: the kernel reaches the one that it heard of last.
        let duplicate = place.add(12)?;
        for container in [&duplicate, &other, &duplicate, &other] {
            container.announce()?;
            place.is_reached(container, "the one of two that was announced last")?;
        }
        // The other one still sends.
        one_way(&place, &duplicate)?;
        one_way(&place, &other)?;
        duplicate.announce()?;
        place.is_reached(&duplicate, "the duplicate")?;
        place.remove(&duplicate)?;
        other.announce()?;
        place.is_reached(&other, "the one that is left")?;
        place.skips(&other)?;
        // The host probes its neighbours, as if packets to them took its stack: no container has the address 10.244.1.11 any more.
        place.settles(3)
    })?;
    place.no_strays([&first])
}

/// Datagrams of a container arrive at the peer, each once.
fn one_way(place: &Place, container: &Container) -> Result<()> {
    let remote = place.remote();
    let receiver = remote.netns.run(|| UdpSocket::bind((remote.address, 0)))?.context("bind the receiver")?;
    receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let sender =
        container.netns.run(|| UdpSocket::bind((container.address, 0)))?.context("bind the sender")?;
    for number in 0..50_u32 {
        sender.send_to(&number.to_be_bytes(), target).context("send")?;
        let mut buffer = [0; 8];
        let (count, from) = receiver.recv_from(&mut buffer).context("a datagram was lost")?;
        ensure!(
            buffer.get(..count) == Some(&number.to_be_bytes()[..]) && from.ip() == container.address,
            "{count} bytes from {from}: {buffer:?}"
        );
    }
    receiver.set_nonblocking(true)?;
    ensure!(receiver.recv(&mut [0; 8]).is_err(), "a datagram arrived twice");
    Ok(())
}

/// A second home for a container: the same addresses behind another veth.
fn migrate(place: &Place, container: &Container) -> Result<Container> {
    let Container { address, mac, .. } = container;
    let target = place.prepare(address.octets()[3])?;
    Ok(Container { address: *address, mac: mac.clone(), ..target })
}

pub(super) fn moved(sandbox: &Arc<Sandbox>, bypass: &str) -> Result<()> {
    let place = Place::start(sandbox, Kind::Bridge, bypass)?;
    let (first, bystander) = (place.first(), place.add(9)?);
    place.skips(&bystander)?;
    with_streams(&place, &first, || {
        let mut container = place.add(7)?;
        place.skips(&container)?;
        under_fire(&place, container.address, || {
            // The old one is silent, and still plugged in.
            let target = migrate(&place, &container)?;
            batch(&container.netns, "ip", &format!("address flush dev {UPLINK}"))?;
            place.connect(&target)?;
            target.announce()?;
            place.is_reached(&target, "a container that moved and was announced")?;
            place.remove(&container)?;
            container = target;

            // Nothing is announced. What it sends tells the bridge.
            let target = migrate(&place, &container)?;
            batch(&container.netns, "ip", &format!("address flush dev {UPLINK}"))?;
            place.connect(&target)?;
            one_way(&place, &target)?;
            place.is_reached(&target, "a container that moved and has sent something")?;
            place.remove(&container)?;
            container = target;

            // It sends nothing, but its old port is gone: the bridge sends to all ports.
            let target = migrate(&place, &container)?;
            place.link(&target)?;
            place.configure(&target)?;
            place.remove(&container)?;
            place.plug(&target, BRIDGE)?;
            place.is_reached(&target, "a container that moved and has sent nothing")?;
            container = target;
            Ok(())
        })?;
        place.settles(3)?;
        place.skips(&container)
    })?;
    place.no_strays([&first, &bystander])
}

pub(super) fn route_moved(sandbox: &Arc<Sandbox>, bypass: &str) -> Result<()> {
    let place = Place::start(sandbox, Kind::Routed, bypass)?;
    let first = place.first();
    with_streams(&place, &first, || {
        let one = place.add(7)?;
        place.skips(&one)?;
        let two = place.prepare(7)?;
        place.link(&two)?;
        place.configure(&two)?;
        under_fire(&place, one.address, || {
            for container in [&two, &one, &two, &one, &two] {
                place
                    .host()
                    .tool(&format!("ip route replace {}/32 dev {}", container.address, container.veth))?;
                place.is_reached(container, "a container behind the veth to which the route leads")?;
            }
            Ok(())
        })?;
        place.skips(&two)?;
        // What comes from the other one is not forwarded: strict reverse path filtering.
        with_echo(one.end(), place.remote(), |socket| {
            ensure!(
                !is_answered(socket, 0, Duration::from_millis(200))?,
                "an answer has reached the old veth"
            );
            Ok(())
        })?;
        place.no_strays([&one, &two])?;
        place.settles(2)
    })
}

/// The bridge sees none of the packets that skip the stack, and forgets where they come from after a second.
pub(super) fn aged(sandbox: &Arc<Sandbox>, bypass: &str) -> Result<()> {
    let place = Place::start(sandbox, Kind::Bridge, bypass)?;
    place.host().tool(&format!("ip link set {BRIDGE} type bridge ageing_time 100"))?;
    let (first, other) = (place.first(), place.add(3)?);
    with_streams(&place, &first, || {
        place.skips(&other)?;
        thread::sleep(Duration::from_secs(4));
        place.skips(&other)?;
        place.skips(&other)
    })?;
    place.no_strays([&first, &other])?;
    place.runs()
}
