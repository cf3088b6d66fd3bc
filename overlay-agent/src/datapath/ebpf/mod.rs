//! The eBPF rungs: loads the programs, attaches them, fills their route map and reads their counters.

mod attach;
pub mod self_test;

pub use attach::{Attachment, TcAttach, detach_filter};

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, LpmTrie, MapData, PerCpuArray, lpm_trie::Key},
    programs::{ProgramError, SchedClassifier, Xdp},
};
use ipnet::Ipv4Net;
use overlay_ebpf::abi::{Config, Counters, MAX_ROUTES, RouteValue};

use crate::route_table::{Change, diff};

/// The compiled programs, when this binary was built with them.
#[cfg(ebpf_embedded)]
pub const OBJECT: Option<&[u8]> =
    Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/overlay-ebpf.o")));
/// The compiled programs, when this binary was built with them.
#[cfg(not(ebpf_embedded))]
pub const OBJECT: Option<&[u8]> = None;

// aya moves map values as plain bytes, so that its marker trait need not be known where the types are defined.
type ConfigBytes = [u8; size_of::<Config>()];
type CountersBytes = [u8; size_of::<Counters>()];
type RouteBytes = [u8; size_of::<RouteValue>()];

/// What the agent may ask of one of the three programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tc egress of the overlay device.
    Egress,
    /// tc ingress of the underlay.
    Ingress,
    /// XDP of the underlay.
    Xdp,
}

impl Hook {
    /// The program's name in the object, and in what the kernel lists.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Egress => "ovl_egress",
            Self::Ingress => "ovl_ingress",
            Self::Xdp => "ovl_xdp",
        }
    }
}

/// The loaded programs and their maps.
pub struct Programs {
    ebpf: Ebpf,
    /// What the route map holds.
    routes: BTreeMap<Ipv4Net, Ipv4Addr>,
}

impl Programs {
    /// Loads maps and, for each hook, its program, for a device whose packets have `link_header` bytes in front on egress
    /// (0 for the overlay device).
    ///
    /// # Errors
    ///
    /// When the kernel refuses a map or a program; the message ends with what its verifier said last.
    pub fn load(object: &[u8], hooks: &[Hook], link_header: u32) -> Result<Self> {
        let ebpf = EbpfLoader::new()
            .override_global("LINK_HEADER", &link_header, true)
            .load(object)
            .context("load the eBPF maps: root and kernel 5.10 or later are needed")?;
        let mut programs = Self { ebpf, routes: BTreeMap::new() };
        for hook in hooks {
            programs.load_program(*hook)?;
        }
        Ok(programs)
    }

    /// Loads one more program on the same maps.
    ///
    /// # Errors
    ///
    /// As [`Programs::load`].
    pub fn load_program(&mut self, hook: Hook) -> Result<()> {
        let program = self
            .ebpf
            .program_mut(hook.program())
            .with_context(|| format!("the eBPF object has no program {}", hook.program()))?;
        let loaded = match hook {
            Hook::Egress | Hook::Ingress => {
                <&mut SchedClassifier>::try_from(program).and_then(SchedClassifier::load)
            }
            Hook::Xdp => <&mut Xdp>::try_from(program).and_then(Xdp::load),
        };
        loaded.map_err(|error| verifier_error(hook.program(), error))
    }

    /// Tells the programs who this host is.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the map update.
    pub fn configure(&mut self, config: &Config) -> Result<()> {
        let mut map: Array<&mut MapData, ConfigBytes> =
            Array::try_from(self.ebpf.map_mut("CONFIG").context("find the map CONFIG")?)?;
        map.set(0, bytemuck::cast::<Config, ConfigBytes>(*config), 0).context("write the map CONFIG")
    }

    /// Makes the route map hold exactly `desired`, step by step. After an error the steps already made stay and the next call
    /// goes on from there.
    ///
    /// # Errors
    ///
    /// When there are more routes than the map holds, or the kernel refuses an update. Those that fit are there.
    pub fn set_routes(&mut self, desired: &BTreeMap<Ipv4Net, Ipv4Addr>) -> Result<()> {
        let changes = diff(&self.routes, desired);
        self.change_routes(&changes)
    }

