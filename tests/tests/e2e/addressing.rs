//! Frames that the underlay device shows but that are not for it: for another hardware address, or of a VLAN.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Result, ensure};
use overlay_tests::{agent::Rung, report::Counters, sandbox::Sandbox, topology::UPLINK};

use crate::{
    faults::{GoldenFrame, carried, golden_frames, grown, mac_of, pair},
    foreign, frames,
    matrix::needs,
    suite::Suite,
};

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let name = format!("addressing::frames_for_another_device_are_not_carried_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| others_frames(sandbox, rung));
    }
}

fn others_frames(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let (a, b) = (&pair.topology.a.host, &pair.topology.b.host);
    a.tool(&format!("ip link set {UPLINK} promisc on"))?;
    let vectors = golden_frames()?;
    let ours: Vec<_> = vectors.iter().filter(|vector| vector.is_delivered()).collect();
    let own = mac_of(&pair)?;
    // What host A carries of frames to an address, and what it drops.
    let send = |mac: &str| -> Result<(u64, Counters, Counters)> {
        let frames: Vec<_> = ours
            .iter()
            .map(|GoldenFrame { frame, .. }| frames::addressed_to(frame, mac))
            .collect::<Result<_>>()?;
        let before = pair.a.counters()?;
        let sent = b.run(|| frames::send(UPLINK, &frames))??;
        ensure!(sent == frames.len() && sent > 20, "only {sent} of {} frames could be sent", frames.len());
        // The last frames may still be on their way through the agent.
        thread::sleep(Duration::from_millis(300));
        let after = pair.a.counters()?;
        Ok((carried(&after) - carried(&before), before, after))
    };
    let (to_own, ..) = send(&own)?;
    ensure!(to_own > 20, "{to_own} frames for host A were carried");
    let (to_group, ..) = send("ff:ff:ff:ff:ff:ff")?;
    ensure!(
        to_group == to_own,
        "{to_own} frames were carried, and {to_group} of the same to the broadcast address"
    );

    let (to_other, before, after) = send("02:00:00:00:77:99")?;
    let drops = grown(&before.drops, &after.drops);
    ensure!(
        to_other == 0 && drops.is_empty(),
        "{to_other} frames for another host were carried, {drops:?} dropped"
    );

    foreign::tag(b, &sandbox.new_directory("tag")?)?;
    let (tagged, before, after) = send(&own)?;
    foreign::untag(b)?;
    ensure!(tagged == 0 || rung == Rung::Xdp, "{tagged} frames of a VLAN were carried");
    let drops = grown(&before.drops, &after.drops);
    match rung {
        // XDP does not see the tag, the program behind it does.
        Rung::Xdp => {
            ensure!(drops.get("vlan_tagged") == Some(&tagged) && tagged > 20, "{tagged} frames, {drops:?}")
        }
        Rung::Tc | Rung::Tun => ensure!(drops.is_empty(), "{drops:?}"),
    }
    let (at_last, ..) = send(&own)?;
    ensure!(at_last == to_own, "{at_last} of {to_own} frames were carried at the end");
    Ok(())
}
