//! End-to-end tests: agents, hosts and containers in network namespaces, with traffic that is verified.
//!
//! One binary, one topology per test, one test at a time: they share two CPUs, and rates and losses count.

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
mod unrepairable;
mod upgrade;
mod wait;
mod xfrm;

use std::process::ExitCode;

use libtest_mimic::{Arguments, run};
use overlay_tests::sandbox::Sandbox;

use crate::suite::Suite;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if let Err(error) = Sandbox::remove_on_signals() {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let mut suite = Suite::new();
    comparison::register(&mut suite);
    addressing::register(&mut suite);
    matrix::register(&mut suite);
    bypass::register(&mut suite);
    bypass_containers::register(&mut suite);
    traps::register(&mut suite);
    shells::register(&mut suite);
    checksums::register(&mut suite);
    losses::register(&mut suite);
    lifecycle::register(&mut suite);
    etcd::register(&mut suite);
    faults::register(&mut suite);
    refusals::register(&mut suite);
    node::register(&mut suite);
    repair::register(&mut suite);
    restart::register(&mut suite);
    upgrade::register(&mut suite);
    rungs::register(&mut suite);
    handover::register(&mut suite);
    unattended::register(&mut suite);
    policy::register(&mut suite);
    privileges::register(&mut suite);
    subnet_file::register(&mut suite);
    underlay::register(&mut suite);
    xfrm::register(&mut suite);
    unrepairable::register(&mut suite);
    datapath::register(&mut suite);
    containers::register(&mut suite);
    firewall::register(&mut suite);
    guard::register(&mut suite);
    icmp::register(&mut suite);
    path_mtu::register(&mut suite);
    other_underlay::register(&mut suite);
    neighbours::register(&mut suite);
    spread::register(&mut suite);
    flannel_proxy::register(&mut suite);
    forward_policy::register(&mut suite);
    socket_lb::register(&mut suite);
    services::register(&mut suite);
    services_http::register(&mut suite);
    autonomy::register(&mut suite);
    services_health::register(&mut suite);
    services_changes::register(&mut suite);
    services_restart::register(&mut suite);
    run(&arguments, suite.into_trials()).exit_code()
}
