//! Links, addresses and routes over rtnetlink.
#![allow(clippy::wildcard_enum_match_arm, reason = "the kernel adds attributes; only a few are read")]

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        tc::TcHandle,
    },
};

/// A connection to the kernel in the current network namespace. All methods fail when the kernel returns an error.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
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
    /// Whether frames have an Ethernet header.
    pub ethernet: bool,
    /// Kind of a virtual device; `None` for hardware, including virtio.
    pub kind: Option<String>,
    /// Its alias (`ip link set alias`).
    pub alias: Option<String>,
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
    ///
    /// # Errors
    ///
    /// When the netlink socket cannot be opened.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All devices.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.context("list network devices")?;
        Ok(links.iter().filter_map(link).collect())
    }

    /// The device with this name.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.links().await?.into_iter().find(|link| link.name == name))
    }

    /// All IPv4 addresses with the index of their device.
    pub async fn addresses(&self) -> Result<Vec<(u32, Ipv4Net)>> {
        let messages: Vec<_> =
            self.handle.address().get().execute().try_collect().await.context("list addresses")?;
        Ok(messages
            .into_iter()
            .filter(|message| message.header.family == AddressFamily::Inet)
            .filter_map(|message| {
                let local = message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(std::net::IpAddr::V4(address)) => Some(*address),
                    _ => None,
                })?;
                Some((message.header.index, Ipv4Net::new(local, message.header.prefix_len).ok()?))
            })
            .collect())
    }

    /// All unicast IPv4 routes of the main table.
    pub async fn routes(&self) -> Result<Vec<Route>> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let messages: Vec<_> =
            self.handle.route().get(request).execute().try_collect().await.context("list routes")?;
        Ok(messages
            .into_iter()
            .filter(|message| message.header.kind == RouteType::Unicast && message.header.table == 254)
            .filter_map(|message| {
                let (mut destination, mut index, mut metric) = (Ipv4Addr::UNSPECIFIED, None, 0);
                for attribute in &message.attributes {
                    match attribute {
                        RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
                        RouteAttribute::Oif(oif) => index = Some(*oif),
                        RouteAttribute::Priority(priority) => metric = *priority,
                        _ => {}
                    }
                }
                let destination = Ipv4Net::new(destination, message.header.destination_prefix_length).ok()?;
                Some(Route { destination, index: index?, metric })
            })
            .collect())
    }

    /// The device of the default route, the preferred one of several.
    pub async fn default_route(&self) -> Result<Option<u32>> {
        let routes = self.routes().await?;
        let defaults = routes.iter().filter(|route| route.destination.prefix_len() == 0);
        Ok(defaults.min_by_key(|route| route.metric).map(|route| route.index))
    }

    /// The kernel's route to an address; `None` when it has none.
    ///
    /// # Errors
    ///
    /// When the kernel returns another error.
    pub async fn route_to(&self, address: Ipv4Addr) -> Result<Option<Hop>> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build();
        let message = match self.handle.route().get(request).execute().try_next().await {
            Ok(message) => message,
            Err(rtnetlink::Error::NetlinkError(error)) if is_no_route(&error.to_io()) => None,
            Err(error) => return Err(error).with_context(|| format!("look up the route to {address}")),
        };
        let Some(message) = message else { return Ok(None) };
        let (mut index, mut source) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(oif) => index = Some(*oif),
                RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(*address),
                _ => {}
            }
        }
        Ok(index.map(|index| Hop { index, source }))
    }

    /// Id of the XDP program on a device, in whatever mode; `None` when there is none.
    pub async fn xdp_program(&self, index: u32) -> Result<Option<u32>> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.with_context(|| format!("look up the device {index}"))?;
        Ok(link.into_iter().flat_map(|link| link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::Xdp(xdp) => xdp.into_iter().find_map(|xdp| match xdp {
                LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => Some(id),
                _ => None,
            }),
            _ => None,
        }))
    }

    /// Whether a clsact qdisc of a device has a filter with this priority and minor handle.
    pub async fn has_filter(&self, index: u32, egress: bool, priority: u16, handle: u16) -> Result<bool> {
        let filters = self.handle.traffic_filter(index as i32).get();
        let filters = if egress { filters.egress() } else { filters.ingress() };
        let filters: Vec<_> = filters
            .execute()
            .try_collect()
            .await
            .with_context(|| format!("list the tc filters of the device {index}"))?;
        let handle = TcHandle { major: 0, minor: handle };
        Ok(filters
            .iter()
            .any(|filter| filter.header.handle == handle && filter.header.info >> 16 == u32::from(priority)))
    }

    /// Sets a device's alias.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).alias(alias).build();
        self.handle.link().change(message).execute().await.context("set the device's alias")
    }

    /// Sets a device's MTU and sets the device up.
    pub async fn set_up(&self, index: u32, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        self.handle
            .link()
            .change(message)
            .execute()
            .await
            .with_context(|| format!("set the device up with MTU {mtu}"))
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
    pub async fn remove_other_addresses(&self, index: u32, address: Ipv4Net) -> Result<()> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .context("list addresses")?;
        for message in messages.into_iter().filter(|message| message.header.family == AddressFamily::Inet) {
            let local = message.attributes.iter().any(|attribute| {
                matches!(attribute, AddressAttribute::Local(std::net::IpAddr::V4(local)) if *local == address.addr())
            });
            if !local || message.header.prefix_len != address.prefix_len() {
                self.handle.address().del(message).execute().await.context("remove a stale address")?;
            }
        }
        Ok(())
    }

    /// Routes a network through a device, with `source` as the preferred source address.
    pub async fn add_route(&self, network: Ipv4Net, index: u32, source: Ipv4Addr) -> Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(network.network(), network.prefix_len())
            .output_interface(index)
            .pref_source(source)
            .scope(RouteScope::Link)
            .build();
        self.handle
            .route()
            .add(route)
            .replace()
            .execute()
            .await
            .with_context(|| format!("route {network} through the device"))
    }

    /// Adds a blackhole route with the lowest preference. It belongs to no device and stays until
    /// [`Netlink::remove_blackhole`].
    pub async fn add_blackhole(&self, subnet: Ipv4Net) -> Result<()> {
        let request = self.handle.route().add(blackhole(subnet)).replace().execute();
        request.await.with_context(|| format!("add the blackhole route for {subnet}"))
    }

    /// Subnets with a route from [`Netlink::add_blackhole`].
    pub async fn blackholes(&self) -> Result<Vec<Ipv4Net>> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let messages: Vec<_> =
            self.handle.route().get(request).execute().try_collect().await.context("list routes")?;
        let ours = messages.iter().filter(|message| {
            message.header.kind == RouteType::BlackHole && message.header.protocol == BLACKHOLE_MARK
        });
        Ok(ours
            .filter_map(|message| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                        Ipv4Net::new(*address, message.header.destination_prefix_length).ok()
                    }
                    _ => None,
                })
            })
            .collect())
    }

    /// Removes the route from [`Netlink::add_blackhole`]. `false` when it does not exist.
    pub async fn remove_blackhole(&self, subnet: Ipv4Net) -> Result<bool> {
        match self.handle.route().del(blackhole(subnet)).execute().await {
            Ok(()) => Ok(true),
            Err(rtnetlink::Error::NetlinkError(error))
                if error.to_io().raw_os_error() == Some(nix::libc::ESRCH) =>
            {
                Ok(false)
            }
            Err(error) => Err(error).with_context(|| format!("remove the blackhole route for {subnet}")),
        }
    }
}

