//! Asks the kernel for its routes to many addresses at once.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel adds messages and attributes; only a few are read"
)]

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result};
use nix::libc;
use rtnetlink::{
    RouteMessageBuilder,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Requests of one write. Their answers have to fit into the socket's receive buffer.
const BATCH: usize = 64;
/// Longest answer in bytes.
const LONGEST: usize = 4096;
/// Protocol number of UDP.
const UDP: u8 = 17;

/// The kernel's route to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KernelRoute {
    /// The device.
    pub(super) ifindex: u32,
    /// The MTU in bytes that the route or the kernel's cache has for this destination.
    pub(super) mtu: Option<u32>,
    /// The neighbour to which packets are sent: the gateway, or the peer itself. `None` where it is no IPv4 neighbour, or packets get
    /// more than a link-layer header.
    pub(super) neighbour: Option<Ipv4Addr>,
}

/// What the kernel says about a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It has a route.
    Route(KernelRoute),
    /// It has none, or one that refuses.
    NoRoute,
    /// It has a blackhole route, or no device has the source address.
    Invalid,
    /// It says nothing, for lack of memory.
    Unknown,
}

/// A netlink socket for questions about routes. The kernel answers while it takes them, so nothing is waited for.
#[derive(Debug)]
pub(crate) struct RouteQuery {
    socket: Socket,
    sequence: u32,
}

impl RouteQuery {
    /// Opens the socket. Fails when the kernel refuses one.
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { socket: open()?, sequence: 0 })
    }

    /// What the kernel says about UDP datagrams from `source` and `port` to that port of each of `peers`. Rules, equal-cost routes
    /// and cached path MTUs count. Fails when the kernel does not take the questions, or drops answers.
    pub(crate) fn ask(
        &mut self,
        source: Ipv4Addr,
        port: u16,
        peers: &[Ipv4Addr],
    ) -> Result<BTreeMap<Ipv4Addr, Answer>> {
        let mut answers: BTreeMap<_, _> = peers.iter().map(|peer| (*peer, Answer::Unknown)).collect();
        for batch in peers.chunks(BATCH) {
            let asked = self.ask_batch(source, port, batch, &mut answers);
            if asked.is_err() {
                // Answers that were not read must not be taken for those to the next questions.
                self.socket = open()?;
            }
            asked?;
        }
        Ok(answers)
    }

    fn ask_batch(
        &mut self,
        source: Ipv4Addr,
        port: u16,
        batch: &[Ipv4Addr],
        answers: &mut BTreeMap<Ipv4Addr, Answer>,
    ) -> Result<()> {
        let first = self.sequence.wrapping_add(1);
        let mut requests = Vec::new();
        for peer in batch {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message =
                NetlinkMessage::from(RouteNetlinkMessage::GetRoute(request(source, port, *peer)));
            message.header.flags = NLM_F_REQUEST;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = requests.len();
            requests.resize(start + message.buffer_len(), 0);
            message.serialize(requests.get_mut(start..).unwrap_or_default());
        }
        self.socket.send(&requests, 0).context("ask for routes")?;
        for _ in batch {
            let (sequence, answer) = self.read()?;
            let position = sequence.wrapping_sub(first) as usize;
            let peer = batch
                .get(position)
                .context("the kernel answers a question about routes that was not asked")?;
            answers.insert(*peer, answer);
        }
        Ok(())
    }

    fn read(&self) -> Result<(u32, Answer)> {
        let mut buffer = Vec::with_capacity(LONGEST);
        // An answer that is not there was dropped.
        self.socket.recv(&mut buffer, libc::MSG_DONTWAIT).context("read the kernel's routes")?;
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer)
            .context("read the kernel's routes")?;
        let answer = match &message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                kernel_route(route).map_or(Answer::NoRoute, Answer::Route)
            }
            NetlinkPayload::Error(error) => match error.to_io().raw_os_error() {
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES) => Answer::NoRoute,
                Some(libc::EINVAL) => Answer::Invalid,
                _ => Answer::Unknown,
            },
            _ => Answer::Unknown,
        };
        Ok((message.header.sequence_number, answer))
    }
}

fn open() -> Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
    socket.bind_auto().context("bind a netlink socket")?;
    socket.connect(&SocketAddr::new(0, 0)).context("connect a netlink socket")?;
    Ok(socket)
}

fn request(source: Ipv4Addr, port: u16, peer: Ipv4Addr) -> RouteMessage {
    let mut message = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(peer, 32).build();
    message.header.source_prefix_length = 32;
    message.attributes.extend([
        RouteAttribute::Source(RouteAddress::Inet(source)),
        RouteAttribute::IpProto(UDP),
        RouteAttribute::Sport(port),
        RouteAttribute::Dport(port),
    ]);
    message
}

fn kernel_route(message: &RouteMessage) -> Option<KernelRoute> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut mtu, mut neighbour) = (None, None, None);
    let mut is_plain = true;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => neighbour = Some(*gateway),
            // Without a gateway, the destination is the neighbour. The kernel repeats the address that was asked for.
            RouteAttribute::Destination(RouteAddress::Inet(peer)) => neighbour = neighbour.or(Some(*peer)),
            RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::EncapType(_)
            | RouteAttribute::Encap(_) => is_plain = false,
            _ => {}
        }
    }
    let neighbour = neighbour.filter(|_| is_plain);
    Some(KernelRoute { ifindex: ifindex?, mtu: mtu.filter(|mtu| *mtu > 0), neighbour })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteVia;

    use super::*;

    const PEER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 254);

    fn neighbour(attributes: impl IntoIterator<Item = RouteAttribute>) -> Option<Ipv4Addr> {
        let mut message = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(PEER, 32).build();
        message.attributes.push(RouteAttribute::Oif(2));
        message.attributes.extend(attributes);
        kernel_route(&message).unwrap().neighbour
    }

    #[test]
    fn packets_go_to_the_gateway_or_to_the_peer_itself() {
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY));
        assert_eq!(neighbour([]), Some(PEER));
        assert_eq!(neighbour([gateway.clone()]), Some(GATEWAY));
        // The kernel's order is no promise.
        let mut message = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let peer = RouteAttribute::Destination(RouteAddress::Inet(PEER));
        message.attributes = vec![gateway, RouteAttribute::Oif(2), peer];
        assert_eq!(kernel_route(&message).unwrap().neighbour, Some(GATEWAY));
    }

    #[test]
    fn routes_that_need_more_than_a_link_layer_header_have_no_neighbour() {
        let ipv6 = "fe80::1".parse().unwrap();
        assert_eq!(neighbour([RouteAttribute::Via(RouteVia::Inet6(ipv6))]), None);
        assert_eq!(neighbour([RouteAttribute::Gateway(RouteAddress::Inet6(ipv6))]), None);
        assert_eq!(neighbour([RouteAttribute::MultiPath(Vec::new())]), None);
        assert_eq!(neighbour([RouteAttribute::Encap(Vec::new())]), None);
    }
}
