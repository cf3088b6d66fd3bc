//! `overlay-agent service top`: the numbers are those of the connections that were made.
#![allow(clippy::indexing_slicing, reason = "a test fails by panicking; a value without a name is null")]

use std::{
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::sandbox::Sandbox;
use serde_json::Value;

use super::{CONFIG, Scene, Servers};
use crate::wait::wait_until;

/// At the last one, no server listens.
const PORTS: [u16; 3] = [8081, 8082, 8083];
const CONNECTIONS: u64 = 12;

/// One document of the command.
fn read(scene: &Scene, arguments: &[&str]) -> Result<Value> {
    let arguments = [&["--once", "-o", "json"], arguments].concat();
    Ok(serde_json::from_str(&scene.agent.site().output("service top", &arguments)?)?)
}

fn number(value: &Value, name: &str) -> Result<u64> {
    value.get(name).and_then(Value::as_u64).with_context(|| format!("no number {name} in {value}"))
}

/// The only service.
fn service(document: &Value) -> Result<&Value> {
    document.pointer("/services/0").with_context(|| format!("no service in {document}"))
}

/// The endpoint at a port.
fn endpoint(document: &Value, port: u16) -> Result<&Value> {
    let suffix = format!(":{port}");
    let endpoints = service(document)?.get("endpoints").and_then(Value::as_array).context("no endpoints")?;
    let is_it =
        |endpoint: &&Value| endpoint["address"].as_str().is_some_and(|address| address.ends_with(&suffix));
    endpoints.iter().find(is_it).with_context(|| format!("no endpoint {port} in {document}"))
}

/// By how much numbers of a service, or of the endpoint at a port, are larger than before.
fn growth<const N: usize>(
    before: &Value,
    after: &Value,
    port: Option<u16>,
    names: [&str; N],
) -> Result<[u64; N]> {
    let place = |document| match port {
        Some(port) => endpoint(document, port),
        None => service(document),
    };
    let (before, after) = (place(before)?, place(after)?);
    let mut growth = [0; N];
    for (growth, name) in growth.iter_mut().zip(names) {
        *growth = number(after, name)? - number(before, name)?;
    }
    Ok(growth)
}

/// Makes the connections, and returns the documents before and after.
fn connect(scene: &Scene, vip: Ipv4Addr) -> Result<(Value, Value, usize)> {
    wait_until("the agent knows all endpoints", || {
        let document = read(scene, &[])?;
        Ok(PORTS.iter().all(|port| endpoint(&document, *port).is_ok()))
    })?;
    let before = read(scene, &[])?;
    let answered = (0..CONNECTIONS).filter(|_| scene.ask(&scene.topology.a.pod, vip).is_ok()).count();
    // A connection that has ended is closed a moment later.
    let mut after = Value::Null;
    wait_until("no connection is open", || {
        after = read(scene, &[])?;
        Ok(number(service(&after)?, "open")? == 0)
    })?;
    Ok((before, after, answered))
}

pub(super) fn by_ebpf(sandbox: &Arc<Sandbox>) -> Result<()> {
    const NAMES: [&str; 4] = ["picks", "connections", "failures", "refused"];
    let scene = Scene::start(sandbox, CONFIG, "ebpf")?;
    let b = &scene.topology.b;
    let _servers = Servers::start(&b.pod, b.pod_address, &PORTS[..2])?;
    scene.publish(&PORTS)?;
    let vip = scene.wait_for_name()?;
    let (before, after, answered) = connect(&scene, vip)?;
    ensure!(answered == 8, "{answered} connections of 12 were answered");
    let of_service = growth(&before, &after, None, NAMES)?;
    ensure!(of_service == [12, 8, 4, 0], "{of_service:?}");
    for (port, expected) in PORTS.into_iter().zip([[4, 4, 0, 0], [4, 4, 0, 0], [4, 0, 4, 0]]) {
        let of_endpoint = growth(&before, &after, Some(port), NAMES)?;
        ensure!(of_endpoint == expected, "{port}: {of_endpoint:?}");
    }
    let latency = after.pointer("/services/0/latency/p99_us").and_then(Value::as_f64);
    ensure!(latency.is_some_and(|time| time > 0.0 && time < 5e6), "{latency:?}");
    ensure!(number(&after["dns"], "queries")? > 0, "{after}");
    ensure!(after["uncounted"].is_null(), "{after}");

    // Without endpoints, calls are refused, and the filter and the limit hold.
    for port in PORTS {
        scene.operate(&["endpoint", "remove", &format!("shop/web/b/p{port}")])?;
    }
    wait_until("connections are refused", || {
        let _ = scene.ask(&scene.topology.a.pod, vip);
        Ok(number(service(&read(&scene, &["shop/web"])?)?, "refused")? > 0)
    })?;
    let limited = read(&scene, &["-n", "1", "bank"])?;
    ensure!(limited["services"].as_array().is_some_and(Vec::is_empty), "{limited}");
    let text = scene.agent.site().output("service top", &["--once"])?;
    ensure!(text.contains(&format!("shop/web ({vip})")) && text.contains("queries/s"), "{text}");

    // A line for each interval, until the reader closes the pipe.
    let mut child = scene.agent.site().stream("service top", &["-o", "json"])?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    for _ in 0..2 {
        let line: Value = serde_json::from_str(&lines.next().context("the output ended")??)?;
        ensure!(service(&line).is_ok(), "{line}");
    }
    drop(lines);
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

pub(super) fn by_proxy(sandbox: &Arc<Sandbox>) -> Result<()> {
    const NAMES: [&str; 4] = ["connections", "failures", "bytes_to_endpoints", "bytes_to_clients"];
    let scene = Scene::start(sandbox, CONFIG, "proxy")?;
    let b = &scene.topology.b;
    let _servers = Servers::start(&b.pod, b.pod_address, &PORTS[..2])?;
    scene.publish(&PORTS)?;
    let vip = scene.wait_for_name()?;
    let (before, after, answered) = connect(&scene, vip)?;
    // The proxy goes on to another endpoint, so that every client is served.
    ensure!(answered as u64 == CONNECTIONS, "{answered} connections of {CONNECTIONS} were answered");
    let of_service = growth(&before, &after, None, NAMES)?;
    ensure!(of_service == [12, 0, 12 * 32, 12 * 38], "{of_service:?}");
    let mut served = 0;
    for port in PORTS {
        let [connections, failures, to_endpoint, to_client] = growth(&before, &after, Some(port), NAMES)?;
        let expected = if port == 8083 { 4 } else { 0 };
        ensure!(failures == expected, "{port}: {failures} failures");
        ensure!((to_endpoint, to_client) == (connections * 32, connections * 38), "{port}: {connections}");
        ensure!(port != 8083 || connections == 0, "{connections} connections where no server listens");
        served += connections;
    }
    ensure!(served == CONNECTIONS, "{served} connections");
    let latency = after.pointer("/services/0/latency/p50_us").and_then(Value::as_f64);
    ensure!(latency.is_some_and(|time| time > 0.0 && time < 2e6), "{latency:?}");
    Ok(())
}
