//! The fast path: the loaded programs, their maps and their attachments.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use overlay_ebpf::abi::{Config, Counters};
use tracing::{debug, info, warn};

use super::{
    Choice, Report, Request, Rung,
    plan::{Plan, Refusals, Step, next_step},
};
use crate::{
    datapath::ebpf::{
        self, Attachment, OverlaySet, Target,
        overlay_set::{EGRESS, INGRESS, XDP},
        self_test,
    },
    netlink::{Netlink, device_name},
    route::{RouteChange, Routes},
};

/// The route map is read back at most in this share of the time: 1 in 1000.
const READ_BACK_SHARE: u32 = 1000;

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
            self.unload();
        }
        match request {
            Request::Auto => done,
            Request::Xdp | Request::Tc | Request::Tun => {
                done.with_context(|| format!("{} cannot be had", request.flag()))
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
        if !plan.targets(&self.refusals).is_empty() {
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
                    Err(error) => {
                        if target.hook == INGRESS {
                            self.detach_xdp(target.ifindex);
                        }
                        return Err(error);
                    }
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
        for (direction, before, now) in
            [("egress", &self.egress, &egress), ("ingress", &self.ingress, &ingress)]
        {
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
            // The kernel removes a program with its device; the plan has the successor of the device.
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

    /// Detaches XDP from a device without a tc program that would deliver what XDP decapsulates.
    fn detach_xdp(&mut self, ifindex: u32) {
        self.attachments.retain(|Attachment { target, .. }| target.hook != XDP || target.ifindex != ifindex);
    }

    /// Detaches all programs, XDP first, and closes their maps.
    pub(super) fn unload(&mut self) {
        self.attachments.clear();
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
