//! Walks through the network namespaces of the host, and ends connections of UDP sockets in each.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    libc::{AF_INET, AF_INET6, MSG_DONTWAIT},
    sched::{CloneFlags, setns},
};
use overlay_ebpf::service::translation::Translation;
use rtnetlink::sys::{Socket as Netlink, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use rustix::thread::{CapabilitySet, capabilities};

use super::{
    kept::Kept,
    message::{self, Answer, Socket},
};
use crate::datapath::ebpf::UdpSockets;

/// The longest time of a walk.
const LIMIT: Duration = Duration::from_secs(10);
/// Most passes through the sockets of a namespace: what changes while the kernel lists them may hide one.
const PASSES: usize = 4;
/// Bytes that are received at once: the kernel fills no more than this.
const LONGEST: usize = 32 << 10;
/// Where `ip netns` keeps namespaces that need no process.
const NAMED: &str = "/run/netns";

/// What a walk has done.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Sockets whose connection it ended.
    pub(super) destroyed: usize,
    /// Network namespaces in which it looked.
    pub(super) namespaces: usize,
    /// What did not work, each once.
    problems: BTreeSet<String>,
}

impl Report {
    /// Why connections stay that should not.
    pub(super) fn problem(&self) -> Option<String> {
        let problems: Vec<_> = self.problems.iter().map(String::as_str).collect();
        let what = "UDP sockets may stay connected to endpoints that are gone";
        (!problems.is_empty()).then(|| format!("{what}: {}", problems.join("; ")))
    }
}

/// Ends the connections that `kept` lacks. Must run in a thread that ends afterwards: it is in another network namespace then.
pub(super) fn run(sockets: &UdpSockets, kept: &Kept) -> Report {
    let mut report = Report::default();
    let end = Instant::now() + LIMIT;
    let mut seen = BTreeSet::new();
    // That of this thread, which needs no permission to enter it.
    match File::open("/proc/thread-self/ns/net").and_then(|own| own.metadata()) {
        Ok(own) => drop(seen.insert((own.dev(), own.ino()))),
        Err(error) => drop(report.problems.insert(format!("identify the network namespace: {error}"))),
    }
    look(sockets, kept, &mut report);
    let may_trace = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_PTRACE));
    for path in paths() {
        if Instant::now() >= end {
            let limit = LIMIT.as_secs();
            report.problems.insert(format!("some network namespaces were not searched within {limit} s"));
            break;
        }
        // Opened first, so that no other takes its place before it is entered.
        let namespace = match File::open(&path) {
            Ok(namespace) => namespace,
            Err(error) if is_gone(&error) => continue,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                // With it, the kernel refuses only processes that have more capabilities than the agent: those of the host itself.
                if !may_trace {
                    let needs = "looking for the network namespaces of other processes needs CAP_SYS_PTRACE";
                    report.problems.insert(needs.to_owned());
                }
                continue;
            }
            Err(error) => {
                report.problems.insert(format!("open a network namespace: {error}"));
                continue;
            }
        };
        let Ok(metadata) = namespace.metadata() else { continue };
        if !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        match setns(&namespace, CloneFlags::CLONE_NEWNET) {
            Ok(()) => look(sockets, kept, &mut report),
            Err(Errno::EPERM) => {
                report.problems.insert(
                    "entering the network namespaces of containers needs CAP_SYS_ADMIN: grant it to the agent".to_owned(),
                );
            }
            // No network namespace.
            Err(Errno::EINVAL) => {}
            Err(error) => drop(report.problems.insert(format!("enter a network namespace: {error}"))),
        }
    }
    report
}

/// Whether the process has ended meanwhile.
fn is_gone(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

/// The network namespaces of all processes, and those with a name. Most are there more than once.
fn paths() -> impl Iterator<Item = PathBuf> {
    let is_process = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.bytes().all(|byte| byte.is_ascii_digit())
    };
    let entries =
        |directory: &str| fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = entries("/proc").filter(move |path| is_process(path)).map(|path| path.join("ns/net"));
    processes.chain(entries(NAMED))
}

