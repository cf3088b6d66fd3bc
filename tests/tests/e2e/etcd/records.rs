//! Invalid and foreign records are skipped, logged once, and change no other route.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    sandbox::Sandbox,
    topology::OVERLAY_MTU,
    traffic::{
        ping::{ping, ping_with_ttl},
        steady::without_loss,
        udp::every_size,
    },
};

use super::{Fixture, peer, route_lines, value, wait_for_route, wait_until};
use crate::{matrix::needs, suite::Suite};

/// Longer than any lease, and short of what etcd takes in one request.
const LONG: usize = 1 << 20;
/// Limit for the log line of one record.
const LONGEST_LINE: usize = 500;

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tun);
    suite.add("etcd::malformed_records_are_logged_once_and_change_no_route", tc, malformed_records);
    suite.add("etcd::records_of_other_backends_are_skipped", tc, other_backends);
    suite.add("etcd::a_peer_that_changes_its_address_is_followed", tc, peer_moves);
}

/// Records that A must skip, with a part of the reason.
fn malformed() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = || value(peer(50)).into_bytes();
    let long_array = format!("[{}0]", "0,".repeat(20_000));
    let long_backend = format!(r#"{{"PublicIP":"192.168.77.50","BackendType":"{}"}}"#, "x".repeat(20_000));
    let long_address = format!(r#"{{"PublicIP":"{}"}}"#, "x".repeat(20_000));
    vec![
        ("nonsense", good(), "not a subnet"),
        ("\u{1b}[2Jred", good(), "not a subnet"),
        ("10.244.50.1-24", good(), "not a subnet"),
        ("10.244.51.0-33", good(), "not a subnet"),
        ("10.244.52.0-24/more", good(), "not a subnet"),
        ("2001:db8::-64", good(), "not a subnet"),
        ("10.99.1.0-24", good(), "not a part of the network"),
        ("10.244.0.0-16", good(), "not a part of the network"),
        ("10.244.53.0-24", b"{".to_vec(), "not a JSON object"),
        ("10.244.54.0-24", b"[]".to_vec(), "not a JSON object"),
        ("10.244.55.0-24", Vec::new(), "not a JSON object"),
        ("10.244.56.0-24", vec![0xff, 0xfe, 0], "not a JSON object"),
        ("10.244.57.0-24", long_array.into_bytes(), "not a JSON object"),
        ("10.244.58.0-24", vec![b'x'; LONG], "not a JSON object"),
        ("10.244.59.0-24", b"{}".to_vec(), "PublicIP"),
        ("10.244.60.0-24", br#"{"PublicIP":7}"#.to_vec(), "PublicIP"),
        ("10.244.61.0-24", br#"{"PublicIP":"300.1.1.1"}"#.to_vec(), "PublicIP"),
        ("10.244.62.0-24", br#"{"PublicIP":"0.0.0.0"}"#.to_vec(), "PublicIP"),
        ("10.244.63.0-24", br#"{"PublicIP":"127.0.0.1"}"#.to_vec(), "PublicIP"),
        ("10.244.64.0-24", br#"{"PublicIP":"224.0.0.1"}"#.to_vec(), "PublicIP"),
        ("10.244.65.0-24", br#"{"PublicIP":"255.255.255.255"}"#.to_vec(), "PublicIP"),
        ("10.244.66.0-24", value([10, 244, 9, 9]).into_bytes(), "inside the overlay"),
        ("10.244.67.0-24", long_address.into_bytes(), "PublicIP"),
        ("10.244.68.0-24", long_backend.into_bytes(), "backend"),
        ("10.244.69.0-24", "{\"PublicIP\":\"\u{9b}2J\u{7f}\"}".into(), "PublicIP"),
    ]
}

/// A record's name as printed, with control characters escaped.
fn shown(name: &str) -> String {
    name.replace('\u{1b}', "\\x1b")
}

fn is_control(character: char) -> bool {
    character.is_control() && character != '\n'
}

fn malformed_records(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let (from, to) = topology.pods();
    // A valid record that becomes malformed keeps its last valid value.
    server.put_record("10.244.80.0-24", value(peer(80)))?;
    wait_for_route(a, "10.244.80.0/24", peer(80))?;
    let bad = malformed();
    without_loss(from, to, || {
        for (name, value, _) in &bad {
            server.put_record(name, value)?;
        }
        server.put_record("10.244.80.0-24", "{\"PublicIP\":\"192.168")?;
        // Unknown keys, as of a later flannel, are no reason to skip a record.
        let unknown =
            r#"{"Zone":{"Rack":[1,null]},"PublicIP":"192.168.77.70","PublicIPv6":null,"BackendData":null}"#;
        server.put_record("10.244.70.0-24", unknown)?;
        wait_for_route(a, "10.244.70.0/24", peer(70))?;
        wait_for_route(b, "10.244.70.0/24", peer(70))?;
        every_size(from, to, OVERLAY_MTU).map(drop)
    })?;
    check_skipped(a, &bad)?;
    let subnets: Vec<String> = a.routes()?.routes.into_iter().map(|route| route.subnet).collect();
    ensure!(subnets == [topology.b.subnet, "10.244.70.0/24", "10.244.80.0/24"], "A routes {subnets:?}");
    ensure!(a.status()?.state == "running", "{}", a.text("status")?);

    // Logged once, even after changes of other records and a new list.
    server.put_record("10.244.70.0-24", value(peer(71)))?;
    wait_for_route(a, "10.244.70.0/24", peer(71))?;
    let fixture = reconnect(fixture)?;
    let log = fixture.a.site().log();
    for (name, _, _) in &bad {
        let message = format!("skipped the record {}: ", shown(name));
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&message)).collect();
        let [line] = lines.as_slice() else {
            anyhow::bail!("{name} was logged {} times: {lines:?}", lines.len())
        };
        ensure!(line.len() < LONGEST_LINE, "{name} has a line of {} bytes in the log", line.len());
    }
    ensure!(!log.contains(is_control), "the log contains control characters");
    fixture.stop().map(drop)
}

/// Every bad record is among those that were skipped, with its reason, and the half-written one too.
fn check_skipped(agent: &Agent, bad: &[(&str, Vec<u8>, &str)]) -> Result<()> {
    let skipped = agent.routes()?.skipped;
    for (name, _, reason) in bad {
        let found = skipped.iter().find(|skipped| skipped.record == shown(name));
        let why = &found.with_context(|| format!("{name} is not among {skipped:?}"))?.why;
        ensure!(why.contains(reason), "{name} was skipped because {why}");
        ensure!(why.len() < LONGEST_LINE, "{name} was skipped for a reason of {} bytes", why.len());
    }
    let half = skipped.iter().find(|skipped| skipped.record == "10.244.80.0-24");
    ensure!(half.is_some_and(|half| half.why.contains("its last good value stays in force")), "{half:?}");
    ensure!(skipped.len() == bad.len() + 1, "others were skipped too: {skipped:?}");
    let table = agent.text("routes")?;
    ensure!(!table.contains(is_control), "the table contains control characters");
    Ok(())
}

/// Interrupts the agents' connection to etcd, so that they list all records again.
fn reconnect(mut fixture: Fixture) -> Result<Fixture> {
    fixture.server.kill();
    wait_until("A reports that etcd is unreachable", || Ok(fixture.a.status()?.state == "degraded"))?;
    fixture.server.restart()?;
    wait_until("A is connected again", || Ok(fixture.a.status()?.state == "running"))?;
    Ok(fixture)
}

fn other_backends(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let vxlan = |number| {
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:0f"}}}}"#,
            peer(number)
        )
    };
    let host_gw = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"host-gw"}}"#, peer(32));
    let udp = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"udp"}}"#, peer(33));
    server.put_record("10.244.31.0-24", vxlan(31))?;
    server.put_record("10.244.32.0-24", host_gw)?;
    server.put_record("10.244.33.0-24", udp)?;
    // Our own address under another subnet: a record that an earlier configuration left.
    server.put_record("10.244.34.0-24", value(topology.a.underlay))?;
    // A peer that becomes one of another backend is none any more.
    server.put_record("10.244.35.0-24", value(peer(35)))?;
    wait_for_route(a, "10.244.35.0/24", peer(35))?;
    server.put_record("10.244.35.0-24", vxlan(35))?;
    for agent in [a, b] {
        wait_until("10.244.35.0/24 is no route", || {
            Ok(agent.routes()?.routes.iter().all(|route| route.subnet != "10.244.35.0/24"))
        })?;
        wait_for_route(agent, "10.244.33.0/24", peer(33))?;
    }

    let (routes, expected) = (
        a.routes()?,
        [
            ("10.244.31.0-24", "\"vxlan\""),
            ("10.244.32.0-24", "\"host-gw\""),
            ("10.244.34.0-24", "our own address 192.168.77.1"),
            ("10.244.35.0-24", "\"vxlan\""),
        ],
    );
    ensure!(routes.skipped.len() == expected.len(), "{:?}", routes.skipped);
    for ((record, reason), skipped) in expected.iter().zip(&routes.skipped) {
        ensure!(skipped.record == *record && skipped.why.contains(reason), "{skipped:?}");
    }
    for (agent, own) in [(a, &topology.a), (b, &topology.b)] {
        let routes = agent.routes()?.routes;
        ensure!(
            routes.iter().all(|route| route.subnet != own.subnet && route.peer != own.underlay),
            "an agent routes to itself: {routes:?}"
        );
    }
    // To B, the record with A's address is a valid one.
    wait_for_route(b, "10.244.34.0/24", topology.a.underlay)?;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    fixture.stop().map(drop)
}

