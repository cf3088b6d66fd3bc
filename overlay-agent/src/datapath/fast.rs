//! The fast path: which programs hang where, and the steps from what is attached to what should be.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use overlay_ebpf::abi::{Config, Counters};
use tracing::{debug, info, warn};

use super::{Choice, Report, Request, Rung};
use crate::{
    datapath::ebpf::{
        self, Attachment, Hook, OverlaySet, Target, TcMode,
        overlay_set::{EGRESS, INGRESS, XDP},
        self_test,
    },
    netlink::{Netlink, device_name},
    route::{RouteChange, Routes},
};

/// The route map is read back at most in this share of the time: 1 in 1000.
const READ_BACK_SHARE: u32 = 1000;

/// A device that carries outer packets, as far as the choice of rungs depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Underlay {
    pub(super) name: String,
    pub(super) ifindex: u32,
    /// What kind of virtual device it is; `None` for hardware and virtio.
    pub(super) kind: Option<String>,
    pub(super) ethernet: bool,
}

/// What the programs that should be attached depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) request: Request,
    pub(super) mode: TcMode,
    pub(super) underlays: Vec<Underlay>,
    pub(super) overlay_ifindex: u32,
    pub(super) log: bool,
}

/// What the kernel refused under a plan of [`Request::Auto`]. It is not asked again until the plan changes.
#[derive(Debug, Default)]
struct Refusals {
    /// Why there are no programs at all.
    programs: Option<String>,
    targets: Vec<(Target, String)>,
}

impl Refusals {
    fn why(&self, target: Target) -> Option<&str> {
        self.targets.iter().find(|(refused, _)| *refused == target).map(|(_, why)| why.as_str())
    }
}

impl Plan {
    fn target(&self, hook: Hook, ifindex: u32) -> Target {
        Target { hook, ifindex, mode: self.mode }
    }

    fn wants_xdp(&self, underlay: &Underlay) -> bool {
        match self.request {
            Request::Xdp => true,
            // Virtual devices with native XDP lose more elsewhere (veth: TSO of the peer, and a copy).
            Request::Auto => underlay.kind.is_none(),
            Request::Tc | Request::Tun => false,
        }
    }

    /// The programs that should be attached, in the order of attaching: what XDP passes on needs the tc program behind it.
    fn targets(&self, refusals: &Refusals) -> Vec<Target> {
        if self.request == Request::Tun || refusals.programs.is_some() {
            return Vec::new();
        }
        let mut targets = Vec::new();
        for underlay in &self.underlays {
            let ingress = self.target(INGRESS, underlay.ifindex);
            targets.push(ingress);
            if self.wants_xdp(underlay) && refusals.why(ingress).is_none() {
                targets.push(self.target(XDP, underlay.ifindex));
            }
        }
        targets.push(self.target(EGRESS, self.overlay_ifindex));
        targets.retain(|target| refusals.why(*target).is_none());
        targets
    }

    /// How inner packets leave.
    fn egress(&self, refusals: &Refusals) -> Choice {
        self.without_programs(refusals).unwrap_or_else(|| {
            match (self.asked(), refusals.why(self.target(EGRESS, self.overlay_ifindex))) {
                (Some(why), _) => Choice { rung: Rung::Tc, why },
                (None, Some(why)) => {
                    Choice { rung: Rung::Tun, why: format!("no tc program on the overlay device: {why}") }
                }
                (None, None) => Choice {
                    rung: Rung::Tc,
                    why: "the kernel runs tc programs on the overlay device".to_owned(),
                },
            }
        })
    }

    /// How outer packets arrive: the slowest way of several underlay devices.
    fn ingress(&self, refusals: &Refusals) -> Choice {
        let choices = self.underlays.iter().map(|underlay| self.ingress_of(underlay, refusals));
        let slowest = choices.max_by_key(|choice| choice.rung);
        slowest.unwrap_or(Choice { rung: Rung::Tun, why: "there is no underlay device".to_owned() })
    }

    fn ingress_of(&self, underlay: &Underlay, refusals: &Refusals) -> Choice {
        if let Some(choice) = self.without_programs(refusals) {
            return choice;
        }
        if let Some(why) = self.asked() {
            return Choice { rung: if self.request == Request::Xdp { Rung::Xdp } else { Rung::Tc }, why };
        }
        if let Some(why) = refusals.why(self.target(INGRESS, underlay.ifindex)) {
            return Choice { rung: Rung::Tun, why: format!("no tc program on the underlay: {why}") };
        }
        match (&underlay.kind, refusals.why(self.target(XDP, underlay.ifindex))) {
            (Some(kind), _) => Choice {
                rung: Rung::Tc,
                why: format!("{} is a {kind} device, which tc serves better than XDP", underlay.name),
            },
            (None, Some(why)) => Choice { rung: Rung::Tc, why: format!("no XDP: {why}") },
            (None, None) => {
                Choice { rung: Rung::Xdp, why: "the underlay's driver has native XDP".to_owned() }
            }
        }
    }