/// Ends connections in the present namespace of the thread.
fn look(sockets: &UdpSockets, kept: &Kept, report: &mut Report) {
    report.namespaces += 1;
    let ended = Diag::open().and_then(|mut diag| diag.end(sockets, kept, &mut report.destroyed));
    if let Err(error) = ended {
        report.problems.insert(format!("{error:#}"));
    }
}

/// A socket for messages about sockets.
struct Diag {
    netlink: Netlink,
    sequence: u32,
}

impl Diag {
    fn open() -> Result<Self> {
        let open = || {
            let mut netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
            netlink.bind(&SocketAddr::new(0, 0)).map(|()| netlink)
        };
        Ok(Self { netlink: open().context("open a netlink socket for sockets")?, sequence: 0 })
    }

    fn end(&mut self, sockets: &UdpSockets, kept: &Kept, destroyed: &mut usize) -> Result<()> {
        for _ in 0..PASSES {
            let mut lost = Vec::new();
            for family in [AF_INET, AF_INET6] {
                for socket in self.connected(family)? {
                    if is_lost(&socket, sockets.connection(socket.cookie())?, kept) {
                        lost.push(socket);
                    }
                }
            }
            let before = *destroyed;
            for socket in lost {
                *destroyed += usize::from(self.destroy(&socket)?);
            }
            if *destroyed == before {
                break;
            }
        }
        Ok(())
    }

    /// All connected UDP sockets of a family.
    fn connected(&mut self, family: i32) -> Result<Vec<Socket>> {
        let mut found = Vec::new();
        let request = |sequence| message::describe_all(family, sequence);
        match self.ask(request, |socket| found.push(socket))? {
            None => Ok(found),
            // IPv6 can be missing altogether.
            Some(Errno::ENOENT) if family == AF_INET6 => Ok(found),
            Some(Errno::ENOENT) => {
                bail!("the kernel lists no UDP sockets: it needs CONFIG_INET_UDP_DIAG (modprobe udp_diag)")
            }
            Some(error) => Err(error).context("list UDP sockets"),
        }
    }

    /// Ends the connection of a socket; `false` when it has ended already.
    fn destroy(&mut self, socket: &Socket) -> Result<bool> {
        match self.ask(|sequence| message::destroy(socket, sequence), |_| {})? {
            None => Ok(true),
            // Closed, connected elsewhere, or another socket has its addresses.
            Some(Errno::ENOENT | Errno::ESTALE) => Ok(false),
            Some(Errno::EOPNOTSUPP) => {
                bail!("the kernel cannot end connections: it needs CONFIG_INET_DIAG_DESTROY")
            }
            Some(Errno::EPERM) => {
                bail!("ending connections needs CAP_NET_ADMIN in the network namespace of the socket")
            }
            Some(error) => Err(error).context("end the connection of a UDP socket"),
        }
    }

    /// Sends a request, hands on the sockets of the answers, and returns the error of the kernel, if there is one.
    fn ask(
        &mut self,
        request: impl FnOnce(u32) -> Vec<u8>,
        mut each: impl FnMut(Socket),
    ) -> Result<Option<Errno>> {
        self.sequence += 1;
        self.netlink.send(&request(self.sequence), 0).context("ask for sockets")?;
        loop {
            let mut received = Vec::with_capacity(LONGEST);
            // The kernel answers while it takes the request, and goes on whenever an answer is read: nothing is waited for.
            match self.netlink.recv(&mut received, MSG_DONTWAIT) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                length => length.context("read about sockets")?,
            };
            for answer in message::answers(&received, self.sequence) {
                match answer {
                    Answer::Socket(socket) => each(socket),
                    Answer::Done => return Ok(None),
                    Answer::Error(error) => return Ok(Some(error)),
                }
            }
        }
    }
}

/// Whether the programs connected a socket to an endpoint that is gone. One that connected to the endpoint itself is not theirs.
fn is_lost(socket: &Socket, connection: Option<Translation>, kept: &Kept) -> bool {
    connection.is_some_and(|Translation { from, to, .. }| socket.peer == Some(to) && !kept.has(from, to))
}
