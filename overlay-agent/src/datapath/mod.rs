//! How packets move: which rung carries each direction, and everything that runs for it.

pub mod ebpf;
pub mod tun;

use std::{collections::BTreeMap, net::Ipv4Addr, os::fd::OwnedFd};

use anyhow::{Context as _, Result, anyhow, bail};
use ebpf::{Attachment, Hook, Programs, TcAttach, self_test};
use ipnet::Ipv4Net;
use overlay_ebpf::abi::{Config, Counters};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::{info, warn};
use tun::TunRung;

use crate::{device::OverlayDevice, netlink::Link, route_table::Change};

/// What `--datapath` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Request {
    /// The best rung that this host can have, for each direction
    #[default]
    Auto,
    /// Native XDP on the underlay, tc on the overlay device
    Xdp,
    /// tc in both directions
    Tc,
    /// No eBPF: every packet through the agent
    Tun,
}

/// One of the ways to move packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rung {
    /// Native XDP.
    Xdp,
    /// tcx or clsact.
    Tc,
    /// User space.
    Tun,
}

/// The rung of one direction, and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The rung.
    pub rung: Rung,
    /// One sentence.
    pub why: String,
}

/// What a datapath is made for.
pub struct Plan<'a> {
    /// What the operator asked for.
    pub request: Request,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Who this host is; the devices are filled in.
    pub config: Config,
    /// The device that carries outer packets.
    pub underlay: &'a Link,
}

/// A running datapath. Dropping it detaches the programs and stops the threads.
pub struct Datapath {
    /// How inner packets leave.
    pub egress: Choice,
    /// How outer packets arrive.
    pub ingress: Choice,
    /// Index of the overlay device.
    pub overlay_ifindex: u32,
    // Fields end in this order, and attachments from the front: the last one attached first. XDP goes before the tc program
    // behind it, or unwrapped packets would reach the stack as the underlay's own.
    _attachments: Vec<Attachment>,
    programs: Option<Programs>,
    tun: TunRung,
    /// Whether the kernel's map may lack what the slow path has.
    behind: bool,
}

/// Counters of both paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathCounters {
    /// The eBPF programs'.
    pub fast: Counters,
    /// The agent's.
    pub slow: Counters,
}

impl PathCounters {
    /// All counters at zero.
    pub const ZERO: Self = Self { fast: Counters::ZERO, slow: Counters::ZERO };

    /// Adds what another datapath counted.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        self.fast.add(&other.fast);
        self.slow.add(&other.slow);
        self
    }
}

impl Datapath {
    /// Starts the slow path, then as much of the fast path as was asked for and can be had.
    ///
    /// # Errors
    ///
    /// When the slow path cannot start, or an explicit request cannot be met; nothing stays attached then.
    pub fn start(
        plan: &Plan<'_>,
        device: OverlayDevice,
        socket: OwnedFd,
        failures: mpsc::Sender<String>,
    ) -> Result<Self> {
        let config = plan.config.with_devices(plan.underlay.index, device.index);
        let name = device.name.clone();
        let tun = TunRung::start(config, device.mtu, device.fd, socket, failures)?;
        let fast = FastPath::start(plan, &config, &name)?;
        info!("egress: {:?}, {}", fast.egress.rung, fast.egress.why);
        info!("ingress: {:?}, {}", fast.ingress.rung, fast.ingress.why);
        let FastPath { egress, ingress, attachments, programs } = fast;
        Ok(Self {
            egress,
            ingress,
            overlay_ifindex: config.overlay_ifindex,
            _attachments: attachments,
            programs,
            tun,
            behind: false,
        })
    }

    /// Makes both paths route exactly `routes`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses an update of its map, or the map is full; the slow path has the routes then all the same.
    pub fn set_routes(&mut self, routes: &BTreeMap<Ipv4Net, Ipv4Addr>) -> Result<()> {
        self.tun.set_routes(routes);
        self.update_programs(|programs| programs.set_routes(routes))
    }

    /// Makes `changes` in both paths; `routes` is what they lead to. After an error, the next call sees to all routes again.
    ///
    /// # Errors
    ///
    /// As [`Datapath::set_routes`].
    pub fn change_routes(&mut self, changes: &[Change], routes: &BTreeMap<Ipv4Net, Ipv4Addr>) -> Result<()> {
        if self.behind {
            return self.set_routes(routes);
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.tun.change_routes(changes);
        self.update_programs(|programs| programs.change_routes(changes))
    }

    fn update_programs(&mut self, update: impl FnOnce(&mut Programs) -> Result<()>) -> Result<()> {
        let updated = self.programs.as_mut().map_or(Ok(()), update);
        self.behind = updated.is_err();
        updated
    }

    /// The overlay device carries inner packets of up to `mtu` bytes now.
    pub fn set_mtu(&self, mtu: u32) {
        self.tun.set_mtu(mtu);
    }

    /// What both paths counted.
    ///
    /// # Errors
    ///
    /// When the kernel's map cannot be read.
    pub fn counters(&self) -> Result<PathCounters> {
        let fast = match &self.programs {
            Some(programs) => programs.counters()?,
            None => Counters::ZERO,
        };
        Ok(PathCounters { fast, slow: self.tun.counters().read() })
    }
}

/// The eBPF part while it is being put together.
struct FastPath {
    egress: Choice,
    ingress: Choice,
    /// The latest first.
    attachments: Vec<Attachment>,
    programs: Option<Programs>,
}

impl FastPath {
    fn start(plan: &Plan<'_>, config: &Config, overlay: &str) -> Result<Self> {
        match plan.request {
            Request::Tun => Ok(Self::none("asked for with --datapath tun")),
            Request::Tc => Self::explicit(plan, config, overlay, Rung::Tc),
            Request::Xdp => Self::explicit(plan, config, overlay, Rung::Xdp),
            Request::Auto => Ok(Self::best(plan, config, overlay)),
        }
    }

