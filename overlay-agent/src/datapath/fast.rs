//! The fast path: the loaded programs, their maps and their attachments.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use overlay_ebpf::{
    abi::{Config, Counters, NextHop, UnderlayValue},
    bypass::Bypass,
};
use tracing::{debug, info, warn};

use super::{
    Choice, Report, Request, Rung,
    ebpf::{
        self, Attachment, LoadOptions, OverlaySet, Pins, Target, TcxLinks,
        overlay_set::{EGRESS, FormerAddresses, INGRESS, XDP},
        self_test, unpin,
    },
    local::LocalPrograms,
    plan::{Plan, Refusals, Step, next_step},
};
use crate::{
    capabilities,
    containers::Containers,
    netlink::{Link, Netlink, device_name},
    route::{NextHops, RouteChange, diff},
};

/// The route map is read back at most in this share of the time: 1 in 1000.
const READ_BACK_SHARE: u32 = 1000;

/// The programs, and where they are attached.
pub(super) struct FastPath {
    pub(super) egress: Choice,
    pub(super) ingress: Choice,
    netlink: Netlink,
    /// XDP first: dropped from the front.
    attachments: Vec<Attachment>,
    /// On the devices of containers.
    local: LocalPrograms,
    set: Option<OverlaySet>,
    /// Where programs and maps outlive the agent.
    pins: Option<Pins>,
    /// Whether an earlier agent's programs are attached, which no reconciliation has replaced yet.
    pub(super) is_adopting: bool,
    /// The configuration that was written.
    config: Option<Config>,
    plan: Option<Plan>,
    /// The capabilities without which there is no fast path.
    missing: Option<capabilities::Missing>,
    refusals: Refusals,
    /// What sets that are gone counted.
    counted: Counters,
    next_read_back: Option<Instant>,
    /// Former addresses of peers.
    former: FormerAddresses,
    /// Whether the last update of the route map failed.
    behind: bool,
}

impl FastPath {
    pub(super) fn new(netlink: Netlink, pins: Option<Pins>) -> Self {
        let choice = Choice { rung: Rung::Tun, why: "not started".to_owned() };
        Self {
            egress: choice.clone(),
            ingress: choice,
            netlink,
            attachments: Vec::new(),
            local: LocalPrograms::default(),
            set: None,
            is_adopting: pins.as_ref().is_some_and(Pins::has_links),
            pins,
            config: None,
            plan: None,
            missing: None,
            refusals: Refusals::default(),
            counted: Counters::ZERO,
            next_read_back: None,
            former: FormerAddresses::new(),
            behind: false,
        }
    }

    /// Makes maps and attachments what `plan`, `config` and `routes` say: maps first. Fails when the kernel's state cannot be
    /// read, or a step fails that was asked for explicitly; steps already made stay, unless nothing was attached before.
    pub(super) async fn reconcile(
        &mut self,
        plan: Plan,
        config: &Config,
        routes: &NextHops,
        report: &mut Report,
    ) -> Result<()> {
        let request = plan.request;
        let started = !self.attachments.is_empty();
        let done = self.take_steps(plan, config, routes, report).await;
        if done.is_err() && !started {
            // An earlier agent's programs are better than none.
            if self.is_adopting { self.leave() } else { self.unload() }
        }
        self.is_adopting &= done.is_err();
        if request == Request::Auto {
            return done;
        }
        done.with_context(|| format!("{} is not possible", request.flag()))
    }

    async fn take_steps(
        &mut self,
        plan: Plan,
        config: &Config,
        routes: &NextHops,
        report: &mut Report,
    ) -> Result<()> {
        if self.plan.as_ref() != Some(&plan) {
            (self.refusals, self.missing) = (Refusals::default(), None);
            // A constant of the programs: others are needed.
            let constants = |plan: &Plan| (plan.log, plan.bypass);
            if self.plan.as_ref().is_some_and(|before| constants(before) != constants(&plan)) {
                self.unload();
            }
            self.plan = Some(plan.clone());
        }
        if !plan.targets(&self.refusals).is_empty() {
            if let Err(error) = self.load(&plan, config) {
                if plan.request != Request::Auto {
                    return Err(error);
                }
                self.missing = error.downcast_ref().cloned();
                // Missing capabilities are reported as a condition.
                if self.missing.is_none() {
                    warn!("no eBPF datapath: {error:#}");
                }
                self.refusals.programs = Some(format!("{error:#}"));
            }
            self.fill_maps(&plan, config, routes, report)?;
            self.drop_unlisted(report).await?;
        }
        loop {
            let attached: Vec<_> = self.attachments.iter().map(|attachment| attachment.target).collect();
            match next_step(&attached, &plan.targets(&self.refusals)) {
                None => break,
                Some(Step::Detach(target)) => {
                    self.attachments.retain(|attachment| attachment.target != target);
                    report.made.push(format!("{} detached", target.hook.program));
                }
                Some(Step::Attach(target)) => match self.attach(target).await {
                    Ok(()) => report.made.push(format!("{} attached", target.hook.program)),
                    // Other underlay devices than the first come with routes: none of them ends an explicit request.
                    Err(error) if plan.request == Request::Auto || !plan.is_essential(target) => {
                        debug!("{} is not attached: {error:#}", target.hook.program);
                        self.refusals.targets.push((target, format!("{error:#}")));
                    }
                    Err(error) => {
                        // Without the tc program, nothing delivers what XDP decapsulates on the device.
                        if target.hook == INGRESS {
                            let is_xdp = |other: Target| other.hook == XDP && other.ifindex == target.ifindex;
                            self.attachments.retain(|attachment| !is_xdp(attachment.target));
                        }
                        return Err(error);
                    }
                },
            }
        }
        if self.attachments.is_empty() {
            self.unload();
        }
        update("egress", &mut self.egress, plan.egress(&self.refusals));
        update("ingress", &mut self.ingress, plan.ingress(&self.refusals));
        Ok(())
    }

