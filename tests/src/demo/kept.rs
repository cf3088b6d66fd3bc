//! `--keep`: leaves two hosts on tc running, and prints how to use and remove them.

use anyhow::Result;

use crate::{
    agent::{Agent, Rung},
    demo::options::Options,
    pair::Pair,
    sandbox::{Kind, Sandbox},
    topology::{PodOffload, Topology},
};

/// Builds the topology with both hosts on tc and leaves it up.
///
/// # Errors
///
/// When it cannot be built; then nothing is left.
pub fn leave_up(options: &Options) -> Result<()> {
    let sandbox = Sandbox::start(Kind::Kept)?;
    let topology = Topology::build(&sandbox, options.underlay, PodOffload::On)?;
    let Pair { a, b, topology, .. } = Pair::start(&sandbox, topology, Rung::Tc, Rung::Tc)?;
    sandbox.keep();
    let enter = |name: &str| format!("ip netns exec {name}");
    let [host_a, host_b] = [&topology.a, &topology.b].map(|side| enter(side.host.name()));
    let [pod_a, pod_b] = [&topology.a, &topology.b].map(|side| enter(side.pod.name()));
    let ask = |agent: &Agent, question: &str| {
        let site = agent.site();
        format!("{} {question} --run-dir {}", site.binary().display(), site.run_directory().display())
    };
    println!("\nTwo hosts on tc are left up (underlay: {}):", options.underlay.name());
    println!("  host A, container A    {host_a} bash; {pod_a} bash");
    println!("  host B, container B    {host_b} bash; {pod_b} bash");
    println!("  ping across            {pod_a} ping {}", topology.b.pod_address);
    println!(
        "  throughput             {pod_b} iperf3 -s -D -1; {pod_a} iperf3 -c {}",
        topology.b.pod_address
    );
    println!("  outer packets          {host_b} tcpdump -ni eth0 udp port 8285");
    println!("  agent A                {host_a} {}", ask(&a, "status"));
    println!("                         {host_a} {}", ask(&a, "routes"));
    println!("                         {host_a} {}", ask(&a, "counters"));
    println!("  agent B                {host_b} {}", ask(&b, "status"));
    println!("  remove everything      cargo xtask demo --remove");
    a.leave();
    b.leave();
    Ok(())
}