    fn without_programs(&self, refusals: &Refusals) -> Option<Choice> {
        let why = match (&refusals.programs, self.request) {
            (_, Request::Tun) => self.asked().unwrap_or_default(),
            (Some(why), _) => format!("eBPF cannot be had: {why}"),
            (None, Request::Auto | Request::Xdp | Request::Tc) => return None,
        };
        Some(Choice { rung: Rung::Tun, why })
    }

    fn asked(&self) -> Option<String> {
        (self.request != Request::Auto).then(|| format!("asked for with --datapath {}", self.request.name()))
    }
}

/// One step from what is attached to what should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Attach(Target),
    Detach(Target),
}

/// The next step. New programs are attached before old ones are detached, and XDP is detached before the tc program behind
/// it: packets that XDP decapsulated would reach the stack as the underlay's own.
fn next_step(attached: &[Target], wanted: &[Target]) -> Option<Step> {
    if let Some(missing) = wanted.iter().find(|target| !attached.contains(target)) {
        return Some(Step::Attach(*missing));
    }
    let surplus = attached.iter().filter(|target| !wanted.contains(target));
    surplus.min_by_key(|target| target.hook.kind).map(|target| Step::Detach(*target))
}

/// The programs, and where they are attached.
pub(super) struct FastPath {
    pub(super) egress: Choice,
    pub(super) ingress: Choice,
    /// XDP first: dropped from the front.
    attachments: Vec<Attachment>,
    set: Option<OverlaySet>,
    /// The configuration that was written.
    config: Option<Config>,
    plan: Option<Plan>,
    refusals: Refusals,
    /// What sets that are gone counted.
    counted: Counters,
    next_read_back: Option<Instant>,
}

impl FastPath {
    pub(super) fn new() -> Self {
        let choice = Choice { rung: Rung::Tun, why: "not started".to_owned() };
        Self {
            egress: choice.clone(),
            ingress: choice,
            attachments: Vec::new(),
            set: None,
            config: None,
            plan: None,
            refusals: Refusals::default(),
            counted: Counters::ZERO,
            next_read_back: None,
        }
    }

    /// Makes maps and attachments what `plan`, `config` and `routes` say: maps first.
    ///
    /// # Errors
    ///
    /// When a step fails that was asked for explicitly, or the kernel's state cannot be read. Steps already made stay, unless
    /// nothing was attached before.
    pub(super) async fn reconcile(
        &mut self,
        netlink: &Netlink,
        plan: Plan,
        config: &Config,
        routes: &Routes,
        report: &mut Report,
    ) -> Result<()> {
        let request = plan.request;
        let started = !self.attachments.is_empty();
        let done = self.take_steps(netlink, plan, config, routes, report).await;
        if done.is_err() && !started {
            self.detach_all();
        }
        match request {
            Request::Auto => done,
            Request::Xdp | Request::Tc | Request::Tun => {
                done.with_context(|| format!("--datapath {} cannot be had", request.name()))
            }
        }
    }

    async fn take_steps(
        &mut self,
        netlink: &Netlink,
        plan: Plan,
        config: &Config,
        routes: &Routes,
        report: &mut Report,
    ) -> Result<()> {
        if self.plan.as_ref() != Some(&plan) {
            self.refusals = Refusals::default();
            // A constant of the programs: others are needed.
            if self.plan.as_ref().is_some_and(|before| before.log != plan.log) {
                self.unload();
            }
            self.plan = Some(plan.clone());
        }
        if plan.request != Request::Tun && self.refusals.programs.is_none() {
            if let Err(error) = self.load(&plan) {
                if plan.request != Request::Auto {
                    return Err(error);
                }
                warn!("no eBPF datapath: {error:#}");
                self.refusals.programs = Some(format!("{error:#}"));
            }
            self.fill_maps(config, routes, report)?;
            self.drop_unlisted(netlink, report).await?;
        }
        loop {
            let attached: Vec<_> = self.attachments.iter().map(|attachment| attachment.target).collect();
            match next_step(&attached, &plan.targets(&self.refusals)) {
                None => break,
                Some(Step::Detach(target)) => {
                    self.attachments.retain(|attachment| attachment.target != target);
                    report.made.push(format!("{} detached", target.hook.program));
                }
                Some(Step::Attach(target)) => match self.attach(netlink, target).await {
                    Ok(()) => report.made.push(format!("{} attached", target.hook.program)),
                    Err(error) if plan.request == Request::Auto => {
                        debug!("{} is not attached: {error:#}", target.hook.program);
                        self.refusals.targets.push((target, format!("{error:#}")));
                    }
                    Err(error) => return Err(error),
                },
            }
        }
        if self.attachments.is_empty() {
            self.unload();
        }
        self.choose(&plan);
        Ok(())
    }

