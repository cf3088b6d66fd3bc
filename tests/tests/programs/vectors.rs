//! The golden vectors as files have them (tests/vectors/README.md).

use std::{net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;
use overlay_agent::route::{NextHops, Subnet, abi_prefix};
use overlay_ebpf::{
    abi::{Config, NextHop},
    reason::{DropReason, PuntReason},
};
use serde::Deserialize;

#[derive(Deserialize)]
pub(crate) struct File {
    config: FileConfig,
    routes: Vec<Route>,
    pub(crate) vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct FileConfig {
    public_ip: Ipv4Addr,
    network: Ipv4Net,
    subnet: Ipv4Net,
    port: u16,
}

#[derive(Deserialize)]
struct Route {
    subnet: Subnet,
    peer: Ipv4Addr,
    #[serde(default = "loopback")]
    ifindex: u32,
    #[serde(default = "unlimited")]
    mtu: u16,
    #[serde(default)]
    slow_path: bool,
    #[serde(default)]
    finished_only: bool,
}

/// The device of test runs.
fn loopback() -> u32 {
    1
}

fn unlimited() -> u16 {
    u16::MAX
}

#[derive(Deserialize)]
pub(crate) struct Vector {
    pub(crate) name: String,
    #[serde(deserialize_with = "hex")]
    pub(crate) packet: Vec<u8>,
    /// Payload in bytes of each of the segments that an egress packet stands for.
    #[serde(default)]
    pub(crate) gso_size: usize,
    pub(crate) fast: Verdict,
    pub(crate) slow: Verdict,
    pub(crate) tun: Disposer,
}

/// What handles a packet on the tun rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Disposer {
    Shell,
    Kernel,
}

/// What is to become of a packet, in the words of the vector files.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub(crate) enum Verdict {
    Pass,
    Encap {
        #[serde(deserialize_with = "hex")]
        bytes: Vec<u8>,
    },
    Decap {
        #[serde(deserialize_with = "hex")]
        bytes: Vec<u8>,
    },
    /// The slow path sends it in fragments.
    Fragment,
    Punt {
        reason: String,
    },
    Drop {
        reason: String,
    },
}

impl Verdict {
    pub(crate) fn dropped(reason: DropReason) -> Self {
        Self::Drop { reason: reason.name().to_owned() }
    }

    pub(crate) fn punted(reason: PuntReason) -> Self {
        Self::Punt { reason: reason.name().to_owned() }
    }
}

impl File {
    pub(crate) fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors").join(name);
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn config(&self) -> Config {
        let FileConfig { public_ip, network, subnet, port } = &self.config;
        Config::new(public_ip.octets(), abi_prefix(*network), abi_prefix(*subnet), *port).with_device(1)
    }

    pub(crate) fn routes(&self) -> NextHops {
        let next_hop = |route: &Route| {
            let flag = |is_set, flag| if is_set { flag } else { 0 };
            let flags =
                flag(route.slow_path, NextHop::SLOW_PATH) | flag(route.finished_only, NextHop::FINISHED_ONLY);
            NextHop {
                peer: route.peer.octets(),
                ifindex: route.ifindex,
                mtu: route.mtu,
                flags,
                ..NextHop::default()
            }
        };
        self.routes.iter().map(|route| (route.subnet, next_hop(route))).collect()
    }
}

fn hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.as_bytes()
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect::<Option<_>>()
        .ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
}
