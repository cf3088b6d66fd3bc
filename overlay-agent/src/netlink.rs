//! What the agent asks of the kernel's routing netlink: links, addresses, routes.
#![allow(clippy::wildcard_enum_match_arm, reason = "the kernel adds attributes; we read the few we know")]

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteScope, RouteType},
    },
};

/// A connection to the kernel in the current network namespace.
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
    /// Whether the administrator wants it up.
    pub up: bool,
    /// Whether frames have an Ethernet header.
    pub ethernet: bool,
    /// What kind of virtual device it is; `None` for hardware, virtio included.
    pub kind: Option<String>,
    /// The administrator's (or our) note on it.
    pub alias: Option<String>,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: Ipv4Net,
    /// Through which device.
    pub index: u32,
    /// Preference among routes to one destination; the lowest wins.
    pub metric: u32,
}

impl Netlink {
    /// Connects. The connection lives in a task of the current runtime.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a socket.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All devices.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn links(&self) -> Result<Vec<Link>> {
        let links: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.context("list network devices")?;
        Ok(links.iter().filter_map(link).collect())
    }

    /// The device of that name, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn link(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.links().await?.into_iter().find(|link| link.name == name))
    }

    /// All IPv4 addresses with the index of their device.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
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
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
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

    /// Notes on a device whose it is.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn set_alias(&self, index: u32, alias: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).alias(alias).build();
        self.handle.link().change(message).execute().await.context("set the device's alias")
    }

    /// Sets a device's MTU and takes it up.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn set_up(&self, index: u32, mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        self.handle
            .link()
            .change(message)
            .execute()
            .await
            .with_context(|| format!("take the device up with MTU {mtu}"))
    }

    /// Removes a device.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn delete_link(&self, index: u32) -> Result<()> {
        self.handle.link().del(index).execute().await.context("remove the device")
    }

    /// Gives a device exactly this IPv4 address.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn set_only_address(&self, index: u32, address: Ipv4Net) -> Result<()> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .context("list addresses")?;
        let mut present = false;
        for message in messages.into_iter().filter(|message| message.header.family == AddressFamily::Inet) {
            let local = message.attributes.iter().any(|attribute| {
                matches!(attribute, AddressAttribute::Local(std::net::IpAddr::V4(local)) if *local == address.addr())
            });
            if local && message.header.prefix_len == address.prefix_len() {
                present = true;
            } else {
                self.handle.address().del(message).execute().await.context("remove a stale address")?;
            }
        }
        if !present {
            let request = self.handle.address().add(index, address.addr().into(), address.prefix_len());
            request.execute().await.with_context(|| format!("add the address {address}"))?;
        }
        Ok(())
    }

    /// Routes a network through a device, with `source` for packets of this host that have none yet.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
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
