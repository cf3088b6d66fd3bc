//! The part of systemd that keeps descriptors of a service, by its protocol: sd_notify(3), sd_listen_fds(3).

use std::{
    io::{ErrorKind, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixDatagram,
    },
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{FcntlArg, fcntl},
    unistd::close,
};
use overlay_tests::{
    agent::{Agent, Site},
    sandbox::Sandbox,
};
use rustix::{
    cmsg_space,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};

/// Descriptors with smaller numbers may be the shell's.
const FIRST: RawFd = 300;
/// The first number that a service is passed (SD_LISTEN_FDS_START).
const START: usize = 3;

/// What a service has stored, by name.
type Kept = Vec<(String, OwnedFd)>;

/// A notification socket that stores descriptors.
#[derive(Debug)]
pub(crate) struct FdStore {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: UnixDatagram,
    kept: Mutex<Kept>,
    stop: AtomicBool,
}

impl FdStore {
    pub(crate) fn start(sandbox: &Sandbox) -> Result<Self> {
        let path = sandbox.new_directory("systemd")?.join("notify");
        let socket = UnixDatagram::bind(&path).context("listen as systemd does")?;
        socket.set_nonblocking(true)?;
        let shared = Arc::new(Shared { socket, kept: Mutex::default(), stop: AtomicBool::new(false) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    if let Err(error) = shared.receive() {
                        eprintln!("error: {error:#}");
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Ok(Self { path, shared, thread: Some(thread) })
    }

    /// Names of what is stored.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<_> = self.shared.receive()?.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        Ok(names)
    }

    /// Adds a descriptor, as if an earlier run had stored it.
    pub(crate) fn add(&self, name: &str, fd: impl Into<OwnedFd>) -> Result<()> {
        self.shared.receive()?.push((name.to_owned(), fd.into()));
        Ok(())
    }

    /// Starts an agent with what is stored, and waits until it runs. What it is passed stays stored until it says otherwise.
    pub(crate) fn start_agent(&self, site: &Arc<Site>, arguments: &[String]) -> Result<Agent> {
        let agent = site.run_command(arguments);
        let (mut passed, mut names, mut script) = (Vec::new(), Vec::new(), "exec".to_owned());
        for (number, (name, fd)) in self.shared.receive()?.iter().enumerate() {
            // Without FD_CLOEXEC.
            let raw = fcntl(fd, FcntlArg::F_DUPFD(FIRST)).context("pass a descriptor")?;
            script.push_str(&format!(" {}<&{raw} {raw}<&-", START + number));
            passed.push(raw);
            names.push(name.clone());
        }
        let mut command = Command::new("bash");
        command.arg("-c").arg(format!("{script}; LISTEN_PID=$$ exec \"$@\"")).arg("bash");
        command.arg(agent.get_program()).args(agent.get_args());
        command.env_remove("RUST_LOG").env("NOTIFY_SOCKET", &self.path).env_remove("WATCHDOG_USEC");
        command.env("LISTEN_FDS", passed.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let agent = site.launch(command);
        for raw in passed {
            close(raw).context("close a descriptor that was passed")?;
        }
        let mut agent = agent?;
        agent.wait_until_running()?;
        Ok(agent)
    }
}

impl Drop for FdStore {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Does what the waiting messages say.
    fn receive(&self) -> Result<MutexGuard<'_, Kept>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let length = match recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => message.bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(kept),
                Err(error) => return Err(error).context("receive a notification"),
            };
            let mut descriptors = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    descriptors.extend(received);
                }
            }
            let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
            let name = name.unwrap_or("stored").to_owned();
            if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                kept.retain(|(other, _)| *other != name);
            } else if text.lines().any(|line| line == "FDSTORE=1") {
                kept.extend(descriptors.into_iter().map(|fd| (name.clone(), fd)));
            } else if !descriptors.is_empty() {
                bail!("descriptors without FDSTORE=1: {text}");
            }
        }
    }
}
