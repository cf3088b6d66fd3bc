//! The fast path: the loaded programs, their maps and their attachments.

mod switch;

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use overlay_ebpf::abi::{Config, Counters, NextHop};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{
    Pauses, Postponed, Report, Request,
    ebpf::{
        self, Attachment, InUse, LoadOptions, OverlaySet, Pins, RouteWrites, Target, TcxLinks, left_counters,
        overlay_set::{COUNTERS, FormerAddresses, INGRESS, XDP},
        self_test, unpin,
    },
    local::LocalPrograms,
    plan::{Plan, Step, next_step},
    refusals::{Cause, Refusals, Subject},
    rungs::{ActiveRungs, Trigger},
    tally::Tally,
};
use crate::{
    capabilities,
    containers::Containers,
    netlink::{Netlink, device_name},
    route::{NextHops, RouteChange},
};

/// The route map is read back at most in this share of the time: 1 in 1000.
const READ_BACK_SHARE: u32 = 1000;

/// How long frames that XDP has decapsulated may be on their way to the tc program behind it: in the lists of GRO, or in the queue of another
/// CPU.
const XDP_REST: Duration = Duration::from_millis(20);

/// What the fast path should be.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) plan: &'a Plan,
    pub(super) config: &'a Config,
    pub(super) routes: &'a NextHops,
    pub(super) containers: &'a Containers,
}

/// The programs, and where they are attached.
pub(super) struct FastPath {
    pub(super) rungs: ActiveRungs,
    netlink: Netlink,
    /// XDP first: dropped from the front.
    attachments: Vec<Attachment>,
    /// On the devices of containers.
    local: LocalPrograms,
    set: Option<OverlaySet>,
    /// The constants for which `set` was loaded.
    loaded: Option<LoadOptions>,
    /// Whether the kernel runs XDP of `set` as it should.
    is_xdp_tested: bool,
    /// Why other programs are attached than the plan asks for: they could not be replaced.
    kept: Option<String>,
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
    /// What the programs had counted that [`Self::leave`] left.
    left: Counters,
    /// While a set is loaded: other agents leave the pins alone.
    in_use: Option<InUse>,
    next_read_back: Option<Instant>,
    /// Former addresses of peers.
    former: FormerAddresses,
    /// Whether the last update of the route map failed.
    behind: bool,
}

impl FastPath {
    pub(super) fn new(netlink: Netlink, pins: Option<Pins>, pauses: Pauses) -> Self {
        Self {
            rungs: ActiveRungs::new(SystemTime::now()),
            netlink,
            attachments: Vec::new(),
            local: LocalPrograms::default(),
            set: None,
            loaded: None,
            is_xdp_tested: false,
            kept: None,
            is_adopting: pins.as_ref().is_some_and(Pins::has_links),
            pins,
            config: None,
            plan: None,
            missing: None,
            refusals: Refusals::new(pauses),
            counted: Counters::ZERO,
            left: Counters::ZERO,
            in_use: None,
            next_read_back: None,
            former: FormerAddresses::new(),
            behind: false,
        }
    }

    /// Makes maps and attachments what `wanted` says: maps first. Fails when the kernel's state cannot be
    /// read, or a step fails that was asked for explicitly; steps already made stay, unless nothing was attached before. Programs that
    /// cannot be replaced stay attached, which is no error: the report says so.
    pub(super) async fn reconcile(&mut self, wanted: Wanted<'_>, report: &mut Report) -> Result<()> {
        let request = wanted.plan.request;
        let started = !self.attachments.is_empty();
        let done = self.take_steps(wanted, report).await;
        report.kept.clone_from(&self.kept);
        if done.is_err() && !started {
            // An earlier agent's programs are better than none.
            if self.is_adopting { self.leave() } else { self.unload() }
        }
        self.is_adopting &= done.is_err() || self.keeps_earlier();
        if request == Request::Auto {
            return done;
        }
        done.with_context(|| format!("{} is not possible", request.flag()))
    }

