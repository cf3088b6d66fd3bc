//! etcd with authentication: the agent logs in, its password appears in no output, and its health follows its rights.

use std::{fs, process::Command, sync::Arc};

use anyhow::{Context, Result, ensure};
use etcd_client::{Permission, PermissionType};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    switch::{HUB, Switch},
    topology::NETWORK,
};

use super::{
    arguments, config,
    health::{HEALTHZ, get},
    key,
    server::{PREFIX, Server},
    wait_until,
};
use crate::{machine::Need, suite::Suite};

const USER: &str = "flannel";
const PASSWORD: &str = "correct-horse-battery";
const WRONG: &str = "wrong-horse-battery";

pub(super) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("etcd::the_password_appears_in_no_output", tun, password_is_shown_nowhere);
    suite.add("etcd::rights_that_change_under_an_agent_show_in_its_health", tun, changing_rights);
}

/// Enables authentication: root, and a user for the agents with rights on their prefix only.
fn enable_users(server: &mut Server) -> Result<()> {
    server.ask(async |client| {
        // Repeated when etcd does not answer in time: what exists already is no error.
        let _ = client.role_add("root").await;
        let _ = client.user_add("root", "root-secret", None).await;
        client.user_grant_role("root", "root").await?;
        let _ = client.role_add("overlay").await;
        let all = Permission::new(PermissionType::Readwrite, format!("{PREFIX}/")).with_prefix();
        client.role_grant_permission("overlay", all).await?;
        let _ = client.user_add(USER, PASSWORD, None).await;
        client.user_grant_role(USER, "overlay").await?;
        client.auth_enable().await
    })?;
    server.log_in("root", "root-secret");
    Ok(())
}

/// The agent on a site, with the password in flanneld's environment variable.
fn command(site: &Site, server: &Server, password: &str) -> Command {
    let mut command = site.run_command(&arguments(server, Rung::Tun));
    command.env("FLANNELD_ETCD_USERNAME", USER).env("FLANNELD_ETCD_PASSWORD", password);
    command
}

/// Searches all output of a running agent for the password.
fn shows_no_password(agent: &Agent, in_command_line: bool) -> Result<()> {
    let status = agent.text("status")?;
    let json = agent.site().output("status", &["-o", "json"])?;
    let mut places = vec![
        ("log", agent.site().log()),
        ("status", status),
        ("status -o json", json),
        ("routes", agent.text("routes")?),
        ("counters", agent.text("counters")?),
    ];
    if !in_command_line {
        let path = format!("/proc/{}/cmdline", agent.pid());
        let line = fs::read(&path).with_context(|| format!("read {path}"))?;
        places.push(("command line", String::from_utf8_lossy(&line).into_owned()));
    }
    for (place, text) in places {
        ensure!(!text.is_empty(), "the {place} is empty");
        let line = text.lines().find(|line| line.contains(PASSWORD));
        ensure!(line.is_none(), "the password is in the {place}: {line:?}");
    }
    Ok(())
}