    fn none(why: &str) -> Self {
        let choice = Choice { rung: Rung::Tun, why: why.to_owned() };
        Self { egress: choice.clone(), ingress: choice, attachments: Vec::new(), programs: None }
    }

    /// All of what was asked for, or an error.
    fn explicit(plan: &Plan<'_>, config: &Config, overlay: &str, rung: Rung) -> Result<Self> {
        let asked = if rung == Rung::Xdp { "xdp" } else { "tc" };
        let attempt = || {
            let (programs, object) = load(plan, config)?;
            let why = format!("asked for with --datapath {asked}");
            let mut path = Self {
                egress: Choice { rung: Rung::Tc, why: why.clone() },
                ingress: Choice { rung, why },
                attachments: Vec::new(),
                programs: Some(programs),
            };
            path.attach_tc(plan, Hook::Ingress, &plan.underlay.name)?;
            if rung == Rung::Xdp {
                path.attach_xdp(plan, object)?;
            }
            path.attach_tc(plan, Hook::Egress, overlay)?;
            Ok(path)
        };
        attempt().map_err(|error: anyhow::Error| error.context(format!("--datapath {asked} cannot be had")))
    }

    /// The best that works, direction by direction.
    fn best(plan: &Plan<'_>, config: &Config, overlay: &str) -> Self {
        let (programs, object) = match load(plan, config) {
            Ok(loaded) => loaded,
            Err(error) => {
                warn!("no eBPF datapath: {error:#}");
                return Self::none(&format!("eBPF cannot be had: {error:#}"));
            }
        };
        let mut path = Self { programs: Some(programs), ..Self::none("") };
        path.ingress = match path.attach_tc(plan, Hook::Ingress, &plan.underlay.name) {
            Err(error) => {
                Choice { rung: Rung::Tun, why: format!("no tc program on the underlay: {error:#}") }
            }
            Ok(()) => match &plan.underlay.kind {
                // Every virtual device that has native XDP pays for it elsewhere (veth: no TSO from its peer, and a copy).
                Some(kind) => {
                    let why =
                        format!("{} is a {kind} device, which tc serves better than XDP", plan.underlay.name);
                    Choice { rung: Rung::Tc, why }
                }
                None => match path.attach_xdp(plan, object) {
                    Ok(()) => {
                        Choice { rung: Rung::Xdp, why: "the underlay's driver has native XDP".to_owned() }
                    }
                    Err(error) => Choice { rung: Rung::Tc, why: format!("no XDP: {error:#}") },
                },
            },
        };
        path.egress = match path.attach_tc(plan, Hook::Egress, overlay) {
            Ok(()) => {
                Choice { rung: Rung::Tc, why: "the kernel runs tc programs on the overlay device".to_owned() }
            }
            Err(error) => {
                Choice { rung: Rung::Tun, why: format!("no tc program on the overlay device: {error:#}") }
            }
        };
        path
    }

    fn attach_tc(&mut self, plan: &Plan<'_>, hook: Hook, device: &str) -> Result<()> {
        let programs = self.programs.as_mut().context("no programs are loaded")?;
        let attachment = programs.attach_tc(hook, device, plan.tc_attach, plan.config.port)?;
        self.attachments.insert(0, attachment);
        Ok(())
    }

    fn attach_xdp(&mut self, plan: &Plan<'_>, object: &[u8]) -> Result<()> {
        let programs = self.programs.as_mut().context("no programs are loaded")?;
        programs.load_program(Hook::Xdp)?;
        self_test::run(object, &[Hook::Xdp])?;
        let attachment = programs.attach_xdp(&plan.underlay.name)?;
        self.attachments.insert(0, attachment);
        Ok(())
    }
}

/// Loads and tests the tc programs. They are configured before anything can run them.
fn load(plan: &Plan<'_>, config: &Config) -> Result<(Programs, &'static [u8])> {
    let object = ebpf::OBJECT.ok_or_else(|| {
        anyhow!("this binary was built without eBPF programs: build it with `cargo xtask build`")
    })?;
    if !plan.underlay.ethernet {
        bail!("the underlay {} is no Ethernet device", plan.underlay.name);
    }
    let hooks = [Hook::Egress, Hook::Ingress];
    let mut programs = Programs::load(object, &hooks, 0)?;
    self_test::run(object, &hooks).context("the kernel does not run the eBPF programs as it should")?;
    programs.configure(config)?;
    Ok((programs, object))
}
