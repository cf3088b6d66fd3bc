//! Links, addresses and routes over rtnetlink.
#![allow(clippy::wildcard_enum_match_arm, reason = "the kernel adds attributes; only a few are read")]

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use nix::{
    libc::{EACCES, EBUSY, EHOSTUNREACH, EINVAL, ENETUNREACH, ENODEV, EOPNOTSUPP, ESRCH},
    sys::socket::{
        setsockopt,
        sockopt::{RcvBuf, RcvBufForce},
    },
};
use rtnetlink::{
    Handle, LinkBridge, LinkDummy, LinkUnspec, MulticastGroup, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::{
            InfoBridge, InfoData, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType,
            LinkMessage, LinkXdp,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
        },
        tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
    sys::AsyncSocket as _,
};

/// The value of the first of some attributes that matches a pattern.
macro_rules! attribute {
    ($attributes:expr, $pattern:pat => $value:expr) => {
        $attributes.iter().find_map(|attribute| match attribute {
            $pattern => Some($value),
            _ => None,
        })
    };
}
pub(crate) use attribute;

/// A connection to the kernel in the current network namespace. All methods fail when the kernel returns an error.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

/// Subscribes to changes, on a connection of its own: one item for each message of the kernel. The stream ends when the
/// connection fails.
/// Fails when the kernel refuses a socket.
pub(crate) fn subscribe(
    groups: &[MulticastGroup],
) -> Result<(Netlink, impl Stream<Item = ()> + Unpin + use<>)> {
    let (netlink, messages) = follow(groups, None)?;
    Ok((netlink, messages.map(drop)))
}

/// Messages of the kernel. The stream ends when the connection fails.
pub(crate) type Messages = Box<dyn Stream<Item = NetlinkPayload<RouteNetlinkMessage>> + Send + Unpin>;

/// Like [`subscribe`], with the messages themselves; [`NetlinkPayload::Overrun`] stands for messages that the kernel dropped. `buffer`
/// is the size in bytes of the socket's receive buffer, above the system's limit when the agent has `CAP_NET_ADMIN`.
pub(crate) fn follow(groups: &[MulticastGroup], buffer: Option<usize>) -> Result<(Netlink, Messages)> {
    let (mut connection, handle, messages) =
        rtnetlink::new_multicast_connection(groups).context("subscribe to changes of network devices")?;
    if let Some(size) = buffer {
        let socket = connection.socket_mut().socket_ref();
        let forced = setsockopt(socket, RcvBufForce, &size);
        forced.or_else(|_| setsockopt(socket, RcvBuf, &size)).context("set the size of a receive buffer")?;
    }
    tokio::spawn(connection);
    Ok((Netlink::from(handle), Box::new(messages.map(|(message, _)| message.payload))))
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Largest packet in bytes, without link-layer header.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether the other end of the link is there.
    pub carrier: bool,
    /// Whether it is a loopback device.
    pub loopback: bool,
    /// Whether frames have an Ethernet header.
    pub ethernet: bool,
    /// Its hardware address, if that is one of Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Kind of a virtual device; `None` for hardware, including virtio.
    pub kind: Option<String>,
    /// Its alias (`ip link set alias`).
    pub alias: Option<String>,
    /// Index of the device below it, of a VLAN for instance; of a veth, its other end, perhaps in another namespace.
    pub lower: Option<u32>,
    /// Index of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// Whether the device of `lower` is in another network namespace.
    pub leads_elsewhere: bool,
    /// Whether it is a bridge that tells VLANs apart.
    pub vlan_filtering: bool,
}

/// Packets that the kernel or a driver dropped at a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkDrops {
    /// On their way in.
    pub received: u64,
    /// On their way out.
    pub sent: u64,
}

impl Link {
    /// The device without what may change while programs are attached to it.
    pub(crate) fn identity(&self) -> Self {
        Self {
            mtu: 0,
            up: true,
            carrier: true,
            alias: None,
            lower: None,
            controller: None,
            leads_elsewhere: false,
            vlan_filtering: false,
            ..self.clone()
        }
    }
}

