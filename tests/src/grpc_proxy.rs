//! `etcd grpc-proxy` on loopback, in front of one server.

use std::{
    net::{Ipv4Addr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::etcd::free_port;

/// How long a proxy may take to listen.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A proxy; it ends when this is dropped.
#[derive(Debug)]
pub struct GrpcProxy {
    child: Child,
    port: u16,
    _directory: TempDir,
}

impl GrpcProxy {
    /// Starts a proxy for the server at `endpoint`, a URL without TLS.
    pub fn start(endpoint: &str) -> Result<Self> {
        let directory = tempfile::tempdir().context("make a directory for the proxy")?;
        let port = free_port(Ipv4Addr::LOCALHOST)?;
        let address = format!("127.0.0.1:{port}");
        // The kernel ends the proxy with the thread of the test.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd", "grpc-proxy", "start"])
            .args(["--endpoints", endpoint, "--listen-addr", &address, "--advertise-client-url", &address])
            .arg("--data-dir")
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start etcd grpc-proxy: install etcd-server")?;
        let mut proxy = Self { child, port, _directory: directory };
        let deadline = Instant::now() + TIMEOUT;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let ended = proxy.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("etcd grpc-proxy does not listen at {address}");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(proxy)
    }

    /// The URL for clients.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for GrpcProxy {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
