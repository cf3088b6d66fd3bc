//! Loads a set of programs, and lets it take the place of another one without a packet that meets no program: the new set has its maps
//! filled and all of its programs accepted by the kernel before the first link is switched. Until then, whatever fails leaves what is
//! attached as it is.
//!
//! The tc program that delivers what XDP decapsulated is replaced before XDP. Between the two, it runs behind XDP of the other set:
//! [`Mark`](overlay_ebpf::abi::Mark) is the same in all versions.

use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use overlay_ebpf::{
    abi::{Config, UnderlayValue},
    bypass::Bypass,
};
use tracing::{debug, info, warn};

use super::{FastPath, READ_BACK_SHARE, Wanted, object};
use crate::{
    capabilities,
    datapath::{
        Choice, Report, Request, Rung,
        ebpf::{
            Hook, LoadOptions, OverlaySet,
            overlay_set::{EGRESS, INGRESS, LOCAL, XDP},
            self_test,
        },
        plan::Plan,
        refusals::Subject,
        rungs::Trigger,
    },
    netlink::{Link, device_name},
    route::diff,
};

impl FastPath {
    /// Loads the programs that `wanted` asks for unless they are loaded, and fills their maps. Those of another set that are attached are
    /// replaced, or stay if that is not possible. Fails when programs that were asked for explicitly cannot be loaded and none are attached
    /// by this process, or the maps cannot be filled.
    pub(super) async fn provide(&mut self, wanted: Wanted<'_>, report: &mut Report) -> Result<()> {
        let plan = wanted.plan;
        if let Some(underlay) = plan.underlays.first().filter(|underlay| !underlay.ethernet) {
            self.refuse(plan, anyhow::anyhow!("the underlay {} is no Ethernet device", underlay.name))?;
        } else if self.kept.is_none() && (self.set.is_none() || self.loaded != Some(options(plan))) {
            match (self.stage(wanted, report), self.set.take()) {
                (Ok(set), None) => {
                    self.missing = None;
                    self.set = Some(set);
                }
                (Ok(set), Some(before)) => self.switch(plan, before, set).await,
                (Err(error), Some(before)) => {
                    self.set = Some(before);
                    self.keep(&error);
                }
                (Err(error), None) if self.is_adopting && plan.request == Request::Auto => {
                    self.set = self.earlier_maps(plan, wanted.config);
                    self.keep(&error);
                }
                (Err(error), None) => self.refuse(plan, error)?,
            }
            self.loaded = Some(options(plan));
        }
        if let Some(mut set) = self.set.take() {
            let filled = self.fill(&mut set, wanted, report);
            // Attached programs find their maps when this process ends.
            set.programs.keep_maps();
            self.set = Some(set);
            filled?;
        }
        Ok(())
    }

    /// Whether programs of an earlier agent are attached that this process cannot replace.
    pub(super) fn keeps_earlier(&self) -> bool {
        self.kept.is_some() && self.is_adopting && self.attachments.is_empty()
    }

    /// Reports how packets move through programs of an earlier agent.
    pub(super) fn show_earlier(&mut self, plan: &Plan, trigger: Trigger) {
        let has = |hook: Hook, ifindex| {
            self.pins.as_ref().is_some_and(|pins| pins.link(hook.program, ifindex).exists())
        };
        let why = "programs of an earlier agent stay attached".to_owned();
        let choice = |rung| Choice { rung, why: why.clone() };
        let first = plan.underlays.first().map_or(0, |underlay| underlay.index);
        let ingress = match (has(XDP, first), has(INGRESS, first)) {
            (true, true) => Rung::Xdp,
            (false, true) => Rung::Tc,
            (_, false) => Rung::Tun,
        };
        let egress = if has(EGRESS, plan.overlay_ifindex) { Rung::Tc } else { Rung::Tun };
        self.rungs.set(choice(egress), choice(ingress), trigger, SystemTime::now());
    }

    /// There are no programs, and none are attached.
    fn refuse(&mut self, plan: &Plan, error: anyhow::Error) -> Result<()> {
        if plan.request != Request::Auto {
            return Err(error);
        }
        self.missing = error.downcast_ref().cloned();
        let is_new = self.refusals.refuse(Subject::Programs, format!("{error:#}"), Instant::now());
        // Missing capabilities are reported as a condition.
        if is_new && self.missing.is_none() {
            warn!("no eBPF datapath: {error:#}");
        }
        Ok(())
    }

    /// What is attached stays, until the plan changes.
    fn keep(&mut self, error: &anyhow::Error) {
        let state = match (&self.set, self.attachments.is_empty()) {
            (_, false) => "as they were, without the options that changed",
            (Some(_), true) => "those of an earlier agent, with maps that this agent keeps up to date",
            (None, true) => {
                "those of an earlier agent, which forward packets by its last routes: restart with a version that can replace \
                 them, or run `overlay-agent down` before the next start, which interrupts traffic"
            }
        };
        self.kept = Some(format!("the eBPF programs stay {state}: {error:#}"));
        self.next_read_back = None;
    }