#[cfg(test)]
impl Link {
    /// An Ethernet device of hardware, up and with a carrier, for tests.
    pub(crate) fn ethernet(index: u32, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            index,
            mtu: 1500,
            up: true,
            carrier: true,
            loopback: false,
            ethernet: true,
            mac: None,
            kind: None,
            alias: None,
            lower: None,
            controller: None,
            leads_elsewhere: false,
            vlan_filtering: false,
        }
    }
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub destination: Ipv4Net,
    /// Index of the device.
    pub index: u32,
    /// Metric; the lowest wins.
    pub metric: u32,
}

/// The route to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Index of the device.
    pub index: u32,
    /// Source address of packets on this route.
    pub source: Option<Ipv4Addr>,
}

impl From<Handle> for Netlink {
    fn from(handle: Handle) -> Self {
        Self { handle }
    }
}

impl Netlink {
    /// Connects, with a task of the current runtime.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All devices.
    pub async fn links(&self) -> Result<Vec<Link>> {
        // Statistics are more than half of each answer.
        let request =
            self.handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let messages = request.execute().try_filter_map(async |message| Ok(link(&message)));
        messages.try_collect().await.context("list network devices")
    }

    /// The device with this name.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.links().await?.into_iter().find(|link| link.name == name))
    }

    /// All IPv4 addresses with the index of their device.
    pub async fn addresses(&self) -> Result<Vec<(u32, Ipv4Net)>> {
        let messages = self.address_messages().await?;
        Ok(messages.iter().filter_map(|message| Some((message.header.index, address(message)?))).collect())
    }

    async fn address_messages(&self) -> Result<Vec<AddressMessage>> {
        self.handle.address().get().execute().try_collect().await.context("list addresses")
    }

    /// All unicast IPv4 routes of the main table.
    pub async fn routes(&self) -> Result<Vec<Route>> {
        let messages = self.route_messages().await?;
        let unicast = messages.iter().filter(|message| {
            message.header.kind == RouteType::Unicast && message.header.table == RouteHeader::RT_TABLE_MAIN
        });
        Ok(unicast
            .filter_map(|message| {
                let metric =
                    attribute!(message.attributes, RouteAttribute::Priority(metric) => *metric).unwrap_or(0);
                Some(Route { destination: destination(message)?, index: device(message)?, metric })
            })
            .collect())
    }

    /// The messages about all entries of the neighbour tables of a family; `AddressFamily::Bridge` has those of bridges.
    pub(crate) async fn neighbour_messages(&self, family: AddressFamily) -> Result<Vec<NeighbourMessage>> {
        let request = self.handle.neighbours().get().set_address_family(family);
        request.execute().try_collect().await.context("list neighbours")
    }

    /// The messages about the queueing disciplines of all devices.
    pub(crate) async fn qdisc_messages(&self) -> Result<Vec<TcMessage>> {
        self.handle.qdisc().get().execute().try_collect().await.context("list queueing disciplines")
    }

    /// Makes the kernel check whether a neighbour is still there, as a packet for it would. One that the kernel does not know stays
    /// unknown.
    pub(crate) async fn use_neighbour(&self, index: u32, address: Ipv4Addr) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Use;
        message.attributes = vec![NeighbourAttribute::Destination(NeighbourAddress::Inet(address))];
        // Not NLM_F_CREATE.
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let context = || format!("use the neighbour {address}");
        let mut answers = self.handle.clone().request(request).with_context(context)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(error.to_io()).with_context(context);
            }
        }
        Ok(())
    }

    /// The messages about all IPv4 routes, of all tables.
    pub(crate) async fn route_messages(&self) -> Result<Vec<RouteMessage>> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        self.handle.route().get(request).execute().try_collect().await.context("list routes")
    }

    /// The device of the default route, the preferred one of several.
    pub async fn default_route(&self) -> Result<Option<u32>> {
        let routes = self.routes().await?;
        let defaults = routes.iter().filter(|route| route.destination.prefix_len() == 0);
        Ok(defaults.min_by_key(|route| route.metric).map(|route| route.index))
    }

    /// The kernel's route to an address; `None` when it has none.
    pub async fn route_to(&self, address: Ipv4Addr) -> Result<Option<Hop>> {
        self.look_up(address, RouteMessageBuilder::<Ipv4Addr>::new()).await
    }

    /// The kernel's route to an address for packets from `source`, an address of this host; `None` when it has none.
    pub async fn route_between(&self, source: Ipv4Addr, address: Ipv4Addr) -> Result<Option<Hop>> {
        self.look_up(address, RouteMessageBuilder::<Ipv4Addr>::new().source_prefix(source, 32)).await
    }

    async fn look_up(
        &self,
        address: Ipv4Addr,
        request: RouteMessageBuilder<Ipv4Addr>,
    ) -> Result<Option<Hop>> {
        let request = request.destination_prefix(address, 32).build();
        let message = match self.handle.route().get(request).execute().try_next().await {
            Err(error) if is_no_route(&error) => None,
            message => message.with_context(|| format!("look up the route to {address}"))?,
        };
        Ok(message.and_then(|message| {
            let source =
                attribute!(message.attributes, RouteAttribute::PrefSource(RouteAddress::Inet(source)) => *source);
            Some(Hop { index: device(&message)?, source })
        }))
    }

    /// What a device has dropped since it was made; `None` when there is no such device.
    pub async fn drops(&self, index: u32) -> Result<Option<LinkDrops>> {
        let message = match self.handle.link().get().match_index(index).execute().try_next().await {
            Err(error) if errno(&error) == Some(ENODEV) => None,
            message => message.with_context(|| format!("read the statistics of the device {index}"))?,
        };
        Ok(message.and_then(|message| {
            attribute!(message.attributes, LinkAttribute::Stats64(stats) =>
                LinkDrops { received: stats.rx_dropped, sent: stats.tx_dropped })
        }))
    }

    /// Id of the XDP program on a device, in whatever mode; `None` when there is none.
    pub async fn xdp_program(&self, index: u32) -> Result<Option<u32>> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.with_context(|| format!("look up the device {index}"))?;
        let xdp = link.iter().find_map(|link| attribute!(link.attributes, LinkAttribute::Xdp(xdp) => xdp));
        Ok(xdp.and_then(|xdp| {
            attribute!(xdp, LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => *id)
        }))
    }

    /// Whether a clsact qdisc of a device has a filter with this priority and minor handle.
    pub async fn has_filter(&self, index: u32, egress: bool, priority: u16, handle: u16) -> Result<bool> {
        Ok(!self.filters(index, egress, priority, handle).await?.is_empty())
    }

    /// Whether it is a filter with the eBPF program of one of these names.
    pub(crate) async fn has_program_filter(
        &self,
        index: u32,
        egress: bool,
        (priority, handle): (u16, u16),
        programs: &[&str],
    ) -> Result<bool> {
        let filters = self.filters(index, egress, priority, handle).await?;
        let mut options =
            filters.iter().flat_map(|filter| &filter.attributes).filter_map(|attribute| match attribute {
                TcAttribute::Options(options) => Some(options),
                _ => None,
            });
        Ok(options.any(|options| {
            let name = attribute!(options, TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => name.as_str());
            name.is_some_and(|name| programs.contains(&name))
        }))
    }

    async fn filters(&self, index: u32, egress: bool, priority: u16, handle: u16) -> Result<Vec<TcMessage>> {
        let request = self.handle.traffic_filter(index as i32).get();
        let request = if egress { request.egress() } else { request.ingress() };
        let filters: Vec<_> = (request.execute().try_collect().await)
            .with_context(|| format!("list the tc filters of the device {index}"))?;
        let handle = TcHandle { major: 0, minor: handle };
        let is_wanted = |filter: &TcMessage| {
            filter.header.handle == handle && filter.header.info >> 16 == u32::from(priority)
        };
        Ok(filters.into_iter().filter(is_wanted).collect())
    }

    /// Sets a device's alias.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).alias(alias).build();
        self.handle.link().change(message).execute().await.context("set the device's alias")
    }

    /// Renames a device. Returns whether that set it down: kernels before 6.2 rename no device that is up.
    pub async fn rename(&self, index: u32, name: &str) -> Result<bool> {
        let named = || LinkUnspec::new_with_index(index).name(name);
        let what = || format!("rename the device to {name}");
        match self.handle.link().change(named().build()).execute().await {
            Err(error) if errno(&error) == Some(EBUSY) => {}
            renamed => return renamed.map(|()| false).with_context(what),
        }
        let down = LinkUnspec::new_with_index(index).down().build();
        self.handle.link().change(down).execute().await.with_context(what)?;
        self.handle.link().change(named().build()).execute().await.with_context(what)?;
        Ok(true)
    }

    /// Sets a device's MTU and sets the device up.
    pub async fn set_up(&self, index: u32, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        let request = self.handle.link().change(message);
        request.execute().await.with_context(|| format!("set the device up with MTU {mtu}"))
    }

    /// Makes a device that leads nowhere, with this hardware address, and sets it up: a dummy device, or a bridge without ports where
    /// the kernel has no dummy devices.
    pub(crate) async fn add_dummy(&self, name: &str, mac: [u8; 6]) -> Result<()> {
        let dummy = LinkDummy::new(name).address(mac.to_vec()).up().build();
        let bridge = LinkBridge::new(name).address(mac.to_vec()).up().build();
        let made = match self.handle.link().add(dummy).execute().await {
            Err(error) if errno(&error) == Some(EOPNOTSUPP) => self.handle.link().add(bridge).execute().await,
            made => made,
        };
        made.with_context(|| format!("make the device {name}"))
    }

    /// Makes all addresses of a network addresses of this host, on a device and until that is removed.
    pub(crate) async fn add_local_route(&self, network: Ipv4Net, index: u32) -> Result<()> {
        let request = self.handle.route().add(local_route(network, index)).replace();
        request.execute().await.with_context(|| format!("make {network} addresses of this host"))
    }

    /// The networks of [`Self::add_local_route`] of a device.
    pub(crate) async fn local_routes(&self, index: u32) -> Result<Vec<Ipv4Net>> {
        let messages = self.route_messages().await?;
        let local = messages
            .iter()
            .filter(|message| message.header.kind == RouteType::Local && device(message) == Some(index));
        Ok(local.filter_map(destination).collect())
    }

    /// Removes a device.
    pub async fn delete_link(&self, index: u32) -> Result<()> {
        self.handle.link().del(index).execute().await.context("remove the device")
    }

    /// Adds an IPv4 address to a device, unless it has it.
    pub async fn add_address(&self, index: u32, address: Ipv4Net) -> Result<()> {
        let request = self.handle.address().add(index, address.addr().into(), address.prefix_len());
        request.replace().execute().await.with_context(|| format!("add the address {address}"))
    }

    /// Removes all IPv4 addresses of a device but this one.
    pub async fn remove_other_addresses(&self, index: u32, kept: Ipv4Net) -> Result<()> {
        for message in self.address_messages().await? {
            let is_ipv4 = message.header.family == AddressFamily::Inet;
            if message.header.index == index && is_ipv4 && address(&message) != Some(kept) {
                self.handle.address().del(message).execute().await.context("remove a stale address")?;
            }
        }
        Ok(())
    }

    /// Routes a network through a device, with `source` as the preferred source address.
    pub async fn add_route(&self, network: Ipv4Net, index: u32, source: Ipv4Addr) -> Result<()> {
        let route = route_to_net(network).output_interface(index).pref_source(source).scope(RouteScope::Link);
        let request = self.handle.route().add(route.build()).replace();
        request.execute().await.with_context(|| format!("route {network} through the device"))
    }

    /// Removes the routes of a network through a device.
    pub async fn remove_routes(&self, network: Ipv4Net, index: u32) -> Result<()> {
        for message in self.route_messages().await? {
            let is_main = message.header.table == RouteHeader::RT_TABLE_MAIN;
            if is_main && destination(&message) == Some(network) && device(&message) == Some(index) {
                self.handle.route().del(message).execute().await.context("remove a route of the device")?;
            }
        }
        Ok(())
    }

    /// Adds a blackhole route with the lowest preference. It belongs to no device and stays until
    /// [`Netlink::remove_blackhole`].
    pub async fn add_blackhole(&self, subnet: Ipv4Net) -> Result<()> {
        let request = self.handle.route().add(blackhole(subnet)).replace();
        request.execute().await.with_context(|| format!("add the blackhole route for {subnet}"))
    }

    /// Subnets with a route from [`Netlink::add_blackhole`].
    pub async fn blackholes(&self) -> Result<Vec<Ipv4Net>> {
        let messages = self.route_messages().await?;
        let ours = messages.iter().filter(|message| {
            message.header.kind == RouteType::BlackHole && message.header.protocol == BLACKHOLE_MARK
        });
        Ok(ours.filter_map(destination).collect())
    }

    /// Removes the route from [`Netlink::add_blackhole`]. `false` when it does not exist.
    pub async fn remove_blackhole(&self, subnet: Ipv4Net) -> Result<bool> {
        match self.handle.route().del(blackhole(subnet)).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(ESRCH) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("remove the blackhole route for {subnet}")),
        }
    }
}