/// The record of a peer is written again and again while the agents run, in the end with the address of B's host.
fn peer_moves(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    server.put_record("10.244.41.0-24", value(peer(41)))?;
    wait_for_route(a, "10.244.41.0/24", peer(41))?;
    let before = a.site().log().len();
    let (from, to) = topology.pods();
    without_loss(from, to, || {
        for number in [42, 43, 43, 44] {
            server.put_record("10.244.41.0-24", value(peer(number)))?;
            wait_for_route(a, "10.244.41.0/24", peer(number))?;
        }
        Ok(())
    })?;
    let log = a.site().log();
    let lines = route_lines(log.get(before..).unwrap_or_default());
    let expected = [42, 43, 44].map(|number| format!("route 10.244.41.0/24 via {}", peer(number)));
    ensure!(lines == expected, "the agent logged {lines:?}");

    // The record now routes packets to B, which does not hold that subnet and drops them.
    ensure!(b.counters()?.wrong_drops().is_empty(), "{:?}", b.counters()?.wrong_drops());
    server.put_record("10.244.41.0-24", value(topology.b.underlay))?;
    wait_for_route(a, "10.244.41.0/24", topology.b.underlay)?;
    let seen = ping(from.netns, Ipv4Addr::new(10, 244, 41, 2), 3)?;
    ensure!(seen.received == 0, "there are answers: {seen:?}");
    ensure!(!b.counters()?.wrong_drops().is_empty(), "nothing arrived at B: {:?}", b.counters()?);
    ping_with_ttl(from.netns, to.address, 60)?;
    fixture.stop().map(drop)
}
