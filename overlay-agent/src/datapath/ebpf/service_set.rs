//! The set of programs of virtual service addresses: sockets of the whole machine reach endpoints, without a change of any packet.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result};
use aya::programs::{
    CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, SockOps, links::FdLink,
};
use nix::libc;
use overlay_ebpf::service::abi::{Address, ServiceKey};
use tracing::{info, warn};

use super::{
    Pinned, Pins, ProgramSet, UdpSockets,
    cgroup_link::CgroupLink,
    pins::{pin_link, pinned_link, unpin},
    program_set::verifier_error,
    service_maps::{KernelCounts, KernelService, ServiceMaps},
};
use crate::service::{
    Catalog, cgroup,
    changes::{Changes, Seen},
    front::{Rules, fronts, keys},
    outcome::Outcomes,
};

/// The programs, in the order in which they are attached: replies are translated before the first request is.
pub const PROGRAMS: [&str; 9] = [
    "svc_release",
    "svc_recvmsg4",
    "svc_recvmsg6",
    "svc_peername4",
    "svc_peername6",
    "svc_sendmsg4",
    "svc_sendmsg6",
    "svc_connect4",
    "svc_connect6",
];

/// The program that counts what becomes of TCP connections. Without it, the others work all the same.
pub const OUTCOMES: &str = "svc_outcomes";

/// The maps that outlive the agent: all.
const PINNED: [&str; 11] = [
    "SERVICES",
    "SLOTS",
    "MEMBERS",
    "TURNS",
    "CONNECTIONS",
    "BACKEND_COUNTS",
    "SERVICE_COUNTS",
    "UDP_SOCKETS",
    "CLIENTS",
    "CONNECTED",
    "SENT",
];

/// The loaded programs and their maps. Dropping it detaches them unless they are pinned: connections stay as they are, and virtual addresses
/// reach no endpoints.
pub struct ServiceSet {
    programs: ProgramSet,
    maps: ServiceMaps,
    udp_sockets: Arc<UdpSockets>,
    links: Vec<Attached>,
    /// Where links and maps are pinned.
    pins: Option<Pins>,
    /// How many virtual ports an earlier agent left, until they were compared with the first catalog.
    adopted: Option<usize>,
    /// The catalog that was written last, and the rules, unless that failed in part.
    seen: Seen,
    rules: Option<Rules>,
    /// Why [`OUTCOMES`] is not loaded, or was not attached last time.
    uncounted: Option<String>,
}

/// A link of a program.
struct Attached {
    pin: Option<PathBuf>,
    /// Open, so that the program stays attached when others remove the pin.
    _link: FdLink,
}

impl ServiceSet {
    /// Loads maps and programs. Fails when the kernel refuses one.
    pub fn load(object: &[u8]) -> Result<Self> {
        Self::load_with(object, None)
    }

    /// As [`Self::load`], with maps and links that outlive this process, in the directory of services of `pins`. What an earlier agent left
    /// in the maps stays until the first [`Self::reconcile`], which writes what differs. Maps that cannot be taken over are made again;
    /// programs that are attached keep theirs until [`Self::attach`].
    pub fn load_pinned(object: &[u8], pins: &Pins) -> Result<Self> {
        let pins = pins.services();
        let mut set = Self::load_with(object, Some(&pins))?;
        let adopted = match set.maps.adopt(Instant::now()) {
            Ok(adopted) => adopted,
            Err(error) => {
                info!("the maps of services of an earlier agent are made again: {error:#}");
                // Programs that are attached keep them.
                set.programs.remove_maps()?;
                drop(set);
                set = Self::load_with(object, Some(&pins))?;
                set.maps.adopt(Instant::now())?
            }
        };
        set.adopted = pins.has_links().then_some(adopted);
        Ok(set)
    }

    fn load_with(object: &[u8], pins: Option<&Pins>) -> Result<Self> {
        let pinned = pins.map(|pins| Pinned { pins, maps: &PINNED });
        let mut programs = ProgramSet::load("services", object, &[], &[], false, pinned)?;
        let maps = ServiceMaps::take(&mut programs)?;
        let udp_sockets = Arc::new(UdpSockets::take(&mut programs)?);
        for name in PROGRAMS {
            load(&mut programs, name).context(
                "virtual service addresses by eBPF need Linux 5.18 or later with CONFIG_CGROUP_BPF: without, \
                 use the proxy in user space",
            )?;
        }
        let uncounted = load(&mut programs, OUTCOMES).err().map(|error| format!("{error:#}"));
        Ok(Self {
            programs,
            maps,
            udp_sockets,
            links: Vec::new(),
            pins: pins.cloned(),
            adopted: None,
            seen: Seen::default(),
            rules: None,
            uncounted,
        })
    }