    fn choose(&mut self, plan: &Plan) {
        let (egress, ingress) = (plan.egress(&self.refusals), plan.ingress(&self.refusals));
        for (direction, before, now) in [("egress", &self.egress, &egress), ("ingress", &self.ingress, &ingress)] {
            if before != now {
                info!("{direction}: {:?}, {}", now.rung, now.why);
            }
        }
        (self.egress, self.ingress) = (egress, ingress);
    }

    /// Loads and tests the tc programs, unless they are loaded.
    fn load(&mut self, plan: &Plan) -> Result<()> {
        if let Some(underlay) = plan.underlays.iter().find(|underlay| !underlay.ethernet) {
            bail!("the underlay {} is no Ethernet device", underlay.name);
        }
        if self.set.is_some() {
            return Ok(());
        }
        let object = object()?;
        let mut set = OverlaySet::load(object, plan.log)?;
        for hook in [EGRESS, INGRESS] {
            set.programs.load_program(hook)?;
        }
        self_test::run(object).context("the kernel does not run the eBPF programs as it should")?;
        self.set = Some(set);
        Ok(())
    }

    fn fill_maps(&mut self, config: &Config, routes: &Routes, report: &mut Report) -> Result<()> {
        let Some(set) = &mut self.set else { return Ok(()) };
        if set.config()? != *config {
            set.set_config(config)?;
            match self.config == Some(*config) {
                true => report.repaired.push("configuration in the kernel's map".to_owned()),
                false => report.made.push("configuration written".to_owned()),
            }
        }
        self.config = Some(*config);
        let now = Instant::now();
        if self.next_read_back.is_none_or(|next| next <= now) {
            let foreign = set.check_routes()?;
            let took: Duration = now.elapsed();
            self.next_read_back = Some(now + took * READ_BACK_SHARE);
            if foreign > 0 {
                report.repaired.push(format!("{foreign} routes in the kernel's map"));
            }
        }
        report.routes_behind = set.set_routes(routes).err().map(|error| format!("{error:#}"));
        Ok(())
    }

    /// Forgets attachments that the kernel does not list any more; they are made again.
    async fn drop_unlisted(&mut self, netlink: &Netlink, report: &mut Report) -> Result<()> {
        let Some(set) = &self.set else { return Ok(()) };
        let mut unlisted = Vec::new();
        for Attachment { target, .. } in &self.attachments {
            // With its device a program goes too; the plan has the device's successor.
            let Ok(device) = device_name(target.ifindex) else { continue };
            if !set.programs.is_attached(netlink, *target).await? {
                report.repaired.push(format!("program {} on {device}", target.hook.program));
                unlisted.push(*target);
            }
        }
        self.attachments.retain(|attachment| !unlisted.contains(&attachment.target));
        Ok(())
    }

    async fn attach(&mut self, netlink: &Netlink, target: Target) -> Result<()> {
        let set = self.set.as_mut().context("no programs are loaded")?;
        let xdp = target.hook == XDP;
        if xdp {
            set.programs.load_program(XDP)?;
            self_test::run_xdp(object()?)?;
        }
        let attachment = set.programs.attach(netlink, target).await?;
        let position = if xdp { 0 } else { self.attachments.len() };
        self.attachments.insert(position, attachment);
        Ok(())
    }

    /// Changes single routes in the kernel's map.
    pub(super) fn apply_routes(&mut self, changes: &[RouteChange]) -> Result<()> {
        self.set.as_mut().map_or(Ok(()), |set| set.apply_routes(changes))
    }

    /// Makes the kernel's map hold exactly `routes`.
    pub(super) fn set_routes(&mut self, routes: &Routes) -> Result<()> {
        self.set.as_mut().map_or(Ok(()), |set| set.set_routes(routes))
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let mut sum = self.counted;
        if let Some(set) = &self.set {
            sum.add(&set.counters()?);
        }
        Ok(sum)
    }

    /// Detaches all programs, XDP first.
    pub(super) fn detach_all(&mut self) {
        self.attachments.drain(..).for_each(drop);
        self.unload();
    }

    fn unload(&mut self) {
        self.attachments.drain(..).for_each(drop);
        match self.counters() {
            Ok(counters) => self.counted = counters,
            Err(error) => warn!("the counters of the eBPF programs are lost: {error:#}"),
        }
        (self.set, self.config, self.next_read_back) = (None, None, None);
    }
}

fn object() -> Result<&'static [u8]> {
    ebpf::OBJECT.ok_or_else(|| {
        anyhow!("this binary was built without eBPF programs: build it with `cargo xtask build`")
    })
}
