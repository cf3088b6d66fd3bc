//! Asks the kernel for its routes to many addresses at once.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel adds messages and attributes; only a few are read"
)]

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail};
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
}

/// A netlink socket for questions about routes. It answers in microseconds, so it is read without a task of its own.
#[derive(Debug)]
pub(crate) struct RouteQuery {
    socket: Socket,
    sequence: u32,
}

impl RouteQuery {
    /// Opens the socket. Fails when the kernel refuses one.
    pub(crate) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("open a netlink socket")?;
        socket.bind_auto().context("bind a netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).context("connect a netlink socket")?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The routes that UDP datagrams from `source` and `port` to that port of each of `peers` take: those without a route are left
    /// out. Rules, equal-cost routes and cached path MTUs count. Fails when the kernel does not answer.
    pub(crate) fn routes(
        &mut self,
        source: Ipv4Addr,
        port: u16,
        peers: &[Ipv4Addr],
    ) -> Result<BTreeMap<Ipv4Addr, KernelRoute>> {
        let mut routes = BTreeMap::new();
        for batch in peers.chunks(BATCH) {
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
            let mut waiting = batch.len();
            while waiting > 0 {
                let (sequence, route) = self.answer()?;
                let position = sequence.wrapping_sub(first) as usize;
                // An answer to a question that failed earlier.
                let Some(peer) = batch.get(position) else { continue };
                waiting -= 1;
                if let Some(route) = route {
                    routes.insert(*peer, route);
                }
            }
        }
        Ok(routes)
    }

    fn answer(&self) -> Result<(u32, Option<KernelRoute>)> {
        let mut buffer = Vec::with_capacity(LONGEST);
        self.socket.recv(&mut buffer, 0).context("read the kernel's routes")?;
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer)
            .context("read the kernel's routes")?;
        let route = match &message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => kernel_route(route),
            // There is no route, or one that refuses.
            NetlinkPayload::Error(_) => None,
            _ => bail!("the kernel answers a question about routes with {:?}", message.payload),
        };
        Ok((message.header.sequence_number, route))
    }
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
    let (mut ifindex, mut mtu) = (None, None);
    for attribute in &message.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            ifindex = Some(*index);
        }
        if let RouteAttribute::Metrics(metrics) = attribute {
            mtu = metrics.iter().find_map(|metric| match metric {
                RouteMetric::Mtu(mtu) => Some(*mtu),
                _ => None,
            });
        }
    }
    Some(KernelRoute { ifindex: ifindex?, mtu: mtu.filter(|mtu| *mtu > 0) })
}