    async fn take_steps(&mut self, wanted: Wanted<'_>, report: &mut Report) -> Result<()> {
        let plan = wanted.plan;
        let mut trigger = Trigger::Refusals;
        if self.plan.as_ref() != Some(plan) {
            trigger = Trigger::Plan;
            self.forget_refusals();
            self.kept = None;
            self.plan = Some(plan.clone());
        }
        self.refusals.advance(Instant::now());
        if !plan.targets(&self.refusals).is_empty() {
            self.provide(wanted, report).await?;
            if self.keeps_earlier() {
                self.show_earlier(plan, trigger);
                return Ok(());
            }
            self.drop_unlisted(plan, report).await?;
        }
        loop {
            let attached: Vec<_> = self.attachments.iter().map(|attachment| attachment.target).collect();
            match next_step(&attached, &plan.targets(&self.refusals)) {
                None => break,
                Some(Step::Detach(target)) => {
                    self.attachments.retain(|attachment| attachment.target != target);
                    report.made.push(format!("{} detached", target.hook.program));
                    if target.hook == XDP {
                        sleep(XDP_REST).await;
                    }
                }
                Some(Step::Attach(target)) => match self.attach(target).await {
                    Ok(()) => report.made.push(format!("{} attached", target.hook.program)),
                    // Other underlay devices than the first come with routes: none of them ends an explicit request.
                    Err(error) if plan.request == Request::Auto || !plan.is_essential(target) => {
                        debug!("{} is not attached: {error:#}", target.hook.program);
                        self.refusals.refuse(Subject::Target(target), format!("{error:#}"), Instant::now());
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
        let (egress, ingress) = (plan.egress(&self.refusals), plan.ingress(&self.refusals));
        self.rungs.set(egress, ingress, trigger, SystemTime::now());
        Ok(())
    }

    /// Attempts at the next reconciliation what was refused before, as if it had never been.
    pub(super) fn forget_refusals(&mut self) {
        self.refusals.clear();
        self.missing = None;
    }

    /// Whether the next reconciliation attempts something that was refused.
    pub(super) fn is_attempt_due(&self) -> bool {
        self.refusals.next_attempt().is_some_and(|at| at <= Instant::now())
    }

    /// What is left out for a while.
    pub(super) fn postponed(&self) -> Vec<Postponed> {
        let (now, clock) = (Instant::now(), SystemTime::now());
        let postponed = self.refusals.iter().map(|refusal| Postponed {
            what: match refusal.subject {
                Subject::Programs => "all eBPF programs".to_owned(),
                Subject::Target(Target { hook, ifindex, .. }) => {
                    let device = device_name(ifindex).unwrap_or_else(|_| format!("device {ifindex}"));
                    format!("{} on {device}", hook.program)
                }
            },
            why: refusal.why.to_owned(),
            is_removed: refusal.cause == Cause::Removal,
            next_attempt: clock + refusal.until.saturating_duration_since(now),
        });
        postponed.collect()
    }

    /// Detaches what an earlier agent left at other hooks, and removes maps that only its programs had.
    pub(super) fn unpin_others(&mut self) -> Result<()> {
        let Some(pins) = &self.pins else { return Ok(()) };
        let own = self.attachments.iter().chain(self.local.attachments());
        let own: Vec<_> = own.filter_map(Attachment::pin).collect();
        for link in pins.links()? {
            if !own.contains(&link.as_path()) {
                unpin(&link)?;
                info!("an earlier agent's {} is detached", link.display());
            }
        }
        self.set.as_mut().map_or(Ok(()), |set| set.settle(None))
    }

    /// Forgets attachments that the kernel does not list any more, so that they are attached again.
    /// [`Request::Auto`] leaves out what is removed again and again.
    async fn drop_unlisted(&mut self, plan: &Plan, report: &mut Report) -> Result<()> {
        let Some(set) = &self.set else { return Ok(()) };
        let (mut unlisted, links) = (Vec::new(), TcxLinks::read()?);
        for attachment in &self.attachments {
            let target = &attachment.target;
            // The kernel removes a program with its device; the plan has the successor of the device.
            let Ok(device) = device_name(target.ifindex) else { continue };
            if !set.programs.is_attached(&self.netlink, attachment, &links).await? {
                unlisted.push(*target);
                let is_auto = plan.request == Request::Auto;
                if !(is_auto && self.refusals.removed(*target, Instant::now())) {
                    report.repaired.push(format!("program {} on {device}", target.hook.program));
                }
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
        let keeps_earlier = self.keeps_earlier();
        let (Some(set), Some(plan)) = (&mut self.set, &self.plan) else { return Ok(()) };
        if keeps_earlier {
            return set.set_endpoints(&containers.endpoints).map(drop);
        }
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
            if !self.is_xdp_tested {
                self_test::run(object()?, XDP)?;
                self.is_xdp_tested = true;
            }
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

    /// As [`Self::counters`], with what an earlier agent's programs have counted in a map that no set has taken over.
    fn counters_with_left(&self) -> Result<Counters> {
        let mut sum = self.counters()?;
        if self.set.is_none()
            && let Some(left) = self.pins.as_ref().map(left_counters).transpose()?.flatten()
        {
            sum.add(&left);
        }
        Ok(sum)
    }

    /// Goes on from what earlier agents' programs have counted.
    pub(super) fn restore(&mut self, tally: &Tally) {
        let has_map = self.pins.as_ref().is_some_and(|pins| pins.has_map(COUNTERS));
        self.counted = tally.fast_elsewhere(has_map);
    }

    /// What was counted in maps that are gone, or go with this process, and in the pinned map.
    pub(super) fn tally(&self) -> Result<(Counters, Counters)> {
        let (mut gone, mut pinned) = (self.counted, self.left);
        if let Some(set) = &self.set {
            let counted = set.counters()?;
            if self.pins.is_some() { pinned = counted } else { gone.add(&counted) }
        }
        Ok((gone, pinned))
    }

    /// Changes that were made in the route maps of the present programs.
    pub(super) fn route_writes(&self) -> RouteWrites {
        self.set.as_ref().map(OverlaySet::route_writes).unwrap_or_default()
    }

    /// Tells the programs that the agent is there.
    pub(super) fn show_alive(&mut self) -> Result<()> {
        self.set.as_mut().map_or(Ok(()), OverlaySet::show_alive)
    }

    /// Whether programs are attached that would go on without this process.
    pub(super) fn is_pinned(&self) -> bool {
        if self.keeps_earlier() {
            return true;
        }
        !self.attachments.is_empty() && self.attachments.iter().all(|attachment| attachment.pin().is_some())
    }

    /// Leaves programs and maps in the kernel, where those that are pinned go on.
    pub(super) fn leave(&mut self) {
        self.local.leave();
        self.attachments.iter_mut().for_each(Attachment::keep);
        self.attachments.clear();
        if let Some(counted) = self.set.as_ref().and_then(|set| set.counters().ok()) {
            self.left = counted;
        }
        self.forget_set();
    }

    fn forget_set(&mut self) {
        (self.set, self.loaded, self.config, self.next_read_back) = (None, None, None, None);
        self.in_use = None;
        self.is_xdp_tested = false;
    }

    /// From now on, what is pinned may be another agent's.
    pub(super) fn expect_links(&mut self) {
        self.is_adopting = self.pins.as_ref().is_some_and(Pins::has_links);
    }

    /// Detaches all programs, XDP first, and closes their maps.
    pub(super) fn unload(&mut self) {
        self.local.detach();
        self.attachments.clear();
        match self.counters_with_left() {
            Ok(counters) => (self.counted, self.left) = (counters, Counters::ZERO),
            Err(error) => warn!("the counters of the eBPF programs are lost: {error:#}"),
        }
        self.forget_set();
        // Maps of an earlier agent, too, and what it left attached.
        if let Some(pins) = &self.pins
            && let Err(error) = pins.remove_datapath()
        {
            warn!("{error:#}");
        }
    }
}

fn object() -> Result<&'static [u8]> {
    ebpf::OBJECT.context("this binary was built without eBPF programs: build it with `cargo xtask build`")
}
