//! HTTP ports of services through agents: requests from a pod to pods of both hosts.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use overlay_tests::{netns::Netns, sandbox::Sandbox};

use crate::{
    machine::Need,
    services::{CONFIG, Scene},
    suite::Suite,
    wait::wait_until,
};

const TIMEOUT: Duration = Duration::from_secs(5);
/// Clients of the load.
const CLIENTS: usize = 6;
/// The port of the endpoints.
const PORT: u16 = 8080;
const HOST: &str = "web.shop.svc.overlay";

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf, Need::CgroupV2];
    suite.add("services_http::requests_take_turns_and_survive_an_endpoint", needs, |sandbox| {
        turns(sandbox, "auto")
    });
    suite.add("services_http::the_proxy_alone_does_the_same", needs, |sandbox| turns(sandbox, "proxy"));
    suite.add("services_http::routes_lead_to_other_services", needs, routes);
    suite.add("services_http::without_a_proxy_connections_are_balanced", needs, without_proxy);
    suite.add("services_http::a_port_in_use_is_balanced_by_connection", needs, port_in_use);
}

/// An HTTP server of a pod. It answers requests with its name, the path and the client that the request names.
struct Server {
    stop: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    fn start(pod: &Netns, address: Ipv4Addr, port: u16, name: &'static str) -> Result<Self> {
        let listener = pod.run(|| TcpListener::bind((address, port)))??;
        listener.set_nonblocking(true)?;
        let (stop, open) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (is_stopped, streams) = (Arc::clone(&stop), Arc::clone(&open));
        let accepting = thread::spawn(move || {
            while !is_stopped.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                };
                if let (Ok(()), Ok(copy)) = (stream.set_nonblocking(false), stream.try_clone()) {
                    streams.lock().unwrap_or_else(PoisonError::into_inner).push(copy);
                    thread::spawn(move || serve(stream, name));
                }
            }
        });
        Ok(Self { stop, open, accepting: Some(accepting) })
    }
}

/// Kills it: it listens no more, and its connections end wherever they are.
impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.accepting.take().map(JoinHandle::join);
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Answers requests without a body until the connection ends.
fn serve(stream: TcpStream, name: &str) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let (begin, headers) = head(&mut stream).ok()?;
        let client = headers.iter().find_map(|line| line.strip_prefix("x-forwarded-for: "));
        let path = begin.split(' ').nth(1)?;
        let body = format!("{name} {path} {}", client.unwrap_or("no client"));
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.get_mut().write_all(answer.as_bytes()).ok()?;
    }
}

/// The first line of a message, and the others in lower case.
fn head(stream: &mut BufReader<TcpStream>) -> Result<(String, Vec<String>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        ensure!(stream.read_line(&mut line)? > 0, "the connection has ended");
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            let mut lines = lines.into_iter();
            let first = lines.next().context("an empty message")?;
            return Ok((first, lines.map(|line: String| line.to_lowercase()).collect()));
        }
        lines.push(line);
    }
}

/// The connection of a client.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(pod: &Netns, vip: Ipv4Addr) -> Result<Self> {
        let address = SocketAddrV4::new(vip, 80);
        let stream = pod
            .run(|| TcpStream::connect_timeout(&address.into(), TIMEOUT))?
            .with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The status and the text of the response.
    fn get(&mut self, path: &str) -> Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes())?;
        let (first, headers) = head(&mut self.0).context("wait for the response")?;
        let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let length = headers.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        let (Some(status), Some(length)) = (status, length) else { bail!("{first}, {headers:?}") };
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status, String::from_utf8(body)?))
    }

    /// The name of the endpoint.
    fn name(&mut self) -> Result<String> {
        let (status, text) = self.get("/")?;
        ensure!(status == 200, "{status}: {text}");
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    }
}

/// Writes a service, and its endpoint at this port of the pod of each host.
fn publish(scene: &Scene, service: &str, record: &str, port: u16) -> Result<()> {
    scene.operate(&["service", "set", record])?;
    for side in [&scene.topology.a, &scene.topology.b] {
        let (address, port) = (side.pod_address.to_string(), format!("web={port}"));
        let line = ["endpoint", "add", service, "--address", &address, "--node", side.name, "--port", &port];
        scene.operate(&line)?;
    }
    Ok(())
}

const WEB: &str = "{name: shop/web, ports: [{name: web, port: 80, app: http}]}";