    /// Detaches what an earlier agent left at other hooks.
    pub(super) fn unpin_others(&self) -> Result<()> {
        let Some(pins) = &self.pins else { return Ok(()) };
        let own = self.attachments.iter().chain(self.local.attachments());
        let own: Vec<_> = own.filter_map(Attachment::pin).collect();
        for link in pins.links()? {
            if !own.contains(&link.as_path()) {
                unpin(&link)?;
                info!("an earlier agent's {} is detached", link.display());
            }
        }
        Ok(())
    }

    /// Loads and tests the tc programs, unless they are loaded.
    fn load(&mut self, plan: &Plan, config: &Config) -> Result<()> {
        if let Some(underlay) = plan.underlays.first().filter(|underlay| !underlay.ethernet) {
            bail!("the underlay {} is no Ethernet device", underlay.name);
        }
        if self.set.is_some() {
            return Ok(());
        }
        let object = object()?;
        capabilities::check(capabilities::EBPF)?;
        let set = self.load_set(object, plan, config)?;
        self_test::run(object, INGRESS).context("the kernel does not run the eBPF programs as it should")?;
        let set = self.set.insert(set);
        set.set_former(&self.former)
    }

    /// Loads maps and programs, without the bypass when the kernel cannot have it.
    fn load_set(&mut self, object: &[u8], plan: &Plan, config: &Config) -> Result<OverlaySet> {
        let load = |bypass| {
            let options = LoadOptions { bypass, log: plan.log };
            let mut set = OverlaySet::load_for(object, options, config, self.pins.as_ref())?;
            for hook in [EGRESS, INGRESS] {
                set.programs.load_program(hook)?;
            }
            anyhow::Ok(set)
        };
        let loaded = load(plan.bypass);
        match loaded {
            Err(error) if plan.bypass != Bypass::Off => {
                let set = load(Bypass::Off)?;
                warn!("every packet takes the host's stack, as with --bypass off: {error:#}");
                self.local.refused = Some(format!("{error:#}"));
                Ok(set)
            }
            loaded => {
                self.local.refused = None;
                loaded
            }
        }
    }

    fn fill_maps(
        &mut self,
        plan: &Plan,
        config: &Config,
        routes: &NextHops,
        report: &mut Report,
    ) -> Result<()> {
        let Some(set) = &mut self.set else { return Ok(()) };
        let first = plan.underlays.first().map(|link| link.index);
        let value =
            |link: &Link| Some((link.index, UnderlayValue::new(link.mac?, first == Some(link.index))));
        // Attached programs find it alive from the first packet on.
        set.show_alive()?;
        set.set_underlays(&plan.underlays.iter().filter_map(value).collect())?;
        if set.config()? != *config {
            set.set_config(config)?;
            let foreign = self.config == Some(*config);
            report.add(foreign, "configuration in the kernel's map".to_owned());
        }
        self.config = Some(*config);
        let now = Instant::now();
        if self.next_read_back.is_none_or(|next| next <= now) {
            let foreign = set.check_routes()?;
            self.next_read_back = Some(now + now.elapsed() * READ_BACK_SHARE);
            if foreign > 0 {
                report.repaired.push(format!("{foreign} routes in the kernel's map"));
            }
        }
        if self.is_adopting {
            let left = set.routes()?;
            let changes = diff(&left, routes).len();
            info!("took over {} routes of an earlier agent, of which {changes} change", left.len());
        }
        report.routes_behind = set.set_routes(routes).err().map(|error| format!("{error:#}"));
        self.behind = report.routes_behind.is_some();
        Ok(())
    }

