//! One etcd server, on loopback or in a host's namespace: started, paused, killed, restarted, wiped.

use std::{
    collections::BTreeSet,
    fs::File,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::{netns::Netns, sandbox::Sandbox};

/// How long a server may take to listen.
const TIMEOUT: Duration = Duration::from_secs(20);
/// What a server logs when it listens, with and without TLS.
const SERVING: &str = "serving client traffic";
/// Another process may take a port between its choice and its use.
const ATTEMPTS: usize = 5;

/// Files that make a server speak TLS.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// The server's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The CA of clients, if they must show a certificate.
    pub client_ca: Option<PathBuf>,
}

/// Location of a server and its data.
#[derive(Debug)]
enum Home {
    /// On the machine's own loopback.
    Loopback(TempDir),
    /// In a host's namespace, at this address.
    Host { netns: Arc<Netns>, address: Ipv4Addr, directory: PathBuf },
}

impl Home {
    fn address(&self) -> Ipv4Addr {
        match self {
            Self::Loopback(_) => Ipv4Addr::LOCALHOST,
            Self::Host { address, .. } => *address,
        }
    }

    fn directory(&self) -> &Path {
        match self {
            Self::Loopback(directory) => directory.path(),
            Self::Host { directory, .. } => directory,
        }
    }

    /// Runs `work` in the server's namespace.
    fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match self {
            Self::Loopback(_) => work(),
            Self::Host { netns, .. } => netns.run(work)?,
        }
    }

    fn spawn(&self, arguments: &[String], log: File) -> Result<Child> {
        let spawn = |command: &mut Command| {
            let output = log.try_clone().context("share etcd's log")?;
            command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(log);
            match self {
                Self::Loopback(_) => command.spawn().context("start etcd: install etcd-server"),
                Self::Host { netns, .. } => netns.spawn(command),
            }
        };
        match self {
            // The kernel ends the server with the thread of the test.
            Self::Loopback(_) => spawn(Command::new("setpriv").args(["--pdeathsig", "KILL", "etcd"])),
            // Not here: the thread that starts it ends immediately. The sandbox ends processes in its namespaces.
            Self::Host { .. } => spawn(&mut Command::new("etcd")),
        }
    }
}

/// A server and its data. Both are gone when this is dropped, or with its sandbox.
#[derive(Debug)]
pub struct Etcd {
    home: Home,
    tls: Option<ServerTls>,
    client_port: u16,
    /// The port before [`Self::restart_elsewhere`].
    known_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a server that speaks plain HTTP.
    pub fn start() -> Result<Self> {
        Self::start_with(None)
    }

    /// Starts a server.
    pub fn start_with(tls: Option<ServerTls>) -> Result<Self> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port(Ipv4Addr::LOCALHOST)?;
            let mut etcd = Self {
                home: Home::Loopback(tempfile::tempdir().context("make a directory for etcd")?),
                tls: tls.clone(),
                client_port: port,
                known_port: port,
                peer_port: free_port(Ipv4Addr::LOCALHOST)?,
                child: None,
            };
            match etcd.restart() {
                Ok(()) => return Ok(etcd),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("etcd was not started")))
    }

    /// A server at `address` in a host's namespace, on etcd's own ports. [`Self::restart`] starts it.
    pub fn prepare(sandbox: &Sandbox, netns: &Arc<Netns>, address: Ipv4Addr) -> Result<Self> {
        let directory = sandbox.new_directory("etcd")?;
        Ok(Self {
            home: Home::Host { netns: Arc::clone(netns), address, directory },
            tls: None,
            client_port: 2379,
            known_port: 2379,
            peer_port: 2380,
            child: None,
        })
    }

    /// The URL for clients.
    pub fn endpoint(&self) -> String {
        format!("{}://{}:{}", self.scheme(), self.home.address(), self.client_port)
    }

    /// Starts the server again, with the data that it had.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        let log = self.home.directory().join("log");
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = self.child.insert(self.home.spawn(&self.arguments(), output)?);
        let deadline = Instant::now() + TIMEOUT;
        // Not a connection: another process may have taken the port, and this one is about to end.
        while !std::fs::read_to_string(&log).unwrap_or_default().contains(SERVING) {
            let ended = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("etcd does not listen: {}", last_line(&log));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn arguments(&self) -> Vec<String> {
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let (data, cluster) = (self.data().display().to_string(), format!("one={peer}"));
        let words = ["--name", "one", "--logger", "zap", "--data-dir", &data];
        let clients = ["--listen-client-urls", &client, "--advertise-client-urls", &client];
        let peers = ["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer];
        let all = [&words[..], &clients[..], &peers[..], &["--initial-cluster", &cluster]].concat();
        let mut arguments: Vec<String> = all.into_iter().map(str::to_owned).collect();
        let mut file = |flag: &str, path: &Path| {
            arguments.extend([flag.to_owned(), path.display().to_string()]);
        };
        if let Some(tls) = &self.tls {
            file("--cert-file", &tls.cert);
            file("--key-file", &tls.key);
            if let Some(ca) = &tls.client_ca {
                file("--trusted-ca-file", ca);
                arguments.push("--client-cert-auth".to_owned());
            }
        }
        arguments
    }

    /// Starts the server on another port, which only [`Self::endpoint`] knows, so that it stays unreachable for its clients.
    pub fn restart_elsewhere(&mut self) -> Result<()> {
        let address = self.home.address();
        self.client_port = self.home.run(|| free_port(address))?;
        self.restart()
    }

    /// Starts the server on its port from before [`Self::restart_elsewhere`].
    pub fn restart_back(&mut self) -> Result<()> {
        self.client_port = self.known_port;
        self.restart()
    }

    /// Kills the server; its data stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only when it is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Kills the server and deletes its data.
    pub fn wipe(&mut self) -> Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.data()).context("remove etcd's data")
    }

    /// Pauses the server: connections stay open, requests are not answered.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Resumes a paused server.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("etcd does not run")?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        kill(pid, signal).with_context(|| format!("send {signal} to etcd"))
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    fn data(&self) -> PathBuf {
        self.home.directory().join("data")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that nothing uses, and that no other server of this process was given: it is not bound yet when the next asks.
pub(crate) fn free_port(address: Ipv4Addr) -> Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = TcpListener::bind((address, 0)).context("look for a free port")?;
        let port = listener.local_addr()?.port();
        if GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port) {
            return Ok(port);
        }
    }
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("no output").to_owned()
}
