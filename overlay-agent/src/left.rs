//! What an agent that has ended left on this host: the eBPF programs that forward packets without it, by their pins, and the record of
//! its run.

use std::{
    net::Ipv4Addr,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use overlay_ebpf::abi::NextHop;

use crate::{
    datapath::{
        Choice, PathCounters, Rung,
        ebpf::{
            PinnedState, Pins,
            overlay_set::{EGRESS, INGRESS, XDP},
        },
    },
    netlink::{Link, Netlink},
    report::{self, ActiveRung, CounterList, Frozen, FrozenProgram, RouteList, Status, WithoutAgent},
    run_record::RunRecord,
};

/// How long programs trust an agent that does not show itself (`ovl_heartbeat`).
const TRUST: Duration = Duration::from_secs(5);

/// Pinned programs, the record of the run, and the devices of this host.
pub(crate) struct Left {
    pinned: PinnedState,
    record: Option<(RunRecord, SystemTime)>,
    devices: Vec<Link>,
}

impl Left {
    /// Looks for what the agent with this overlay device and run directory left; `None` when nothing is pinned.
    /// Fails when the pins or the devices cannot be read.
    pub(crate) async fn find(netlink: &Netlink, device: &str, run_dir: &Path) -> Result<Option<Self>> {
        let Some(pins) = Pins::find(device)? else { return Ok(None) };
        let pinned = PinnedState::read(&pins)?;
        if pinned.programs.is_empty() {
            return Ok(None);
        }
        let record = RunRecord::read(&RunRecord::path(run_dir, device));
        Ok(Some(Self { pinned, record, devices: netlink.links().await? }))
    }

    /// The state of a host without an agent, `why` being the reason why it has none.
    pub(crate) fn status(&self, device: &str, why: String) -> Status {
        let frozen = self.frozen(SystemTime::now());
        let record = self.record.as_ref().map(|(record, _)| record.clone()).unwrap_or_default();
        let config = self.pinned.maps.as_ref().map(|maps| maps.config);
        let underlays: Vec<_> = self
            .pinned
            .programs
            .iter()
            .filter(|pinned| pinned.is_attached && pinned.program == INGRESS.program)
            .filter_map(|pinned| self.device(pinned.ifindex).map(report::Device::from))
            .collect();
        let address = record.public_ip.or(config.map(|config| config.public_ip.into()));
        let counters = self.path_counters();
        Status {
            agent: "absent".to_owned(),
            state: "absent".to_owned(),
            problems: self.problems(why, &frozen),
            version: record.version,
            pid: 0,
            network: record.network,
            subnet: record.subnet,
            public_ip: address.filter(|address| *address != Ipv4Addr::UNSPECIFIED),
            port: record.port.or(config.map(|config| config.port)),
            device: self.devices.iter().find(|link| link.name == device).map(report::Device::from),
            underlay: underlays.first().cloned(),
            other_underlays: underlays.get(1..).unwrap_or_default().to_vec(),
            slow_routes: self.routes_where(|hop| hop.has(NextHop::SLOW_PATH)),
            egress: self.pinned.runs(EGRESS.program).then(|| rung(Rung::Tc)),
            ingress: self.ingress().map(rung),
            without_agent: Some(WithoutAgent {
                forwards: self.forwards(),
                why: "the eBPF programs are pinned in the BPF file system".to_owned(),
            }),
            routes: self.route_count(),
            store: report::Store { name: record.store, lost: Some("no agent reads it".to_owned()) },
            drops: report::errors(&counters),
            frozen: Some(frozen),
            ..Status::default()
        }
    }

    fn device(&self, ifindex: u32) -> Option<&Link> {
        self.devices.iter().find(|link| link.index == ifindex)
    }

    /// How many routes the programs have.
    pub(crate) fn route_count(&self) -> usize {
        self.routes_where(|_| true)
    }

    fn routes_where(&self, is_counted: impl Fn(&NextHop) -> bool) -> usize {
        let maps = self.pinned.maps.iter();
        maps.flat_map(|maps| maps.routes.values()).filter(|hop| is_counted(hop)).count()
    }

    /// Whether the programs forward packets in both directions.
    pub(crate) fn forwards(&self) -> bool {
        self.pinned.runs(EGRESS.program) && self.ingress().is_some()
    }

    /// XDP alone delivers nothing.
    fn ingress(&self) -> Option<Rung> {
        let has_tc = self.pinned.runs(INGRESS.program);
        has_tc.then(|| if self.pinned.runs(XDP.program) { Rung::Xdp } else { Rung::Tc })
    }

    /// Since when nothing follows the store and the kernel.
    pub(crate) fn frozen(&self, now: SystemTime) -> Frozen {
        let seen = self.record.as_ref().map(|(_, seen)| *seen);
        let ends = self.record.as_ref().and_then(|(record, _)| record.lease_ends.clone());
        let is_past = |end: &String| humantime::parse_rfc3339(end).is_ok_and(|end| end <= now);
        let programs = self.pinned.programs.iter().map(|pinned| FrozenProgram {
            program: pinned.program.clone(),
            device: self.device(pinned.ifindex).map(|link| link.name.clone()),
            ifindex: pinned.ifindex,
            attached: pinned.is_attached,
        });
        Frozen {
            since: seen.map(report::utc),
            neighbours_stale: seen.is_none_or(|seen| now.duration_since(seen).is_ok_and(|age| age >= TRUST)),
            lease_ended: ends.as_ref().is_some_and(is_past),
            lease_ends: ends,
            programs: programs.collect(),
        }
    }

    fn problems(&self, why: String, frozen: &Frozen) -> Vec<String> {
        let detached = frozen.programs.iter().filter(|program| !program.attached).map(|program| {
            let device = program.device.clone().unwrap_or_else(|| format!("device {}", program.ifindex));
            format!("{} is not attached to {device} any more", program.program)
        });
        let others = (self.pinned.maps.is_none()).then(|| {
            "the maps are those of another version, use the binary of the agent that has ended".to_owned()
        });
        let lease = frozen
            .lease_ends
            .iter()
            .filter(|_| frozen.lease_ended)
            .map(|end| format!("the lease ended at {end}: another host may hold this subnet by now"));
        let stops = (!self.forwards())
            .then(|| "the programs do not forward packets in both directions: start the agent".to_owned());
        std::iter::once(why).chain(stops).chain(lease).chain(detached).chain(others).collect()
    }

    /// The routes that the programs have. Which records were skipped is not known.
    pub(crate) fn routes(&self) -> RouteList {
        let hops = self.pinned.maps.iter().flat_map(|maps| &maps.routes);
        let routes = hops.map(|(subnet, hop)| report::Route {
            subnet: *subnet,
            peer: hop.peer.into(),
            device: self.device(hop.ifindex).map(|link| link.name.clone()),
            mtu: (hop.ifindex != 0).then_some(hop.mtu),
            slow_path: hop
                .has(NextHop::SLOW_PATH)
                .then(|| "the agent that has ended said so, and without one its packets are lost".to_owned()),
            link_address: hop.has(NextHop::RESOLVED).then(|| report::hardware_address(hop.mac)),
        });
        RouteList { routes: routes.collect(), skipped: Vec::new() }
    }

    /// What the programs count, and what the agent had counted.
    pub(crate) fn counters(&self) -> CounterList {
        self.path_counters().into()
    }

    fn path_counters(&self) -> PathCounters {
        let tally = self.record.as_ref().map(|(record, _)| record.tally.clone()).unwrap_or_default();
        tally.counters(self.pinned.maps.as_ref().map(|maps| &maps.counters))
    }
}

fn rung(rung: Rung) -> ActiveRung {
    ActiveRung { choice: Choice { rung, why: "pinned by an agent that has ended".to_owned() }, since: None }
}
