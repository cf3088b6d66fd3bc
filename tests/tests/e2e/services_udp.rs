//! Connections of UDP sockets end with their endpoint, in the network namespace of a container.

use std::{net::UdpSocket, sync::Arc};

use anyhow::{Result, ensure};
use nix::libc;
use overlay_tests::sandbox::Sandbox;

use super::{CONFIG, Scene, resolve};
use crate::wait::wait_until;

pub(super) fn end_with_endpoint(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "ebpf")?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    scene.operate(&[
        "service",
        "set",
        r#"{"name":"shop/dns","ports":[{"name":"dns","port":53,"protocol":"udp"}]}"#,
    ])?;
    let address = b.pod_address.to_string();
    for port in ["5301", "5302"] {
        let arguments =
            ["--address", &address, "--node", "b", "--id", port, "--port", &format!("dns={port}")];
        scene.operate(&[&["endpoint", "add", "shop/dns"], &arguments[..]].concat())?;
    }
    let mut vip = None;
    wait_until("the service has an address and both endpoints", || {
        vip = a.pod.run(|| resolve("dns.shop.svc.overlay"))??;
        let traffic = scene.agent.site().output("service top", &["--once", "-o", "json"])?;
        let is_known = |port: &str| traffic.contains(&format!("{address}:{port}"));
        Ok(vip.is_some() && is_known("5301") && is_known("5302"))
    })?;
    let vip = vip.unwrap_or(b.pod_address);
    let connect = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((vip, 53)).map(|()| socket)
    };
    let sockets = a.pod.run(|| [connect(), connect()])?;
    let [first, second] = sockets;
    let sockets = [first?, second?];
    let ended = || sockets.iter().filter(|socket| socket.peer_addr().is_err()).count();
    ensure!(ended() == 0, "a connection has ended too early");

    // They took turns, so one of them is at the endpoint that leaves.
    scene.operate(&["endpoint", "remove", "shop/dns/b/5301"])?;
    wait_until("the connection to the removed endpoint has ended", || Ok(ended() > 0))?;
    ensure!(ended() == 1, "the connection to the other endpoint has ended, too");
    for socket in &sockets {
        if socket.peer_addr().is_err() {
            let error = socket.take_error()?.and_then(|error| error.raw_os_error());
            ensure!(error == Some(libc::ECONNABORTED), "{error:?}");
            socket.connect((vip, 53))?;
        }
    }
    ensure!(ended() == 0, "the socket does not connect again");
    ensure!(scene.problems()?.is_empty(), "{}", scene.problems()?);
    Ok(())
}