/// The name of a device. Fails when the device is gone.
pub fn device_name(index: u32) -> Result<String> {
    // Without such a device the library returns an empty name.
    let name = nix::net::if_::if_indextoname(index).unwrap_or_default();
    ensure!(!name.is_empty(), "the device {index} is gone");
    Ok(name.to_string_lossy().into_owned())
}

fn local_route(network: Ipv4Net, index: u32) -> RouteMessage {
    let route = route_to_net(network).output_interface(index).table_id(LOCAL_TABLE);
    route.kind(RouteType::Local).scope(RouteScope::Host).build()
}

/// The table of this host's addresses: `RT_TABLE_LOCAL` (linux/rtnetlink.h).
const LOCAL_TABLE: u32 = 255;

/// Distinguishes the agent's blackhole routes from others; iproute2 assigns this protocol number to no program.
const BLACKHOLE_MARK: RouteProtocol = RouteProtocol::Other(0x6f);

fn route_to_net(net: Ipv4Net) -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(net.network(), net.prefix_len())
}

/// With the lowest preference: the containers' bridge may have a route to the same subnet.
fn blackhole(subnet: Ipv4Net) -> RouteMessage {
    route_to_net(subnet).kind(RouteType::BlackHole).protocol(BLACKHOLE_MARK).priority(u32::MAX).build()
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io().raw_os_error(),
        _ => None,
    }
}