    /// Forgets attachments that the kernel does not list any more, so that they are attached again.
    async fn drop_unlisted(&mut self, report: &mut Report) -> Result<()> {
        let Some(set) = &self.set else { return Ok(()) };
        let (mut unlisted, links) = (Vec::new(), TcxLinks::read()?);
        for attachment in &self.attachments {
            let target = &attachment.target;
            // The kernel removes a program with its device; the plan has the successor of the device.
            let Ok(device) = device_name(target.ifindex) else { continue };
            if !set.programs.is_attached(&self.netlink, attachment, &links).await? {
                report.repaired.push(format!("program {} on {device}", target.hook.program));
                unlisted.push(*target);
            }
        }
        self.attachments.retain(|attachment| !unlisted.contains(&attachment.target));
        Ok(())
    }

    /// Whether the kernel still has all attached programs on their hooks.
    pub(super) async fn has_programs(&self) -> bool {
        let Some(set) = &self.set else { return true };
        let Ok(links) = TcxLinks::read() else { return false };
        for attachment in &self.attachments {
            if !matches!(set.programs.is_attached(&self.netlink, attachment, &links).await, Ok(true)) {
                return false;
            }
        }
        self.local.is_attached(&self.netlink, set, &links).await
    }

    /// Makes the map of containers and the programs on their devices what `containers` says. Fails when the kernel refuses an update
    /// of the map.
    pub(super) async fn set_containers(
        &mut self,
        containers: &Containers,
        report: &mut Report,
    ) -> Result<()> {
        let (Some(set), Some(plan)) = (&mut self.set, &self.plan) else { return Ok(()) };
        let targets = match &self.local.refused {
            Some(_) => Vec::new(),
            None => plan.local_targets(containers, &self.refusals),
        };
        self.local.reconcile(&self.netlink, set, containers, &targets, report).await
    }

    /// The bypass as it is.
    pub(super) fn bypass(&self) -> &LocalPrograms {
        &self.local
    }

    async fn attach(&mut self, target: Target) -> Result<()> {
        let set = self.set.as_mut().context("no programs are loaded")?;
        let xdp = target.hook == XDP;
        if xdp {
            set.programs.load_program(XDP)?;
            self_test::run(object()?, XDP)?;
        }
        let attachment = set.programs.attach(&self.netlink, target).await?;
        let position = if xdp { 0 } else { self.attachments.len() };
        self.attachments.insert(position, attachment);
        Ok(())
    }

    /// Makes `changes` in the kernel's map, or, after an error, all that differs from `routes`.
    pub(super) fn apply_routes(&mut self, changes: &[RouteChange<NextHop>], routes: &NextHops) -> Result<()> {
        let Some(set) = &mut self.set else { return Ok(()) };
        let done = match self.behind {
            true => set.set_routes(routes),
            false => set.apply_routes(changes),
        };
        self.behind = done.is_err();
        done
    }

    /// Makes the kernel's map of former addresses of peers hold these.
    pub(super) fn set_former(&mut self, former: FormerAddresses) -> Result<()> {
        self.former = former;
        self.set.as_mut().map_or(Ok(()), |set| set.set_former(&self.former))
    }

    /// The capabilities for whose lack [`Request::Auto`] has chosen the tun rung.
    pub(super) fn missing_capabilities(&self) -> Option<&capabilities::Missing> {
        self.missing.as_ref()
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let mut sum = self.counted;
        if let Some(set) = &self.set {
            sum.add(&set.counters()?);
        }
        Ok(sum)
    }

    /// Tells the programs that the agent is there.
    pub(super) fn show_alive(&mut self) -> Result<()> {
        self.set.as_mut().map_or(Ok(()), OverlaySet::show_alive)
    }

    /// Whether programs are attached that would go on without this process.
    pub(super) fn is_pinned(&self) -> bool {
        !self.attachments.is_empty() && self.attachments.iter().all(|attachment| attachment.pin().is_some())
    }

    /// Leaves programs and maps in the kernel, where those that are pinned go on.
    pub(super) fn leave(&mut self) {
        self.local.leave();
        self.attachments.iter_mut().for_each(Attachment::keep);
        self.attachments.clear();
        (self.set, self.config, self.next_read_back) = (None, None, None);
    }

    /// Detaches all programs, XDP first, and closes their maps.
    pub(super) fn unload(&mut self) {
        self.local.detach();
        self.attachments.clear();
        match self.counters() {
            Ok(counters) => self.counted = counters,
            Err(error) => warn!("the counters of the eBPF programs are lost: {error:#}"),
        }
        (self.set, self.config, self.next_read_back) = (None, None, None);
        // Maps of an earlier agent, too, and what it left attached.
        if let Some(pins) = &self.pins
            && let Err(error) = pins.remove()
        {
            warn!("{error:#}");
        }
    }
}

fn object() -> Result<&'static [u8]> {
    ebpf::OBJECT.context("this binary was built without eBPF programs: build it with `cargo xtask build`")
}

fn update(direction: &str, choice: &mut Choice, now: Choice) {
    if *choice != now {
        info!("{direction}: {:?}, {}", now.rung, now.why);
        *choice = now;
    }
}