fn changing_rights(sandbox: &Arc<Sandbox>) -> Result<()> {
    let switch = Switch::build(sandbox, 1)?;
    let host = switch.hosts.first().context("no host")?;
    let mut server = Server::start(sandbox, &switch.hub, HUB)?;
    server.write_config(&config(NETWORK))?;
    enable_users(&mut server)?;
    let site = Site::new(sandbox, &host.netns, "agent")?;
    let mut with_health = arguments(&server, Rung::Tun);
    with_health.extend(["--healthz-ip=127.0.0.1".to_owned(), format!("--healthz-port={HEALTHZ}")]);
    let mut command = site.run_command(&with_health);
    command.env("FLANNELD_ETCD_USERNAME", USER).env("FLANNELD_ETCD_PASSWORD", PASSWORD);
    let mut agent = site.launch(command)?;
    agent.wait_until_running()?;
    let subnet = key(&agent.status()?.subnet);
    let healthz = |code: u16, words: &str| {
        wait_until(&format!("/healthz answers {code} with `{words}`"), || {
            let (found, text) = get(&host.netns, "/healthz")?;
            Ok(found == code && text.contains(words))
        })
        .with_context(|| format!("it answers {:?}", get(&host.netns, "/healthz")))
    };
    let is_back = |server: &Server| {
        wait_until("the agent has written its record again", || Ok(server.record(&subnet)?.is_some()))?;
        healthz(200, "ok")
    };

    // Without its role, the agent can neither read nor write. What it still sees is that peers have lost it.
    server.ask(async |client| client.user_revoke_role(USER, "overlay").await)?;
    server.remove_record(&subnet)?;
    healthz(503, "peers have no route to it")?;
    wait_until("status agrees", || Ok(agent.status()?.state == "unhealthy"))?;
    server.ask(async |client| client.user_grant_role(USER, "overlay").await)?;
    is_back(&server)?;

    // So it is with another password.
    server.ask(async |client| client.user_change_password(USER, "another").await)?;
    server.remove_record(&subnet)?;
    healthz(503, "--etcd-password")?;
    server.ask(async |client| client.user_change_password(USER, PASSWORD).await)?;
    is_back(&server)?;

    // Without authentication, a user name does no harm.
    server.ask(async |client| client.auth_disable().await)?;
    server.log_out();
    server.remove_record(&subnet)?;
    is_back(&server)?;
    server.ask(async |client| client.auth_enable().await)?;
    server.log_in("root", "root-secret");
    server.remove_record(&subnet)?;
    is_back(&server)?;
    agent.stop()
}

fn password_is_shown_nowhere(sandbox: &Arc<Sandbox>) -> Result<()> {
    let switch = Switch::build(sandbox, 1)?;
    let host = switch.hosts.first().context("no host")?;
    let mut server = Server::start(sandbox, &switch.hub, HUB)?;
    server.write_config(&config(NETWORK))?;
    enable_users(&mut server)?;
    let site = Site::new(sandbox, &host.netns, "agent")?;

    // In the environment, with the most verbose log of the agent and its libraries.
    let mut with_trace = command(&site, &server, PASSWORD);
    with_trace.env("RUST_LOG", "trace");
    let mut agent = site.launch(with_trace)?;
    agent.wait_until_running()?;
    ensure!(site.log().contains(" TRACE "), "the log has no traces");
    // Long enough to lose the connection and to log in again.
    server.kill();
    wait_until("the agent reports that etcd is unreachable", || Ok(agent.status()?.state == "degraded"))?;
    server.restart()?;
    wait_until("the agent is logged in again", || Ok(agent.status()?.state == "running"))?;
    shows_no_password(&agent, false)?;
    agent.stop()?;
    ensure!(!site.log().contains(PASSWORD), "the password is in the log of the agent's end");

    // On the command line, where only the process list contains it.
    let mut flags = arguments(&server, Rung::Tun);
    flags.extend(["-etcd-username".to_owned(), USER.to_owned(), format!("-etcd-password={PASSWORD}")]);
    let mut with_flag = site.run_command(&flags);
    with_flag.env("RUST_LOG", "trace");
    let mut agent = site.launch(with_flag)?;
    agent.wait_until_running()?;
    shows_no_password(&agent, true)?;
    agent.stop()?;

    // A wrong password is an immediate error: waiting would not help.
    let mut with_trace = command(&site, &server, WRONG);
    with_trace.env("RUST_LOG", "trace");
    for refused in [with_trace, command(&site, &server, WRONG)] {
        let error = site.refused(refused)?;
        ensure!(error.contains("etcd refuses") && error.contains("--etcd-password"), "{error}");
        ensure!(!site.log().contains(WRONG), "the wrong password is in the log:\n{}", site.log_tail());
    }
    let lines = site.log().lines().count();
    ensure!(lines == 1, "{lines} lines of errors, not one:\n{}", site.log_tail());

    // So is a missing password.
    let error = site.refused(site.run_command(&arguments(&server, Rung::Tun)))?;
    ensure!(error.contains("etcd refuses") && error.contains("--etcd-username"), "{error}");
    Ok(())
}
