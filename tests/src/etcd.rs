//! One etcd server on loopback: started on free ports with a directory of its own, paused, killed, restarted, wiped.

use std::{
    fs::File,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);
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

/// A server and its data. Both are gone when this is dropped.
#[derive(Debug)]
pub struct Etcd {
    directory: TempDir,
    tls: Option<ServerTls>,
    client_port: u16,
    /// Where clients find the server when it is not somewhere else for a while.
    known_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a server that speaks plain HTTP.
    ///
    /// # Errors
    ///
    /// When etcd is not installed or does not come to listen.
    pub fn start() -> Result<Self> {
        Self::start_with(None)
    }

    /// Starts a server.
    ///
    /// # Errors
    ///
    /// When etcd is not installed or does not come to listen.
    pub fn start_with(tls: Option<ServerTls>) -> Result<Self> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let port = free_port()?;
            let mut etcd = Self {
                directory: tempfile::tempdir().context("make a directory for etcd")?,
                tls: tls.clone(),
                client_port: port,
                known_port: port,
                peer_port: free_port()?,
                child: None,
            };
            match etcd.restart() {
                Ok(()) => return Ok(etcd),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("etcd was not started")))
    }

    /// The URL for clients.
    pub fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme(), self.client_port)
    }

    /// Starts the server again, with the data that it had.
    ///
    /// # Errors
    ///
    /// When it does not come to listen.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        let log = self.directory.path().join("log");
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let client = self.endpoint();
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        // The server goes when the thread of the test goes, however that ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "etcd", "--name", "one", "--logger", "zap"])
            .args(["--data-dir".as_ref(), self.data().as_os_str()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")]);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(&tls.cert).arg("--key-file").arg(&tls.key);
            if let Some(ca) = &tls.client_ca {
                command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            }
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("start etcd: install etcd-server")?;
        let child = self.child.insert(child);
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.client_port)).is_err() {
            let ended = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("etcd does not listen: {}", last_line(&log));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts the server again where only [`Self::endpoint`] knows it, so that its clients still miss it.
    ///
    /// # Errors
    ///
    /// When it does not come to listen.
    pub fn restart_elsewhere(&mut self) -> Result<()> {
        self.client_port = free_port()?;
        self.restart()
    }

    /// Starts the server again where it was before [`Self::restart_elsewhere`].
    ///
    /// # Errors
    ///
    /// When it does not come to listen.
    pub fn restart_back(&mut self) -> Result<()> {
        self.client_port = self.known_port;
        self.restart()
    }

    /// Ends the server at once; its data stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only when it is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Ends the server and throws its data away.
    ///
    /// # Errors
    ///
    /// When the data cannot be removed.
    pub fn wipe(&mut self) -> Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.data()).context("remove etcd's data")
    }

    /// Stops the server where it is: connections stay and nothing is answered.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets a paused server go on.
    ///
    /// # Errors
    ///
    /// When it does not run.
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
        self.directory.path().join("data")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("look for a free port")?;
    Ok(listener.local_addr()?.port())
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().last().unwrap_or("it said nothing").to_owned()
}