/// Errors for an address without route, or with a prohibit, unreachable or blackhole route.
fn is_no_route(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(ENETUNREACH | EHOSTUNREACH | EACCES | EINVAL))
}

/// The device of a message; `None` when that has no name.
pub(crate) fn link(message: &LinkMessage) -> Option<Link> {
    let (header, attributes) = (&message.header, &message.attributes);
    let info = attribute!(attributes, LinkAttribute::LinkInfo(info) => info);
    Some(Link {
        name: attribute!(attributes, LinkAttribute::IfName(name) => name.clone())?,
        index: header.index,
        mtu: attribute!(attributes, LinkAttribute::Mtu(mtu) => *mtu).unwrap_or(0),
        up: header.flags.contains(LinkFlags::Up),
        carrier: header.flags.contains(LinkFlags::LowerUp),
        loopback: header.flags.contains(LinkFlags::Loopback),
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        mac: attribute!(attributes, LinkAttribute::Address(address) => address.as_slice().try_into().ok())
            .flatten(),
        kind: info.and_then(|info| attribute!(info, LinkInfo::Kind(kind) => kind.to_string())),
        alias: attribute!(attributes, LinkAttribute::IfAlias(alias) => alias.clone()),
        lower: attribute!(attributes, LinkAttribute::Link(index) => *index),
        controller: attribute!(attributes, LinkAttribute::Controller(index) => *index),
        leads_elsewhere: attribute!(attributes, LinkAttribute::LinkNetNsId(_) => ()).is_some(),
        vlan_filtering: info
            .and_then(|info| attribute!(info, LinkInfo::Data(InfoData::Bridge(bridge)) => bridge))
            .and_then(|bridge| attribute!(bridge, InfoBridge::VlanFiltering(filtering) => *filtering))
            .unwrap_or(false),
    })
}

/// The IPv4 address of a message about an address.
pub(crate) fn address(message: &AddressMessage) -> Option<Ipv4Net> {
    let local = attribute!(message.attributes, AddressAttribute::Local(IpAddr::V4(address)) => *address)?;
    Ipv4Net::new(local, message.header.prefix_len).ok()
}

/// The destination of a route; a default route has no such attribute.
pub(crate) fn destination(message: &RouteMessage) -> Option<Ipv4Net> {
    let address =
        attribute!(message.attributes, RouteAttribute::Destination(RouteAddress::Inet(address)) => *address);
    let length = message.header.destination_prefix_length;
    Ipv4Net::new(address.unwrap_or(Ipv4Addr::UNSPECIFIED), length).ok()
}

/// The index of a route's device.
pub(crate) fn device(message: &RouteMessage) -> Option<u32> {
    attribute!(message.attributes, RouteAttribute::Oif(index) => *index)
}