/// The name of a device.
///
/// # Errors
///
/// When the device is gone.
pub fn device_name(index: u32) -> Result<String> {
    // Without such a device the library returns an empty name.
    let name = nix::net::if_::if_indextoname(index).unwrap_or_default();
    ensure!(!name.is_empty(), "the device {index} is gone");
    Ok(name.to_string_lossy().into_owned())
}

/// Distinguishes the agent's blackhole routes from others; iproute2 assigns this protocol number to no program.
const BLACKHOLE_MARK: RouteProtocol = RouteProtocol::Other(0x6f);

/// With the lowest preference: the containers' bridge may have a route to the same subnet.
fn blackhole(subnet: Ipv4Net) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(subnet.network(), subnet.prefix_len())
        .kind(RouteType::BlackHole)
        .protocol(BLACKHOLE_MARK)
        .priority(u32::MAX)
        .build()
}

/// Errors for an address without route, or with a prohibit, unreachable or blackhole route.
fn is_no_route(error: &std::io::Error) -> bool {
    use nix::libc::{EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH};
    matches!(error.raw_os_error(), Some(ENETUNREACH | EHOSTUNREACH | EACCES | EINVAL))
}

fn link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        name: String::new(),
        index: message.header.index,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        kind: None,
        alias: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::LinkInfo(info) => {
                link.kind = info.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}