    /// The maps that an earlier agent's programs use, if this process can keep them up to date.
    fn earlier_maps(&self, plan: &Plan, config: &Config) -> Option<OverlaySet> {
        let load = || {
            let mut set = OverlaySet::load_for(object()?, options(plan), config, self.pins.as_ref())?;
            set.show_alive()?;
            anyhow::Ok(set)
        };
        let loaded = load().inspect_err(|error| debug!("maps of an earlier agent: {error:#}"));
        loaded.ok().filter(OverlaySet::has_earlier_maps)
    }

    /// Loads and tests all programs, and fills maps that no program uses yet.
    fn stage(&mut self, wanted: Wanted<'_>, report: &mut Report) -> Result<OverlaySet> {
        let Wanted { plan, config, containers, .. } = wanted;
        let object = object()?;
        capabilities::check(capabilities::EBPF)?;
        let mut set = self.load_set(object, plan, config)?;
        set.set_former(&self.former)?;
        self_test::run(object, INGRESS).context("the kernel does not run the eBPF programs as it should")?;
        // Before others have been replaced, it must be known that these can be.
        let is_wanted = |hook| plan.targets(&self.refusals).iter().any(|target| target.hook == hook);
        if is_wanted(XDP) && self.is_attached(XDP)? {
            set.programs.load_program(XDP)?;
            self_test::run(object, XDP)?;
            self.is_xdp_tested = true;
        }
        let bypasses = plan.bypass != Bypass::Off && self.local.refused.is_none();
        for hook in LOCAL {
            if bypasses && self.is_attached(hook)? {
                set.programs.load_program(hook)?;
            }
        }
        let replaces = self.set.is_some() || self.is_adopting;
        if replaces && !set.has_earlier_maps() {
            // Not what another program changed.
            self.config = None;
            self.fill(&mut set, wanted, report)?;
            if let Some(why) = &report.routes_behind
                && !set.is_full()
            {
                bail!("{why}");
            }
            if bypasses {
                set.set_endpoints(&containers.endpoints)?;
            }
        }
        Ok(set)
    }

    /// Whether a program with this name is attached anywhere, by this process or an earlier agent.
    fn is_attached(&self, hook: Hook) -> Result<bool> {
        let own = self.attachments.iter().chain(self.local.attachments());
        if own.into_iter().any(|attachment| attachment.target.hook == hook) {
            return Ok(true);
        }
        match &self.pins {
            Some(pins) if self.is_adopting => pins.has_links_of(hook.program),
            _ => Ok(false),
        }
    }

    /// Puts the programs of `after` in the place of those of `before`. After an error, `before` runs.
    async fn switch(&mut self, plan: &Plan, mut before: OverlaySet, mut after: OverlaySet) {
        after.programs.keep_maps();
        match self.replace_all(plan, &mut after).await {
            Ok(()) => {
                if plan.bypass == Bypass::Off || self.local.refused.is_some() {
                    self.local.detach();
                }
                if let Err(error) = after.settle(Some(before)) {
                    warn!("{error:#}");
                }
                info!("the eBPF programs are replaced");
                self.set = Some(after);
            }
            Err(error) => {
                for result in
                    [self.replace_all(plan, &mut before).await, before.programs.remove_other_generations()]
                {
                    if let Err(error) = result {
                        warn!("{error:#}");
                    }
                }
                self.set = Some(before);
                self.keep(&error);
            }
        }
    }

    /// Replaces the program of every attachment. XDP is the last, and its device may be gone.
    async fn replace_all(&mut self, plan: &Plan, set: &mut OverlaySet) -> Result<()> {
        let bypasses = plan.bypass != Bypass::Off && self.local.refused.is_none();
        let local = self.local.attachments_mut().filter(|_| bypasses);
        for attachment in self.attachments.iter_mut().rev().chain(local) {
            if device_name(attachment.target.ifindex).is_ok() {
                set.programs.replace(&self.netlink, attachment).await?;
            }
        }
        Ok(())
    }

    /// Loads maps and programs, without the bypass when the kernel cannot have it.
    fn load_set(&mut self, object: &[u8], plan: &Plan, config: &Config) -> Result<OverlaySet> {
        if let Some(pins) = &self.pins {
            self.in_use = Some(pins.claim()?);
        }
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

    /// Makes the maps of `set` what they should be.
    fn fill(&mut self, set: &mut OverlaySet, wanted: Wanted<'_>, report: &mut Report) -> Result<()> {
        let Wanted { plan, config, routes, .. } = wanted;
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
        if self.is_adopting && self.kept.is_none() && set.has_earlier_maps() {
            let left = set.routes()?;
            let changes = diff(&left, routes).len();
            info!("took over {} routes of an earlier agent, of which {changes} change", left.len());
        }
        report.routes_behind = set.set_routes(routes).err().map(|error| format!("{error:#}"));
        self.behind = report.routes_behind.is_some();
        Ok(())
    }
}

fn options(plan: &Plan) -> LoadOptions {
    LoadOptions { bypass: plan.bypass, log: plan.log }
}
