//! Which programs should be attached where, and the steps from what is attached to that. Pure.

use overlay_ebpf::bypass::Bypass;

use super::{
    Choice, Request, Rung,
    ebpf::{
        Hook, Target, TcMode,
        overlay_set::{EGRESS, FROM_LOCAL, INGRESS, TO_LOCAL, XDP},
    },
    refusals::Refusals,
};
use crate::{containers::Containers, netlink::Link};

/// What the programs that should be attached depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) request: Request,
    pub(super) mode: TcMode,
    pub(super) underlays: Vec<Link>,
    pub(super) overlay_ifindex: u32,
    pub(super) bypass: Bypass,
    pub(super) log: bool,
}

impl Plan {
    fn target(&self, hook: Hook, ifindex: u32) -> Target {
        Target { hook, ifindex, mode: self.mode }
    }

    fn wants_xdp(&self, underlay: &Link) -> bool {
        match self.request {
            Request::Xdp => true,
            // Virtual devices with native XDP lose more elsewhere (veth: TSO of the peer, and a copy).
            Request::Auto => underlay.kind.is_none(),
            Request::Tc | Request::Tun => false,
        }
    }

    /// Whether an explicit request fails without this target.
    pub(super) fn is_essential(&self, target: Target) -> bool {
        target.hook == EGRESS || self.underlays.first().is_some_and(|first| first.index == target.ifindex)
    }

    /// The programs that should be attached, in the order of attaching: what XDP passes on needs the tc program behind it.
    pub(super) fn targets(&self, refusals: &Refusals) -> Vec<Target> {
        let mut targets = Vec::new();
        for underlay in &self.underlays {
            let hooks = match self.ingress_of(underlay, refusals).rung {
                Rung::Xdp => &[INGRESS, XDP][..],
                Rung::Tc => &[INGRESS],
                Rung::Tun => &[],
            };
            targets.extend(hooks.iter().map(|hook| self.target(*hook, underlay.index)));
        }
        if self.egress(refusals).rung == Rung::Tc {
            targets.push(self.target(EGRESS, self.overlay_ifindex));
        }
        targets
    }

    /// The programs on devices of containers that should be attached for the bypass.
    pub(super) fn local_targets(&self, containers: &Containers, refusals: &Refusals) -> Vec<Target> {
        if self.bypass == Bypass::Off || self.egress(refusals).rung == Rung::Tun {
            return Vec::new();
        }
        let arrivals = containers.arrivals.keys().map(|index| self.target(FROM_LOCAL, *index));
        let gateways = containers.gateways.keys().map(|index| self.target(TO_LOCAL, *index));
        match self.bypass {
            // First what confirms flows: a flow that is not confirmed takes the stack.
            Bypass::Flows => gateways.chain(arrivals).collect(),
            Bypass::Off | Bypass::All => arrivals.collect(),
        }
    }

    /// How inner packets leave.
    pub(super) fn egress(&self, refusals: &Refusals) -> Choice {
        let (rung, why) = match refusals.of(self.target(EGRESS, self.overlay_ifindex)) {
            Some(why) => (Rung::Tun, format!("no tc program on the overlay device: {why}")),
            None => (Rung::Tc, "the kernel runs tc programs on the overlay device".to_owned()),
        };
        self.choice(refusals, rung, why)
    }

    /// How outer packets arrive: the slowest way of several underlay devices.
    pub(super) fn ingress(&self, refusals: &Refusals) -> Choice {
        let choices = self.underlays.iter().map(|underlay| self.ingress_of(underlay, refusals));
        let slowest = choices.max_by_key(|choice| choice.rung);
        slowest.unwrap_or(Choice { rung: Rung::Tun, why: "there is no underlay device".to_owned() })
    }

    fn ingress_of(&self, underlay: &Link, refusals: &Refusals) -> Choice {
        let [no_tc, no_xdp] = [INGRESS, XDP].map(|hook| refusals.of(self.target(hook, underlay.index)));
        let (rung, why) = match (no_tc, no_xdp, &underlay.kind) {
            _ if !underlay.ethernet => (Rung::Tun, format!("{} is no Ethernet device", underlay.name)),
            (Some(why), ..) => (Rung::Tun, format!("no tc program on the underlay: {why}")),
            (None, Some(why), _) => (Rung::Tc, format!("no XDP: {why}")),
            (None, None, _) if self.wants_xdp(underlay) => {
                (Rung::Xdp, "the underlay's driver has native XDP".to_owned())
            }
            (None, None, Some(kind)) => {
                (Rung::Tc, format!("{} is a {kind} device, which tc serves better than XDP", underlay.name))
            }
            // Only on request, and then that is why.
            (None, None, None) => (Rung::Tc, String::new()),
        };
        self.choice(refusals, rung, why)
    }

    /// `rung`, unless there are no programs; `why` if it was not asked for.
    fn choice(&self, refusals: &Refusals, rung: Rung, why: String) -> Choice {
        let asked = || format!("{} is asked for", self.request);
        let (rung, why) = match (self.request, refusals.of_programs()) {
            (Request::Tun, _) => (Rung::Tun, asked()),
            (_, Some(why)) => (Rung::Tun, format!("eBPF is not available: {why}")),
            // Of an underlay device other than the first, programs may be refused all the same.
            (Request::Xdp | Request::Tc, None) if rung == Rung::Tun => (rung, why),
            (Request::Xdp | Request::Tc, None) => (rung, asked()),
            (Request::Auto, None) => (rung, why),
        };
        Choice { rung, why }
    }
}