    /// Attaches the programs to a cgroup, or to the root of the hierarchy, so that they run for every socket of the machine. Links that an
    /// earlier agent pinned get the programs of this one, each in one step. After an error none is attached but those of an earlier agent.
    /// The programs leave the cgroup that they were attached to before.
    pub fn attach(&mut self, cgroup: Option<&Path>) -> Result<()> {
        let path = cgroup.map_or_else(cgroup::root, |path| Ok(path.to_owned()))?;
        let context = || format!("open the cgroup {}", path.display());
        let directory = File::open(&path).with_context(context)?;
        let id = directory.metadata().with_context(context)?.ino();
        let is_replacing = self.has_links_of(id)?;
        if !is_replacing {
            // Twice on one socket, the second would forget what the first has translated.
            self.detach()?;
        }
        self.programs.keep_maps();
        let mut links = Vec::with_capacity(PROGRAMS.len());
        for name in PROGRAMS {
            match self.attach_program(name, &directory, id) {
                Ok(link) => links.push(link),
                Err(error) => {
                    // Dropped, they detach unless they are pinned.
                    drop(links);
                    if !is_replacing {
                        self.detach()?;
                    }
                    return Err(explain(error, name, &path));
                }
            }
        }
        self.links = links;
        self.attach_outcomes(&directory, id, &path);
        self.unpin_others()
    }

    /// Whether there are pinned links, and none to another cgroup than that with this number.
    fn has_links_of(&self, id: u64) -> Result<bool> {
        let Some(pins) = &self.pins else { return Ok(false) };
        let links = pins.links()?;
        for link in &links {
            let link = CgroupLink::open(link)?;
            let cgroup = link.map(|link| link.cgroup()).transpose()?.flatten();
            if cgroup.is_some_and(|cgroup| cgroup != id) {
                info!("the programs of services of an earlier agent leave their cgroup");
                return Ok(false);
            }
        }
        Ok(!links.is_empty())
    }

    fn attach_program(&mut self, name: &str, directory: &File, id: u64) -> Result<Attached> {
        let pin = self.pins.as_ref().map(|pins| pins.service_link(name));
        let program = self.programs.program(name)?;
        if let Some(pin) = &pin
            && let Some(left) = CgroupLink::open(pin)?
        {
            let replaced = match left.cgroup()? {
                Some(cgroup) if cgroup == id => left.replace(program.fd()?.as_fd()),
                _ => Err(io::ErrorKind::NotFound.into()),
            };
            match (replaced, pinned_link(pin)?) {
                (Ok(()), Some(link)) => return Ok(Attached { pin: Some(pin.clone()), _link: link }),
                (Ok(()), None) => info!("the pin of {name} is gone: it is attached again"),
                (Err(error), _) => info!("{name} of an earlier agent is attached again: {error}"),
            }
            drop(left);
            unpin(pin)?;
        }
        let link = attach(program, directory)?;
        let link = match &pin {
            Some(pin) => pin_link(link, pin)?,
            None => link,
        };
        Ok(Attached { pin, _link: link })
    }

    fn attach_outcomes(&mut self, directory: &File, id: u64, path: &Path) {
        // Not loaded, it cannot be attached either.
        match self.attach_program(OUTCOMES, directory, id).map_err(|error| explain(error, OUTCOMES, path)) {
            Ok(link) => {
                self.links.push(link);
                self.uncounted = None;
            }
            Err(error) => {
                let why = self.uncounted.get_or_insert_with(|| format!("{error:#}"));
                warn!("connections to virtual addresses are not counted: {why}");
            }
        }
    }

    /// Removes pins of programs and maps that this agent does not have.
    fn unpin_others(&mut self) -> Result<()> {
        let Some(pins) = &self.pins else { return Ok(()) };
        let own: Vec<&Path> = self.links.iter().filter_map(|link| link.pin.as_deref()).collect();
        for link in pins.links()?.iter().filter(|link| !own.contains(&link.as_path())) {
            unpin(link)?;
        }
        self.programs.remove_other_generations()
    }

    /// Whether programs and maps go on when this process ends.
    pub fn is_pinned(&self) -> bool {
        !self.links.is_empty() && self.links.iter().all(|link| link.pin.is_some())
    }

    /// Why [`Self::outcomes`] and times of connections are missing in [`Self::counts`], if they are.
    pub fn uncounted(&self) -> Option<&str> {
        self.uncounted.as_deref()
    }

    /// What was counted since the programs were loaded.
    pub fn counts(&self) -> Result<KernelCounts> {
        self.maps.counts()
    }

    /// What became of TCP connections of this node to the endpoints of virtual ports at which some have failed, since each was first used
    /// by a service. The endpoint of several services is there once.
    pub fn outcomes(&mut self) -> Result<Outcomes> {
        self.maps.outcomes()
    }

    /// The connected UDP sockets of the machine.
    pub fn udp_sockets(&self) -> Arc<UdpSockets> {
        Arc::clone(&self.udp_sockets)
    }

