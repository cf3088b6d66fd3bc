//! Other DNS servers, with the same records.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::client::Queries;
use crate::{netns::Netns, sandbox::Sandbox};

/// How long a server may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A name with its address.
pub(super) type Record = (String, Ipv4Addr);

/// A server that runs until it is dropped.
pub(super) struct Peer {
    kind: Kind,
    child: Child,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dnsmasq,
    Unbound,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Dnsmasq, Self::Unbound];

    const fn name(self) -> &'static str {
        match self {
            Self::Dnsmasq => "dnsmasq",
            Self::Unbound => "unbound",
        }
    }

    const fn address(self) -> Ipv4Addr {
        match self {
            Self::Dnsmasq => Ipv4Addr::new(10, 99, 0, 53),
            Self::Unbound => Ipv4Addr::new(10, 99, 0, 54),
        }
    }

    /// The path of the program, which is not in every user's `PATH`.
    fn program(self) -> Option<PathBuf> {
        let directories = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/sbin", "/bin"];
        directories
            .into_iter()
            .map(|directory| Path::new(directory).join(self.name()))
            .find(|path| path.exists())
    }

    /// Nothing but the records: no upstream servers, no files of the host, no threads beyond one, no log of queries.
    fn config(self, records: &[Record]) -> String {
        let address = self.address();
        match self {
            Self::Dnsmasq => {
                let fixed = format!(
                    "port=53\nlisten-address={address}\nbind-interfaces\nno-resolv\nno-hosts\nno-poll\nuser=root\npid-file=\n\
                     cache-size=10000\nlocal=/svc.overlay/\n"
                );
                let record = |(name, vip): &Record| format!("host-record={name},{vip}\n");
                fixed + &records.iter().map(record).collect::<String>()
            }
            Self::Unbound => {
                let fixed = format!(
                    "server:\n  interface: {address}\n  port: 53\n  do-daemonize: no\n  chroot: \"\"\n  username: \"\"\n  \
                     pidfile: \"\"\n  directory: \"/\"\n  use-syslog: no\n  verbosity: 0\n  num-threads: 1\n  \
                     access-control: 0.0.0.0/0 allow\n  module-config: \"iterator\"\n  local-zone: \"svc.overlay.\" static\n"
                );
                let record = |(name, vip): &Record| format!("  local-data: \"{name}. 30 IN A {vip}\"\n");
                fixed
                    + &records.iter().map(record).collect::<String>()
                    + "remote-control:\n  control-enable: no\n"
            }
        }
    }

    fn command(self, program: &Path, config: &Path) -> Command {
        let mut command = Command::new(program);
        match self {
            Self::Dnsmasq => {
                command.arg("--keep-in-foreground").arg(format!("--conf-file={}", config.display()))
            }
            Self::Unbound => command.arg("-d").arg("-c").arg(config),
        };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }
}

impl Peer {
    /// Starts each server that is installed, on `host`. Fails when there is none.
    pub(super) fn start_all(sandbox: &Sandbox, host: &Arc<Netns>, records: &[Record]) -> Result<Vec<Self>> {
        let mut peers = Vec::new();
        for kind in Kind::ALL {
            if let Some(program) = kind.program() {
                peers.push(
                    Self::start(sandbox, host, kind, &program, records)
                        .with_context(|| format!("start {}", kind.name()))?,
                );
            }
        }
        ensure!(
            !peers.is_empty(),
            "there is neither dnsmasq nor unbound: `cargo xtask setup` installs dnsmasq"
        );
        Ok(peers)
    }

    fn start(
        sandbox: &Sandbox,
        host: &Arc<Netns>,
        kind: Kind,
        program: &Path,
        records: &[Record],
    ) -> Result<Self> {
        host.tool(&format!("ip address replace {}/32 dev lo", kind.address()))?;
        let config = sandbox.new_directory(kind.name())?.join("config");
        fs::write(&config, kind.config(records)).with_context(|| format!("write {}", config.display()))?;
        let child = host.spawn(&mut kind.command(program, &config))?;
        let mut peer = Self { kind, child };
        let socket = host.run(|| UdpSocket::bind("0.0.0.0:0"))??;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        socket.connect((kind.address(), 53))?;
        let deadline = Instant::now() + TIMEOUT;
        let queries = Queries::new(records);
        loop {
            match queries.ask_first(&socket) {
                Ok(()) => return Ok(peer),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
            if let Some(status) = peer.child.try_wait()? {
                bail!("it ended with {status}: run `{} --conf-file={}`", program.display(), config.display());
            }
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.kind.name()
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        self.kind.address()
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
