//! The golden vectors as files have them (tests/vectors/README.md).

use std::{net::Ipv4Addr, path::Path};

use ipnet::Ipv4Net;
use overlay_agent::route::{Routes, Subnet, abi_prefix};
use overlay_ebpf::{
    abi::Config,
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
}

#[derive(Deserialize)]
pub(crate) struct Vector {
    pub(crate) name: String,
    #[serde(deserialize_with = "hex")]
    pub(crate) packet: Vec<u8>,
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
        Config::new(public_ip.octets(), abi_prefix(*network), abi_prefix(*subnet), *port).with_devices(1, 1)
    }

    pub(crate) fn routes(&self) -> Routes {
        self.routes.iter().map(|route| (route.subnet, route.peer.into())).collect()
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
