//! Where the tests play: a network namespace with endpoints on its loopback device, and a cgroup that this process is in.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use overlay_agent::{
    datapath::ebpf::ServiceSet,
    service::{Catalog, front::Rules},
    store::{Kind, Record, Version},
};
use overlay_tests::{cgroup::Cgroup, netns::Netns, sandbox::Sandbox};

/// The virtual address of most tests.
pub(super) const VIP: Ipv4Addr = Ipv4Addr::new(10, 251, 0, 1);
/// The port of the endpoints.
pub(super) const TARGET: u16 = 8080;
/// How long a call may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);

/// A namespace, a cgroup, and the programs attached to it.
pub(super) struct Stage {
    pub(super) set: ServiceSet,
    pub(super) netns: Arc<Netns>,
    // Behind the programs, which are detached first.
    _cgroup: Cgroup,
}

impl Stage {
    /// Loads and attaches the programs.
    pub(super) fn new(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let netns = Netns::create(sandbox, "lb")?;
        let cgroup = Cgroup::enter()?;
        let mut set = load()?;
        set.attach(Some(cgroup.path()))?;
        Ok(Self { set, netns, _cgroup: cgroup })
    }

    /// Balances the services of a catalog.
    pub(super) fn reconcile(&mut self, catalog: &Catalog) -> Result<usize> {
        self.set.reconcile(catalog, &Rules::default())
    }

    /// Starts endpoints with these numbers.
    pub(super) fn endpoints(&self, numbers: impl IntoIterator<Item = u8>) -> Result<Vec<Endpoint>> {
        numbers.into_iter().map(|number| Endpoint::start(&self.netns, number)).collect()
    }
}

/// The programs, not attached.
pub(super) fn load() -> Result<ServiceSet> {
    let object = env::var("OVERLAY_EBPF_OBJECT")
        .context("OVERLAY_EBPF_OBJECT names the eBPF object: run the tests with `cargo xtask test`")?;
    let object = Path::new(&object).with_file_name("service-ebpf");
    ServiceSet::load(&fs::read(&object).with_context(|| format!("read {}", object.display()))?)
}

/// A server on an address of its own. It answers TCP and UDP with its number and what it got.
pub(super) struct Endpoint {
    pub(super) address: SocketAddrV4,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Endpoint {
    /// Starts it in a namespace.
    pub(super) fn start(netns: &Netns, number: u8) -> Result<Self> {
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, number), TARGET);
        // An address that an earlier endpoint had is there already.
        netns.tool(&format!("ip address replace {}/32 dev lo", address.ip()))?;
        let (listener, socket) = netns
            .run(|| Ok::<_, anyhow::Error>((TcpListener::bind(address)?, UdpSocket::bind(address)?)))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let is_stopped = Arc::clone(&stop);
        let tcp = thread::spawn(move || {
            while !is_stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(thread::spawn(move || serve(stream, number))),
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        let is_stopped = Arc::clone(&stop);
        let udp = thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !is_stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let answer = [&[number], buffer.get(..length).unwrap_or_default()].concat();
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { address, stop, threads: vec![tcp, udp] })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Answers requests until the client closes.
fn serve(mut stream: TcpStream, number: u8) {
    let mut buffer = [0; 2048];
    let _ = stream.set_nonblocking(false);
    while let Ok(length) = stream.read(&mut buffer) {
        let Some(got) = buffer.get(..length).filter(|got| !got.is_empty()) else { return };
        if stream.write_all(&[&[number], got].concat()).is_err() {
            return;
        }
    }
}

/// Sends a request over a connection, checks the answer, and returns the number of the endpoint.
pub(super) fn ask(stream: &mut TcpStream) -> Result<u8> {
    let question: [u8; 32] = rand::random();
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&question)?;
    let mut answer = [0; 33];
    stream.read_exact(&mut answer).context("wait for the answer")?;
    ensure!(answer[1..] == question, "the answer is not to the question");
    Ok(answer[0])
}

/// Connects, asks, and returns the number of the endpoint. Checks that the peer is what was connected to.
pub(super) fn connect_and_ask(address: impl Into<SocketAddr>) -> Result<u8> {
    let address = address.into();
    let mut stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    let peer = stream.peer_addr()?;
    ensure!(peer == address, "the peer of a connection to {address} is {peer}");
    ask(&mut stream)
}

fn records<K: Kind>(records: &[(String, String)]) -> Vec<Record<K>> {
    let parse = |(key, value): &(String, String)| Record::parse(key, value.as_bytes(), Version::default());
    records.iter().map(parse).collect()
}

/// A catalog in the making.
#[derive(Clone, Default)]
pub(super) struct Book {
    services: Vec<(String, String)>,
    vips: Vec<(String, String)>,
    endpoints: Vec<(String, String)>,
}

impl Book {
    /// Adds the service `name` at `vip`, with TCP port 80, UDP port 53, and more keys of its record.
    pub(super) fn service(mut self, name: &str, vip: Ipv4Addr, keys: &str) -> Self {
        let ports = format!(
            r#"[{{"name":"web","port":80,"protocol":"tcp","target_port":{TARGET}}},
                {{"name":"dns","port":53,"protocol":"udp","target_port":{TARGET}}}]"#
        );
        self.services.push((format!("test/{name}"), format!(r#"{{"v":1,"ports":{ports}{keys}}}"#)));
        self.vips.push((vip.to_string(), format!("test/{name}")));
        self
    }

    /// Adds endpoints with these numbers, and more keys of their records.
    pub(super) fn endpoints(mut self, name: &str, numbers: impl IntoIterator<Item = u8>, keys: &str) -> Self {
        for number in numbers {
            let key = format!("test/{name}/node/e{number}");
            self.endpoints.push((key, format!(r#"{{"overlay_ip":"10.244.1.{number}"{keys}}}"#)));
        }
        self
    }

    /// The catalog. Fails when a record is not usable.
    pub(super) fn catalog(&self) -> Result<Catalog> {
        let catalog = Catalog::new(
            &records(&self.services),
            &records(&self.vips),
            &records(&self.endpoints),
            &Catalog::default(),
        );
        ensure!(catalog.skipped.is_empty(), "{:?}", catalog.skipped);
        Ok(catalog)
    }
}