    /// Detaches the programs, also those that an earlier agent left: first those that translate. Fails when a pin cannot be removed.
    pub fn detach(&mut self) -> Result<()> {
        while let Some(Attached { pin, _link: link }) = self.links.pop() {
            if let Some(pin) = pin {
                unpin(&pin)?;
            }
            drop(link);
        }
        let Some(pins) = &self.pins else { return Ok(()) };
        for name in PROGRAMS.iter().rev().chain([&OUTCOMES]) {
            unpin(&pins.service_link(name))?;
        }
        pins.links()?.iter().try_for_each(|link| unpin(link))
    }

    /// Balances connections as the catalog and the rules say, and returns the number of virtual ports that changed. Once it returns,
    /// no new connection goes to an endpoint that the catalog lacks. What does not fit stays as it was, and is an error: a second later, when
    /// what was replaced has made room, it may fit.
    pub fn reconcile(&mut self, catalog: &Catalog, rules: &Rules) -> Result<usize> {
        let Changes { changed, former } = self.seen.update(catalog);
        let now = Instant::now();
        let done = if self.rules.as_ref() == Some(rules) {
            let former = former.iter().flat_map(|service| keys(service));
            self.maps.change(former, &fronts(&changed, rules), now)
        } else {
            self.maps.reconcile(&fronts(catalog, rules), now)
        };
        if let (Ok(changes), Some(adopted)) = (&done, self.adopted) {
            info!(
                "took over {adopted} virtual ports of an earlier agent, and {changes} of them or beside them change"
            );
            self.adopted = None;
        }
        // After a failure, all services are looked at.
        self.rules = done.is_ok().then(|| rules.clone());
        done
    }

    /// Frees what was replaced more than a second ago; so does every [`Self::reconcile`].
    pub fn collect(&mut self) -> Result<()> {
        self.maps.collect(Instant::now())
    }

    /// All virtual ports, read from the kernel.
    pub fn services(&self) -> Result<BTreeMap<ServiceKey, KernelService>> {
        Ok(self.maps.read()?.0)
    }

    /// The slots of all tables in the kernel, including those that were replaced and are not freed yet.
    pub fn slots(&self) -> Result<usize> {
        Ok(self.maps.read()?.1)
    }

    /// Open connections to an endpoint from this node, as the programs count them; `None` when no service has it.
    pub fn connections(&self, protocol: u8, address: Address) -> Result<Option<u64>> {
        self.maps.connections(protocol, address)
    }

    /// How many instructions of each program the verifier has processed, and how many the program has after translation to bytes of
    /// the machine; the latter in bytes.
    pub fn sizes(&mut self) -> Result<Vec<(&'static str, u32, u32)>> {
        let size = |name| {
            let info = self.programs.program(name)?.info()?;
            Ok((name, info.verified_instruction_count().unwrap_or(0), info.size_jitted()))
        };
        let counting = self.uncounted.is_none().then_some(OUTCOMES);
        PROGRAMS.into_iter().chain(counting).map(size).collect()
    }
}

fn load(programs: &mut ProgramSet, name: &'static str) -> Result<()> {
    let program = programs.program(name)?;
    let loaded = if let Ok(program) = <&mut CgroupSock>::try_from(&mut *program) {
        program.load()
    } else if let Ok(program) = <&mut SockOps>::try_from(&mut *program) {
        program.load()
    } else {
        <&mut CgroupSockAddr>::try_from(program).and_then(CgroupSockAddr::load)
    };
    loaded.map_err(|error| verifier_error(name, error))
}

fn attach(program: &mut Program, cgroup: &File) -> Result<FdLink, ProgramError> {
    // Links go beside those of other programs whatever the mode; with any other the kernel refuses links.
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    // Without links (before Linux 5.7) the programs are not loaded in the first place.
    let without_links = |_| ProgramError::UnexpectedProgramType;
    if let Ok(program) = <&mut CgroupSock>::try_from(&mut *program) {
        let id = program.attach(cgroup, MODE)?;
        return program.take_link(id)?.try_into().map_err(without_links);
    }
    if let Ok(program) = <&mut SockOps>::try_from(&mut *program) {
        let id = program.attach(cgroup, MODE)?;
        return program.take_link(id)?.try_into().map_err(without_links);
    }
    let program = <&mut CgroupSockAddr>::try_from(program)?;
    let id = program.attach(cgroup, MODE)?;
    program.take_link(id)?.try_into().map_err(without_links)
}

fn explain(error: anyhow::Error, name: &str, cgroup: &Path) -> anyhow::Error {
    let code = match error.downcast_ref() {
        Some(ProgramError::SyscallError(error)) => error.io_error.raw_os_error(),
        _ => None,
    };
    let remedy = match code {
        Some(libc::EBADF) => "; it is no directory of cgroup v2: name one, or let the agent find the root",
        Some(libc::EPERM) => {
            "; either the agent lacks CAP_NET_ADMIN or CAP_BPF, or a program is there that allows no others: find it (bpftool cgroup \
             tree) and attach it with the flag multi"
        }
        Some(libc::E2BIG) => "; 64 programs are there already: detach some (bpftool cgroup detach)",
        _ => "",
    };
    error.context(format!("attach {name} to the cgroup {}{remedy}", cgroup.display()))
}
