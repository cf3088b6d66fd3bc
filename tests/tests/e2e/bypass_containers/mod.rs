//! The bypass of a host's stack while its containers come, go and move.

mod changes;
mod churn;
mod devices;
mod forged;
mod place;
mod steady;

use overlay_tests::{agent::Rung, topology::Underlay};

use self::place::Kind;
use crate::{bypass::nft, machine::Need, suite::Suite};

const NEEDS: &[Need] = &[Need::Tun, Need::Ebpf, Need::Nftables];

pub(crate) fn register(suite: &mut Suite) {
    for bypass in ["flows", "all"] {
        let (other_kind, other_rung, attach) = match bypass {
            "flows" => (Kind::Bridge, (Rung::Xdp, Underlay::Wire), "clsact"),
            _ => (Kind::Routed, (Rung::Tc, Underlay::Virtual), "tcx"),
        };
        for (kind, (rung, underlay)) in
            [(Kind::Bridge, (Rung::Tc, Underlay::Virtual)), (other_kind, other_rung)]
        {
            let name = format!(
                "bypass_containers::{bypass}_{}_{}_{}_carry_everything",
                kind.name(),
                rung.name(),
                underlay.name()
            );
            suite
                .add(name, NEEDS, move |sandbox| steady::everything(sandbox, kind, bypass, (rung, underlay)));
        }
        for kind in [Kind::Bridge, Kind::Routed] {
            let name = |claim| format!("bypass_containers::{bypass}_{}_{claim}", kind.name());
            suite.add(name("containers_come_and_go"), NEEDS, move |sandbox| {
                changes::come_and_go(sandbox, kind, bypass)
            });
        }
        let name = |claim| format!("bypass_containers::{bypass}_{claim}");
        suite.add(name("churn_leaves_what_lives"), NEEDS, move |sandbox| {
            churn::churn(sandbox, other_kind, bypass)
        });
        suite.add(name("addresses_move_between_containers"), NEEDS, move |sandbox| {
            changes::renumbered(sandbox, bypass)
        });
        suite.add(name("containers_move_between_ports"), NEEDS, move |sandbox| {
            changes::moved(sandbox, bypass)
        });
        suite.add(name("routes_move_between_veths"), NEEDS, move |sandbox| {
            changes::route_moved(sandbox, bypass)
        });
        suite.add(name("programs_come_back"), NEEDS, move |sandbox| {
            devices::come_back(sandbox, bypass, attach)
        });
    }
    suite.add("bypass_containers::bridges_may_forget_what_skips_them", NEEDS, |sandbox| {
        changes::aged(sandbox, "all")
    });
    suite.add("bypass_containers::forged_frames_arrive_as_without_bypass", NEEDS, forged::compared);
    suite.add("bypass_containers::named_devices_are_bypassed", NEEDS, devices::named);
    suite.add("bypass_containers::two_bridges_are_bypassed", NEEDS, devices::two_bridges);
    for attach in ["tcx", "clsact"] {
        suite.add(format!("bypass_containers::agents_leave_no_program_on_{attach}"), NEEDS, move |sandbox| {
            devices::left(sandbox, attach)
        });
    }
}