/// One step from what is attached to what should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Attach(Target),
    Detach(Target),
}

/// The next step. New programs are attached before old ones are detached, and XDP is detached before the tc program behind
/// it: packets that XDP decapsulated would reach the stack as the underlay's own.
pub(super) fn next_step(attached: &[Target], wanted: &[Target]) -> Option<Step> {
    if let Some(missing) = wanted.iter().find(|target| !attached.contains(target)) {
        return Some(Step::Attach(*missing));
    }
    let surplus = attached.iter().filter(|target| !wanted.contains(target));
    surplus.min_by_key(|target| target.hook.kind).map(|target| Step::Detach(*target))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{super::refusals::Subject, *};

    const OVERLAY: u32 = 9;

    fn refusals(subject: Subject, why: &str) -> Refusals {
        let mut refusals = Refusals::default();
        refusals.refuse(subject, why.to_owned(), Instant::now());
        refusals
    }

    fn plan(request: Request, kinds: &[Option<&str>]) -> Plan {
        let underlay = |(index, kind): (u32, &Option<&str>)| Link {
            kind: kind.map(str::to_owned),
            ..Link::ethernet(index, &format!("eth{index}"))
        };
        let underlays = (1..).zip(kinds).map(underlay).collect();
        Plan {
            request,
            mode: TcMode::Tcx,
            underlays,
            overlay_ifindex: OVERLAY,
            bypass: Bypass::Off,
            log: false,
        }
    }

    fn target(hook: Hook, ifindex: u32) -> Target {
        Target { hook, ifindex, mode: TcMode::Tcx }
    }

    /// All steps in order, each made as it is named.
    fn steps(mut attached: Vec<Target>, wanted: &[Target]) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some(step) = next_step(&attached, wanted) {
            match step {
                Step::Attach(target) => attached.push(target),
                Step::Detach(target) => attached.retain(|other| *other != target),
            }
            steps.push(step);
        }
        steps
    }

    #[test]
    fn auto_takes_xdp_on_hardware_and_tc_on_virtual_devices() {
        let none = Refusals::default();
        let mixed = plan(Request::Auto, &[None, Some("veth")]);
        let expected = [target(INGRESS, 1), target(XDP, 1), target(INGRESS, 2), target(EGRESS, OVERLAY)];
        assert_eq!(mixed.targets(&none), expected);
        // The slowest device decides what is reported.
        assert_eq!((mixed.ingress(&none).rung, mixed.egress(&none).rung), (Rung::Tc, Rung::Tc));
        assert_eq!(plan(Request::Auto, &[None]).ingress(&none).rung, Rung::Xdp);
    }

    #[test]
    fn each_direction_falls_back_for_itself() {
        let auto = plan(Request::Auto, &[None]);
        let (tc, xdp, egress) = (target(INGRESS, 1), target(XDP, 1), target(EGRESS, OVERLAY));
        for (refused, targets, rungs) in [
            (xdp, &[tc, egress][..], (Rung::Tc, Rung::Tc)),
            // XDP alone would hand packets to the stack that nothing delivers.
            (tc, &[egress], (Rung::Tun, Rung::Tc)),
            (egress, &[tc, xdp], (Rung::Xdp, Rung::Tun)),
        ] {
            let refusals = refusals(Subject::Target(refused), "no");
            assert_eq!(auto.targets(&refusals), targets);
            let (ingress, egress) = (auto.ingress(&refusals), auto.egress(&refusals));
            assert_eq!((ingress.rung, egress.rung), rungs);
            assert_eq!(ingress.why == "no XDP: no", refused == xdp);
        }
        let refusals = refusals(Subject::Programs, "no BPF");
        assert!(auto.targets(&refusals).is_empty());
        assert_eq!(auto.egress(&refusals).why, "eBPF is not available: no BPF");
    }

    #[test]
    fn changing_the_rung_keeps_what_both_have() {
        let targets = |request| plan(request, &[Some("veth")]).targets(&Refusals::default());
        let (tc, xdp) = (targets(Request::Tc), targets(Request::Xdp));
        assert_eq!(steps(tc.clone(), &xdp), [Step::Attach(target(XDP, 1))]);
        assert_eq!(steps(xdp.clone(), &tc), [Step::Detach(target(XDP, 1))]);
        assert!(steps(tc.clone(), &tc).is_empty());
        let to_tun = steps(xdp, &targets(Request::Tun));
        assert_eq!(to_tun[0], Step::Detach(target(XDP, 1)), "XDP is detached first");
        assert_eq!(to_tun.len(), 3);
    }

    #[test]
    fn a_recreated_device_gets_programs_before_the_old_ones_go() {
        let mut after = plan(Request::Xdp, &[None]);
        let before = after.targets(&Refusals::default());
        after.underlays[0].index = 5;
        let expected = [
            Step::Attach(target(INGRESS, 5)),
            Step::Attach(target(XDP, 5)),
            Step::Detach(target(XDP, 1)),
            Step::Detach(target(INGRESS, 1)),
        ];
        assert_eq!(steps(before, &after.targets(&Refusals::default())), expected);
    }
}
