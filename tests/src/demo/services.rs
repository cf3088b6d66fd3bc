//! The demo's part on services: a container calls one by its name, and containers of both hosts answer.

use std::{
    env, fs,
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::{Agent, Rung, Site, binary},
    cgroup::Cgroup,
    demo::Options,
    netns::Netns,
    pair::Store,
    progress::Progress,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Side, Topology, UPLINK},
};

/// The name in the lines of progress.
const NAME: &str = "services";
/// What the client asks for.
const URL: &str = "http://web.shop.svc.overlay/";
/// The DNS server of the node, at the end of the default pool.
const DNS: Ipv4Addr = Ipv4Addr::new(10, 251, 255, 254);
/// The second container of host A.
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);
/// Requests while both containers answer.
const REQUESTS: usize = 20;
/// Requests while one is drained and killed.
const UNDER_LOAD: usize = 2000;
/// Limit for what has to come about.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs this part and returns its output for the end of the demo.
pub(super) fn run(sandbox: &Arc<Sandbox>, options: &Options, progress: &Progress) -> Result<String> {
    // Without cgroup v2 there are no eBPF programs for sockets: the proxy serves the client then.
    let cgroup = Cgroup::create("demo").ok();
    let topology = Topology::build(sandbox, options.underlay, PodOffload::On)?;
    let (a, b) = (&topology.a, &topology.b);
    let neighbour = neighbour(sandbox, a).context("build a second container on host A")?;
    let store = Store::create(sandbox)?;
    store.write("config", r#"{"Network":"10.244.0.0/16","Services":{}}"#)?;
    let (lb, way) = if cgroup.is_some() { ("auto", "eBPF") } else { ("proxy", "the proxy") };
    let mut flags = vec!["--lb".to_owned(), lb.to_owned()];
    flags.extend(cgroup.iter().map(|cgroup| format!("--service-cgroup={}", cgroup.path().display())));
    let agents = [start(sandbox, a, &store, &flags)?, start(sandbox, b, &store, &["--lb=off".to_owned()])?];
    for agent in &agents {
        agent.wait_for_routes("a route to the other host", |routes| routes.routes.len() == 1)?;
    }

    let mut near = Web::start(&neighbour, NEIGHBOUR, "host-a")?;
    let _far = Web::start(&b.pod, b.pod_address, "host-b")?;
    let operator = Operator(store.directory().to_owned());
    operator.run(&["service", "set", r#"{"name":"shop/web","ports":[{"name":"http","port":80}]}"#])?;
    let far_address = b.pod_address.to_string();
    for (node, address) in [("host-a", &NEIGHBOUR.to_string()), ("host-b", &far_address)] {
        operator.run(&["endpoint", "add", "shop/web", "--address", address, "--node", node, "--id", "1"])?;
    }
    progress.step(NAME, "shop/web with a container on each host", &format!("curl {URL} by {way}"));

    let mut client = Client::new(sandbox, &a.pod, cgroup.as_ref())?;
    let answers = client.await_both()?;
    let turns = answers.windows(2).filter(|pair| matches!(pair, [a, b] if a != b)).count();
    ensure!(turns == answers.len() - 1, "the containers did not answer in turn: {answers:?}");
    progress.step(NAME, &format!("{} requests", answers.len()), "host-a and host-b in turn");

    let load = client.start(UNDER_LOAD)?;
    operator.run(&["endpoint", "drain", "shop/web/host-a/1"])?;
    // What the operator of a container does: wait until it has no clients, then end it.
    near.await_quiet()?;
    near.kill()?;
    let answers = load.finish()?;
    let (first, last) = (count(&answers, "host-a"), count(&answers, "host-b"));
    ensure!(first + last == UNDER_LOAD, "{} of {UNDER_LOAD} requests were answered", first + last);
    ensure!(first > 0 && last > first, "host-a answered {first} requests, host-b {last}: it was no load");
    let answered = format!("{UNDER_LOAD} of {UNDER_LOAD} requests answered");
    progress.step(NAME, "one container drained and killed under load", &answered);
    drop(client);
    let [first, second] = agents;
    first.stop()?;
    second.stop()?;
    Ok(format!(
        "A service by its name: curl in a container of host A asked the node's DNS server for {URL} and was balanced by {way};\n\
         containers of host A and host B answered in turn. One of the two was drained (`overlay-agent endpoint drain`) and then killed\n\
         under load: {answered}."
    ))
}

fn count(answers: &[String], name: &str) -> usize {
    answers.iter().filter(|answer| *answer == name).count()
}

fn start(sandbox: &Sandbox, side: &Side, store: &Store, flags: &[String]) -> Result<Agent> {
    let site = Site::new(sandbox, &side.host, &format!("services-{}", side.name))?;
    let mut arguments = store.arguments(side, Rung::Tc);
    arguments.extend_from_slice(flags);
    site.start(&arguments)
}

/// A second container on a host, with a link of its own.
fn neighbour(sandbox: &Arc<Sandbox>, side: &Side) -> Result<Arc<Netns>> {
    let pod = Netns::create(sandbox, "neighbour")?;
    let host = &side.host;
    host.tool(&format!("ip link add veth1 type veth peer name {UPLINK} netns {}", pod.name()))?;
    host.tool(&format!("ip link set veth1 mtu {OVERLAY_MTU} up"))?;
    host.tool(&format!("ip route add {NEIGHBOUR}/32 dev veth1"))?;
    // The first container looks for the second one on its own link.
    host.tool("sysctl -q -w net.ipv4.conf.all.proxy_arp=1")?;
    pod.tool(&format!("ip address add {NEIGHBOUR}/32 dev {UPLINK}"))?;
    pod.tool(&format!("ip link set {UPLINK} mtu {OVERLAY_MTU} up"))?;
    pod.tool(&format!("ip route add default via 10.244.1.1 dev {UPLINK} onlink"))?;
    Ok(pod)
}

/// Commands on the store.
struct Operator(PathBuf);

impl Operator {
    fn run(&self, words: &[&str]) -> Result<()> {
        let store = format!("dir:{}", self.0.display());
        let output = Command::new(binary()?).args(words).args(["--store", &store]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "overlay-agent {}: {}", words.join(" "), error.trim());
        Ok(())
    }
}

/// A process that answers HTTP requests in a container.
struct Web {
    child: Child,
    netns: Arc<Netns>,
}

impl Web {
    fn start(pod: &Arc<Netns>, address: Ipv4Addr, name: &str) -> Result<Self> {
        let mut command = Command::new(env::current_exe().context("find this program")?);
        command.args(["--serve", &format!("{address}:80"), "--serve-name", name]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let web = Self { child: pod.spawn(&mut command)?, netns: Arc::clone(pod) };
        await_that("the server listens", || Ok(pod.tool("ss -Hltn sport = :80")?.contains(":80")))?;
        Ok(web)
    }

    /// Waits until no connection is left, and none comes for a while.
    fn await_quiet(&self) -> Result<()> {
        let mut quiet = 0;
        await_that("the drained container has no connections", || {
            // `Recv-Q` of the listener has connections that are not accepted yet.
            let open = self.netns.tool("ss -Htn state established sport = :80")?;
            let waiting = self.netns.tool("ss -Hltn sport = :80")?;
            let is_quiet = open.trim().is_empty() && waiting.split_whitespace().nth(1) == Some("0");
            quiet = if is_quiet { quiet + 1 } else { 0 };
            Ok(quiet >= 5)
        })
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill the server")?;
        self.child.wait().context("wait for the killed server")?;
        Ok(())
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.kill();
    }
}

/// curl in a container, with a resolv.conf of its own.
struct Client<'a> {
    pod: &'a Netns,
    cgroup: Option<&'a Cgroup>,
    resolv_conf: PathBuf,
}

impl<'a> Client<'a> {
    fn new(sandbox: &Sandbox, pod: &'a Netns, cgroup: Option<&'a Cgroup>) -> Result<Self> {
        let resolv_conf = sandbox.new_directory("client")?.join("resolv.conf");
        let text = format!("nameserver {DNS}\nsearch svc.overlay overlay\noptions ndots:2\n");
        fs::write(&resolv_conf, text).with_context(|| format!("write {}", resolv_conf.display()))?;
        Ok(Self { pod, cgroup, resolv_conf })
    }

    /// Starts curl with so many requests, each over a connection of its own.
    fn start(&mut self, requests: usize) -> Result<Load> {
        let mut command = Command::new("unshare");
        // In a mount namespace, the file is there for this process alone, and nothing is left of it.
        let script = r#"mount --bind "$1" /etc/resolv.conf && exec curl --silent --show-error --fail --max-time 10 "$2""#;
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
        command.arg(&self.resolv_conf).arg(format!("{URL}[1-{requests}]"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(cgroup) = self.cgroup {
            cgroup.join()?;
        }
        let child = self.pod.spawn(&mut command);
        if let Some(cgroup) = self.cgroup {
            cgroup.leave()?;
        }
        Ok(Load { child: child?, requests })
    }

    /// Waits until both containers answer, and returns who answered [`REQUESTS`] requests.
    fn await_both(&mut self) -> Result<Vec<String>> {
        let mut answers = Vec::new();
        await_that("both containers answer", || {
            // Fails while the name has no address, or the service no endpoint.
            answers = self.start(REQUESTS)?.finish().unwrap_or_default();
            Ok(count(&answers, "host-a") > 0 && count(&answers, "host-b") > 0)
        })?;
        self.start(REQUESTS)?.finish()
    }
}

/// A running curl.
struct Load {
    child: Child,
    requests: usize,
}

impl Load {
    /// Who answered, in order. Fails when a request was not answered.
    fn finish(self) -> Result<Vec<String>> {
        let output = self.child.wait_with_output().context("wait for curl")?;
        let answers: Vec<String> =
            String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && answers.len() == self.requests,
            "curl {URL}: {} of {} requests were answered, {}: {}",
            answers.len(),
            self.requests,
            output.status,
            error.lines().next().unwrap_or_default()
        );
        Ok(answers)
    }
}

fn await_that(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what}: not within {} seconds", TIMEOUT.as_secs());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Serves one of the containers, if the demo has started this process for it.
pub(super) fn serve(options: &Options) -> Result<bool> {
    let Some(address) = options.serve else { return Ok(false) };
    super::web::serve(address, &options.serve_name)?;
    Ok(true)
}
