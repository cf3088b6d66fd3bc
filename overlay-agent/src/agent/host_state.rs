//! This host's devices, addresses and routes, to tell whether another attempt meets anything new.

use anyhow::Result;
use ipnet::Ipv4Net;

use crate::netlink::{Link, Netlink, Route};

/// A listing. Equal ones make an attempt that failed fail again, as far as the kernel's network is the reason.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HostState {
    links: Vec<Link>,
    addresses: Vec<(u32, Ipv4Net)>,
    routes: Vec<Route>,
}

impl HostState {
    /// Lists the present state. Fails when the kernel does.
    pub(super) async fn read(netlink: &Netlink) -> Result<Self> {
        Ok(Self {
            links: netlink.links().await?,
            addresses: netlink.addresses().await?,
            routes: netlink.routes().await?,
        })
    }
}
