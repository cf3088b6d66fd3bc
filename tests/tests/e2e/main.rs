//! End-to-end tests: agents, hosts and containers in network namespaces, with traffic that is verified.
//!
//! One binary, one topology per test, and one test at a time, except those that mostly wait: see `suite`.

mod addressing;
mod autonomy;
mod bypass;
mod bypass_containers;
mod checksums;
mod comparison;
mod containers;
mod datapath;
mod etcd;
mod faults;
mod fd_store;
mod firewall;
mod flannel_proxy;
mod foreign;
mod forward_policy;
mod frames;
mod guard;
mod handover;
mod icmp;
mod lifecycle;
mod losses;
mod machine;
mod matrix;
mod neighbours;
mod node;
mod other_underlay;
mod path_mtu;
mod policy;
mod privileges;
mod refusals;
mod repair;
mod restart;
mod rungs;
mod services;
mod services_changes;
mod services_health;
mod services_http;
mod services_restart;
mod shells;
mod snapshot;
mod socket_lb;
mod spread;
mod subnet_file;
mod suite;
mod traps;
mod unattended;
mod underlay;
mod underlay_traffic;
mod unrepairable;
mod upgrade;
mod wait;
mod xfrm;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use overlay_tests::sandbox::Sandbox;

use crate::suite::Suite;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Err(error) = Sandbox::remove_on_signals() {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut suite = Suite::default();
    comparison::register(&mut suite);
    traps::register(&mut suite);
    restart::register(&mut suite);
    upgrade::register(&mut suite);
    rungs::register(&mut suite);
    handover::register(&mut suite);
    underlay_traffic::register(&mut suite);
    spread::register(&mut suite);
    suite.waiting(|suite| {
        addressing::register(suite);
        matrix::register(suite);
        bypass::register(suite);
        bypass_containers::register(suite);
        shells::register(suite);
        checksums::register(suite);
        losses::register(suite);
        lifecycle::register(suite);
        etcd::register(suite);
        faults::register(suite);
        refusals::register(suite);
        node::register(suite);
        repair::register(suite);
        policy::register(suite);
        privileges::register(suite);
        subnet_file::register(suite);
        underlay::register(suite);
        xfrm::register(suite);
        unrepairable::register(suite);
        datapath::register(suite);
        containers::register(suite);
        firewall::register(suite);
        guard::register(suite);
        icmp::register(suite);
        path_mtu::register(suite);
        other_underlay::register(suite);
        neighbours::register(suite);
        flannel_proxy::register(suite);
        forward_policy::register(suite);
        socket_lb::register(suite);
        services::register(suite);
        services_http::register(suite);
        autonomy::register(suite);
        services_health::register(suite);
        services_changes::register(suite);
        services_restart::register(suite);
        unattended::register(suite);
    });
    if suite.run(arguments) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
