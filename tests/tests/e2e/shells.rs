//! What the shells of the packet core do around it, and no packet shown to a single program can tell: buffers in pieces, tunnels in
//! tunnels, marks behind the hook, the TOS of a socket.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    libc, setsockopt_impl, sockopt_impl,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, setsockopt, socket,
    },
};
use overlay_tests::{
    agent::Rung,
    report::Counters,
    sandbox::Sandbox,
    topology::{Endpoint, UPLINK},
    traffic::{ping::ping_with_ttl, tcp},
    verify::transfer_limit,
};

use crate::{
    faults::{golden_frames, pair},
    foreign,
    machine::Need,
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

/// Number of packets of each kind.
const PACKETS: u64 = 5;
const TCP_BYTES: u64 = 1 << 20;
/// An address of a peer that takes only finished packets.
const FINISHED_ONLY: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 9);

sockopt_impl!(
    /// The options of the IPv4 headers that a socket makes.
    IpOptions,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_OPTIONS,
    [u8; 40]
);
sockopt_impl!(
    /// Whether UDP datagrams go without a checksum.
    NoChecksum,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_NO_CHECK,
    libc::c_int
);

pub(crate) fn register(suite: &mut Suite) {
    suite.add("shells::headers_in_several_buffers_are_read", needs(Rung::Tc, Rung::Tc), several_buffers);
    suite.add(
        "shells::a_tunnel_through_the_overlay_takes_the_slow_path",
        &[Need::Tun, Need::Ebpf, Need::Vxlan],
        nested_tunnel,
    );
    suite.add("shells::the_outer_tos_is_the_inner_one_on_tun", &[Need::Tun, Need::Nftables], outer_tos);
    suite.add("shells::marks_of_xdp_are_erased", needs(Rung::Xdp, Rung::Xdp), marks_erased);
}

/// Sends one packet in two writes. The kernel keeps the first byte behind the headers, and the others in another buffer.
fn send_in_pieces(socket: &OwnedFd, payload: &[u8], to: SocketAddrV4) -> Result<()> {
    let to = SockaddrIn::from(to);
    let (first, rest) = payload.split_at_checked(1).context("an empty packet")?;
    sendto(socket.as_raw_fd(), first, &to, MsgFlags::from_bits_retain(libc::MSG_MORE))
        .context("send the first byte")?;
    sendto(socket.as_raw_fd(), rest, &to, MsgFlags::empty()).context("send the other bytes")?;
    Ok(())
}

fn several_buffers(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tc)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);

    // TCP for a peer that takes only finished packets: the checksum has to be seen.
    pair.store.write_lease("10.244.9.0-24", "192.168.77.99")?;
    pair.a.wait_for_routes("a second peer", |routes| routes.routes.len() == 2)?;
    let mut segment = [0; 20];
    segment[12..18].copy_from_slice(&[0x50, 0x10, 0, 0, 0x12, 0x34]);
    for options in [None, Some([1; 40])] {
        let before = pair.a.counters()?;
        a.host.run(|| -> Result<()> {
            let socket =
                socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
            if let Some(options) = options {
                setsockopt(&socket, IpOptions, &options).context("set IP options")?;
            }
            let to = SocketAddrV4::new(FINISHED_ONLY, 0);
            (0..PACKETS).try_for_each(|_| send_in_pieces(&socket, &segment, to))
        })??;
        let after = pair.a.counters()?;
        let carried = |counters: &Counters| counters.traffic.egress_fast_packets;
        ensure!(
            carried(&after) - carried(&before) == PACKETS && after.punts == before.punts,
            "{options:?}: {before:?} before, {after:?} after {PACKETS} packets"
        );
    }

    // The payload of a golden frame from host B, in a datagram.
    let is_from_b = |frame: &[u8]| frame.get(26..30) == Some(&b.underlay.octets()[..]);
    let frames = golden_frames()?;
    let golden = frames.iter().find(|golden| golden.is_delivered() && is_from_b(&golden.frame));
    let payload = golden.and_then(|golden| golden.frame.get(42..)).context("no frame of host B")?;
    let before = pair.a.counters()?;
    b.host.run(|| -> Result<()> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // An unfinished one would send the datagram to the slow path.
        setsockopt(&socket, NoChecksum, &1).context("send without checksums")?;
        let to = SocketAddrV4::new(a.underlay, 8285);
        (0..PACKETS).try_for_each(|_| send_in_pieces(&socket, payload, to))
    })??;
    wait_until("the datagrams are carried", || {
        let carried = |counters: &Counters| counters.traffic.ingress_fast_packets;
        let after = pair.a.counters()?;
        ensure!(after.drops == before.drops, "{after:?}");
        Ok(carried(&after) - carried(&before) >= PACKETS)
    })
}

/// VXLAN between the hosts' overlay addresses.
fn nested_tunnel(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tc)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let [own, peer] = [Ipv4Addr::new(10, 244, 1, 0), Ipv4Addr::new(10, 244, 2, 0)];
    let [from, to] = [Ipv4Addr::new(172, 31, 0, 1), Ipv4Addr::new(172, 31, 0, 2)];
    for (side, local, remote, address) in [(a, own, peer, from), (b, peer, own, to)] {
        let host = &side.host;
        host.tool(&format!("ip link add nested type vxlan id 7 local {local} remote {remote} dstport 4789"))?;
        host.tool(&format!("ip address add {address}/24 dev nested"))?;
        host.tool("ip link set nested mtu 1400 up")?;
    }
    let (from, to) = (Endpoint { netns: &a.host, address: from }, Endpoint { netns: &b.host, address: to });
    tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
        .with_context(|| diagnosis(&pair, "nested"))?;
    let punts = pair.a.counters()?.punts;
    ensure!(
        punts.get("already_encapsulated").is_some_and(|count| *count > 0),
        "nothing was nested: {punts:?}"
    );
    Ok(())
}

/// The agent's socket sends with the TOS that the core decided.
fn outer_tos(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let (host, pod, to) = (&pair.topology.a.host, &pair.topology.a.pod, pair.topology.b.pod_address);
    host.tool("nft add table ip seen")?;
    host.tool("nft add chain ip seen output { type filter hook output priority 0 ; }")?;
    host.tool("nft add rule ip seen output udp dport 8285 ip dscp af11 ip ecn ect0 counter")?;
    pod.tool(&format!("ping -n -q -c {PACKETS} -i 0.01 -Q 0x2a {to}"))?;
    let rule = host.tool("nft list table ip seen")?;
    ensure!(rule.contains(&format!("counter packets {PACKETS} ")), "{PACKETS} packets with TOS 0x2a: {rule}");
    Ok(())
}

/// The container behind host B drops what still carries a mark.
fn marks_erased(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Xdp)?;
    let (from, to) = pair.topology.pods();
    foreign::drop_marked(&pair.topology.b.pod, UPLINK, &sandbox.new_directory("marks")?)?;
    ping_with_ttl(from.netns, to.address, 60).with_context(|| diagnosis(&pair, "marked packets"))?;
    let carried = pair.b.counters()?.traffic;
    ensure!(carried.ingress_fast_packets > 0, "XDP carried nothing: {carried:?}");
    Ok(())
}