fn turns(sandbox: &Arc<Sandbox>, lb: &str) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, lb)?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    let _at_a = Server::start(&a.pod, a.pod_address, PORT, "a")?;
    let at_b = Server::start(&b.pod, b.pod_address, PORT, "b")?;
    publish(&scene, "shop/web", WEB, PORT)?;
    let vip = scene.wait_for_name()?;
    wait_until("both endpoints answer", || {
        let Ok(mut client) = Client::connect(&a.pod, vip) else { return Ok(false) };
        let names = [client.name(), client.name()].map(Result::unwrap_or_default);
        Ok(names.contains(&"a".to_owned()) && names.contains(&"b".to_owned()))
    })?;
    let described = scene.services()?;
    ensure!(lb != "auto" || described.contains("the proxy for HTTP"), "{described}");

    // Over one connection, and the endpoints are told the client.
    let mut client = Client::connect(&a.pod, vip)?;
    for _ in 0..10 {
        let names = [client.name()?, client.name()?];
        ensure!(
            names.iter().map(String::as_str).eq(["a", "b"])
                || names.iter().map(String::as_str).eq(["b", "a"]),
            "{names:?}"
        );
    }
    let (_, text) = client.get("/x%20y?z")?;
    ensure!(text.ends_with(&format!(" /x%20y?z {}", a.pod_address)), "{text}");
    Client::connect(&a.host, vip)?.name().context("from the host itself")?;

    // The endpoint on the other host dies under load.
    let end = AtomicBool::new(false);
    let requests = thread::scope(|scope| {
        let load = || {
            let mut client = Client::connect(&a.pod, vip)?;
            let mut requests = 0_usize;
            while !end.load(Ordering::Relaxed) {
                client.name().with_context(|| format!("request {requests}"))?;
                requests += 1;
            }
            Ok(requests)
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(load)).collect();
        thread::sleep(Duration::from_secs(1));
        drop(at_b);
        thread::sleep(Duration::from_secs(1));
        end.store(true, Ordering::Relaxed);
        let ended =
            clients.into_iter().map(|client| client.join().unwrap_or_else(|_| bail!("a client panicked")));
        ended.sum::<Result<usize>>()
    })?;
    println!("{requests} requests of {CLIENTS} clients in 2 s, none failed");
    ensure!(requests > 200, "only {requests} requests");

    scene.operate(&["service", "remove", "shop/web"])?;
    wait_until("the removed service is refused", || Ok(Client::connect(&a.pod, vip).is_err()))?;
    ensure!(client.name().is_err(), "the connection of a client has outlived its service");
    Ok(())
}

fn routes(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "auto")?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    let _servers = [
        Server::start(&a.pod, a.pod_address, PORT, "api-a")?,
        Server::start(&b.pod, b.pod_address, PORT, "api-b")?,
    ];
    let front = "{name: shop/web, ports: [{name: web, port: 80, app: http, routes: [\
        {host: '*.shop.svc.overlay', path_prefix: /api, service: shop/api},\
        {path_prefix: /old, service: shop/old}]}]}";
    scene.operate(&["service", "set", front])?;
    publish(&scene, "shop/api", "{name: shop/api, headless: true, ports: [{name: web, port: 80}]}", PORT)?;
    let shown = scene.operate(&["service", "show", "shop/web"])?;
    ensure!(shown.contains("*.shop.svc.overlay/api -> shop/api"), "{shown}");
    let vip = scene.wait_for_name()?;
    let mut client = None;
    wait_until("both endpoints of the route answer", || {
        client = Client::connect(&a.pod, vip).ok();
        let Some(client) = &mut client else { return Ok(false) };
        let mut names = [client.get("/api/x"), client.get("/api/x")]
            .map(|reply| reply.map(|(_, text)| text).unwrap_or_default());
        names.sort();
        Ok(names.map(|text| text.split(' ').next().unwrap_or_default().to_owned()) == ["api-a", "api-b"])
    })?;
    let mut client = client.context("a client")?;
    let (status, text) = client.get("/apix")?;
    ensure!(status == 404 && text.contains("no route"), "{status}: {text}");
    let (status, text) = client.get("/old")?;
    ensure!(status == 503 && text.contains("shop/old, which is missing"), "{status}: {text}");
    wait_until("the status names the missing service", || {
        Ok(scene.problems()?.contains("route 2 leads to shop/old, which is missing"))
    })
}

fn connections_take_turns(pod: &Netns, vip: Ipv4Addr) -> Result<()> {
    wait_until("connections take turns", || {
        let ask = || Client::connect(pod, vip).and_then(|mut client| client.name()).unwrap_or_default();
        let mut names = [ask(), ask()];
        names.sort();
        Ok(names == ["a", "b"])
    })
}

/// A process of the host keeps the proxy from the port.
fn port_in_use(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "auto")?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    let foreign = Server::start(&a.host, Ipv4Addr::UNSPECIFIED, 80, "foreign")?;
    let _servers =
        [Server::start(&a.pod, a.pod_address, PORT, "a")?, Server::start(&b.pod, b.pod_address, PORT, "b")?];
    publish(&scene, "shop/web", WEB, PORT)?;
    let vip = scene.wait_for_name()?;
    connections_take_turns(&a.pod, vip)?;
    wait_until("the status names the port", || {
        Ok(scene.problems()?.contains("another process of this host"))
    })?;
    drop(foreign);
    wait_until("requests of one connection take turns", || {
        let Ok(mut client) = Client::connect(&a.pod, vip) else { return Ok(false) };
        let names = [client.name(), client.name()].map(Result::unwrap_or_default);
        Ok(names.contains(&"a".to_owned()) && names.contains(&"b".to_owned()))
    })
}

fn without_proxy(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "ebpf")?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    let _servers =
        [Server::start(&a.pod, a.pod_address, PORT, "a")?, Server::start(&b.pod, b.pod_address, PORT, "b")?];
    let routes = "{name: shop/web, ports: [{name: web, port: 80, app: http, routes: [{path_prefix: /x, service: shop/x}]}]}";
    publish(&scene, "shop/web", WEB, PORT)?;
    let vip = scene.wait_for_name()?;
    connections_take_turns(&a.pod, vip)?;
    let mut client = Client::connect(&a.pod, vip)?;
    let name = client.name()?;
    for _ in 0..4 {
        ensure!(client.name()? == name, "a connection has changed its endpoint");
    }
    let described = scene.services()?;
    ensure!(described.contains("HTTP ports are balanced by connection"), "{described}");
    ensure!(!scene.problems()?.contains("services"), "{}", scene.problems()?);
    scene.operate(&["service", "set", routes])?;
    wait_until("the status says that no proxy follows the routes", || {
        Ok(scene.problems()?.contains("its routes need the proxy"))
    })
}