    /// Makes `changes` in the route map, in order.
    ///
    /// # Errors
    ///
    /// As [`Programs::set_routes`].
    pub fn change_routes(&mut self, changes: &[Change]) -> Result<()> {
        // New ones go first, so a full map takes the rest only when others have been removed.
        let mut waiting = Vec::new();
        for change in changes {
            match change {
                Change::Set(subnet, _) if self.is_full_for(*subnet) => waiting.push(change),
                Change::Set(..) | Change::Remove(_) => self.change_route(change)?,
            }
        }
        let mut left = 0;
        for change in waiting {
            match change {
                Change::Set(subnet, _) if self.is_full_for(*subnet) => left += 1,
                Change::Set(..) | Change::Remove(_) => self.change_route(change)?,
            }
        }
        if left > 0 {
            bail!(
                "the kernel's map holds {MAX_ROUTES} routes and is full: {left} more are not in it and packets to them are \
                 dropped; use larger subnets, or --datapath tun"
            );
        }
        Ok(())
    }

    fn is_full_for(&self, subnet: Ipv4Net) -> bool {
        self.routes.len() >= MAX_ROUTES as usize && !self.routes.contains_key(&subnet)
    }

    fn change_route(&mut self, change: &Change) -> Result<()> {
        let mut map: LpmTrie<&mut MapData, [u8; 4], RouteBytes> =
            LpmTrie::try_from(self.ebpf.map_mut("ROUTES").context("find the map ROUTES")?)?;
        match change {
            Change::Set(subnet, peer) => {
                map.insert(&key(*subnet), peer.octets(), 0)
                    .with_context(|| format!("write the route {subnet} via {peer}"))?;
                self.routes.insert(*subnet, *peer);
            }
            Change::Remove(subnet) if self.routes.contains_key(subnet) => {
                map.remove(&key(*subnet)).with_context(|| format!("remove the route {subnet}"))?;
                self.routes.remove(subnet);
            }
            // It never fitted.
            Change::Remove(_) => {}
        }
        Ok(())
    }

    /// The routes as the kernel's map holds them.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn routes(&self) -> Result<BTreeMap<Ipv4Net, Ipv4Addr>> {
        let map: LpmTrie<&MapData, [u8; 4], RouteBytes> =
            LpmTrie::try_from(self.ebpf.map("ROUTES").context("find the map ROUTES")?)?;
        let mut routes = BTreeMap::new();
        for entry in map.iter() {
            let (key, peer) = entry.context("read the map ROUTES")?;
            routes.insert(Ipv4Net::new(key.data().into(), u8::try_from(key.prefix_len())?)?, peer.into());
        }
        Ok(routes)
    }

    /// The counters of all CPUs, added up.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters> {
        let map: PerCpuArray<&MapData, CountersBytes> =
            PerCpuArray::try_from(self.ebpf.map("COUNTERS").context("find the map COUNTERS")?)?;
        let mut sum = Counters::ZERO;
        for cpu in map.get(&0, 0).context("read the map COUNTERS")?.iter() {
            sum.add(&bytemuck::pod_read_unaligned(cpu));
        }
        Ok(sum)
    }

    fn tc(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let program = self
            .ebpf
            .program_mut(hook.program())
            .with_context(|| format!("find the program {}", hook.program()))?;
        Ok(program.try_into()?)
    }

    fn xdp(&mut self) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(Hook::Xdp.program()).context("find the program ovl_xdp")?;
        Ok(program.try_into()?)
    }
}

fn key(subnet: Ipv4Net) -> Key<[u8; 4]> {
    Key::new(u32::from(subnet.prefix_len()), subnet.network().octets())
}

/// The verifier's log is long; what it stumbled over stands at its end.
fn verifier_error(program: &str, error: ProgramError) -> anyhow::Error {
    let ProgramError::LoadError { io_error, verifier_log } = &error else {
        return anyhow::Error::new(error).context(format!("load the program {program}"));
    };
    let log = verifier_log.to_string();
    let statistics = ["processed ", "verification time", "stack depth"];
    let tail = log
        .lines()
        .rev()
        .filter(|line| !line.trim().is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
    let mut tail: Vec<&str> = tail.take(3).collect();
    tail.reverse();
    anyhow::anyhow!("load the program {program}: {io_error}: {}", tail.join(" | "))
}
