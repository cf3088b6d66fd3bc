//! Runs one agent in a host's namespace: start, query, stop, kill.

use std::{
    env, fs,
    fs::File,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::de::DeserializeOwned;

use crate::{
    netns::Netns,
    report::{Counters, Routes, State, Status},
    sandbox::Sandbox,
};

/// Name of the overlay device unless a test asks for another.
pub const DEVICE: &str = "ovl0";
/// How long an agent may take to start or to end.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long an agent may take to refuse: it waits for the claim of another host with its address to expire.
const REFUSAL: Duration = Duration::from_secs(40);
/// Lines of the log in an error.
const TAIL: usize = 25;

/// A datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rung {
    /// XDP on the underlay, tc on the overlay device.
    Xdp,
    /// tc on both devices.
    Tc,
    /// The tun device and a UDP socket.
    Tun,
}

impl Rung {
    /// Name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Tun => "tun",
        }
    }

    /// Whether eBPF programs carry the packets.
    pub const fn is_fast(self) -> bool {
        match self {
            Self::Xdp | Self::Tc => true,
            Self::Tun => false,
        }
    }
}

/// Path of the agent's binary: `OVERLAY_AGENT`, or the release build of this workspace.
pub fn binary() -> Result<PathBuf> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/overlay-agent");
    let path = env::var_os("OVERLAY_AGENT").map_or_else(built, PathBuf::from);
    path.canonicalize().with_context(|| {
        format!(
            "find the agent at {}: build it with `cargo xtask build`, or name it in OVERLAY_AGENT",
            path.display()
        )
    })
}

/// Path of an agent whose maps have another version and layout: `OVERLAY_NEXT_AGENT`, or that build of this workspace. Its eBPF object is
/// beside it.
pub fn next_binary() -> Result<PathBuf> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/next-abi/overlay-agent");
    let path = env::var_os("OVERLAY_NEXT_AGENT").map_or_else(built, PathBuf::from);
    path.canonicalize().with_context(|| {
        let path = path.display();
        format!(
            "find the agent with other maps at {path}: build it with `cargo xtask build --next-abi`, or name it in \
             OVERLAY_NEXT_AGENT"
        )
    })
}

/// A place to run agents: a namespace, a run directory, a log.
#[derive(Debug)]
pub struct Site {
    netns: Arc<Netns>,
    binary: PathBuf,
    directory: PathBuf,
    device: String,
}

impl Site {
    /// A site with new directories.
    pub fn new(sandbox: &Sandbox, netns: &Arc<Netns>, role: &str) -> Result<Arc<Self>> {
        Self::of_device(sandbox, netns, role, DEVICE)
    }

    /// A site whose agent creates the overlay device `device`, for several agents in one namespace.
    pub fn of_device(sandbox: &Sandbox, netns: &Arc<Netns>, role: &str, device: &str) -> Result<Arc<Self>> {
        let directory = sandbox.new_directory(role)?;
        let (netns, device) = (Arc::clone(netns), device.to_owned());
        Ok(Arc::new(Self { netns, binary: binary()?, directory, device }))
    }

    /// The same place with another agent's binary.
    pub fn with_binary(&self, binary: PathBuf) -> Arc<Self> {
        let (netns, directory) = (Arc::clone(&self.netns), self.directory.clone());
        Arc::new(Self { netns, binary, directory, device: self.device.clone() })
    }

    /// The agent's run directory, where its control socket is.
    pub fn run_directory(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// The agent's state directory, which survives a reboot.
    pub fn state_directory(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The agent's snapshot.
    pub fn snapshot_file(&self) -> PathBuf {
        self.state_directory().join(format!("{}.snapshot", self.device))
    }

    /// Path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_directory().join(format!("{}.sock", self.device))
    }

    /// The command line that enters the namespace.
    pub fn enter_command(&self) -> String {
        format!("nsenter --net=/run/netns/{}", self.netns.name())
    }

    /// The agent's binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The namespace.
    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// The agent's subnet.env.
    pub fn subnet_file(&self) -> PathBuf {
        self.directory.join("subnet.env")
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The agent's `run` with the files of this site and `arguments`.
    pub fn run_command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("run").arg("--run-dir").arg(self.run_directory()).args(["--device", &self.device]);
        command.arg("--state-dir").arg(self.state_directory());
        command.arg("--subnet-file").arg(self.subnet_file()).args(arguments);
        // Tests of what stays name it.
        if !arguments.iter().any(|argument| argument == "--on-exit") {
            command.args(["--on-exit", "remove"]);
        }
        // Tests match the default log.
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Starts an agent and waits until it runs.
    ///
    /// # Errors
    ///
    /// When it ends or is not running within 20 seconds, with the end of its log.
    pub fn start(self: &Arc<Self>, arguments: &[String]) -> Result<Agent> {
        let mut agent = self.launch(self.run_command(arguments))?;
        agent.wait_until_running()?;
        Ok(agent)
    }

    /// Starts an agent and does not wait for it.
    pub fn launch(self: &Arc<Self>, command: Command) -> Result<Agent> {
        let child = self.spawn(command)?;
        Ok(Agent { site: Arc::clone(self), child, ended: false })
    }

    fn spawn(&self, mut command: Command) -> Result<Child> {
        let path = self.log_file();
        // An agent that runs here goes on to write to its own.
        let _ = fs::remove_file(&path);
        let log = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        // In its own process group: on Ctrl-C, the test runner stops the agents in order.
        command.process_group(0).stdout(log.try_clone().context("share the log file")?).stderr(log);
        self.netns.spawn(&mut command)
    }

    /// Runs an agent that should refuse to start.
    ///
    /// # Errors
    ///
    /// When it starts, ends with another exit code than 1, or does not print one line with the reason.
    pub fn refused(&self, command: Command) -> Result<String> {
        let mut child = self.spawn(command)?;
        let Some(status) = wait(&mut child, REFUSAL)? else {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
            if wait(&mut child, TIMEOUT)?.is_none() {
                child.kill().context("kill an agent that does not end")?;
            }
            bail!("the agent started instead of refusing; the end of its log:\n{}", self.log_tail());
        };
        let log = self.log();
        let errors: Vec<&str> = log.lines().filter(|line| line.starts_with("error:")).collect();
        let [error] = errors.as_slice() else {
            bail!("{} lines of the agent's output start with `error:`, not one:\n{log}", errors.len());
        };
        ensure!(
            status.code() == Some(1),
            "the agent refused with `{error}` and ended with {status}, not with 1"
        );
        Ok((*error).to_owned())
    }

    /// Removes what an agent left in this namespace.
    pub fn down(&self) -> Result<()> {
        self.run("down", &[]).map(drop)
    }

    /// The output of `overlay-agent SUBCOMMAND` with `arguments`, for the agent here.
    pub fn output(&self, subcommand: &str, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.run(subcommand, arguments)?).into_owned())
    }

    /// Starts `overlay-agent status --watch -o json` for the agent here.
    pub fn watch_status(&self) -> Result<Child> {
        self.stream("status", &["--watch", "-o", "json"])
    }

    /// Starts `overlay-agent SUBCOMMAND` with `arguments`, for the agent here, with a pipe for its output.
    pub fn stream(&self, subcommand: &str, arguments: &[&str]) -> Result<Child> {
        let mut command = self.subcommand(subcommand);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.netns.spawn(&mut command)
    }

    fn subcommand(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(subcommand.split(' '))
            .arg("--run-dir")
            .arg(self.run_directory())
            .args(["--device", &self.device]);
        command
    }

    /// Runs `overlay-agent SUBCOMMAND` with `arguments`, for the agent here, however it ends.
    pub fn try_run(&self, subcommand: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = self.subcommand(subcommand);
        command.args(arguments);
        self.netns.output(&mut command)
    }

    fn run(&self, subcommand: &str, arguments: &[&str]) -> Result<Vec<u8>> {
        let output = self.try_run(subcommand, arguments)?;
        if !output.status.success() {
            bail!(
                "`overlay-agent {subcommand}` in {}: {}: {}",
                self.netns.name(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(output.stdout)
    }

    /// The log of the last agent here.
    pub fn log(&self) -> String {
        fs::read(self.log_file())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of the agent's log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
        format!("    {}", tail.join("\n    "))
    }
}

/// A running agent. Dropped, it is killed and `overlay-agent down` removes what it left.
#[derive(Debug)]
pub struct Agent {
    site: Arc<Site>,
    child: Child,
    ended: bool,
}

impl Agent {
    /// Its site.
    pub fn site(&self) -> &Arc<Site> {
        &self.site
    }

    /// State and problems, which a starting agent reports, too.
    pub fn state(&self) -> Result<State> {
        self.report("status")
    }

    /// The status of an agent that has started.
    pub fn status(&self) -> Result<Status> {
        self.report("status")
    }

    /// Its routes.
    pub fn routes(&self) -> Result<Routes> {
        self.report("routes")
    }

    /// Its counters.
    pub fn counters(&self) -> Result<Counters> {
        self.report("counters")
    }

    /// The text output of `overlay-agent SUBCOMMAND`.
    pub fn text(&self, subcommand: &str) -> Result<String> {
        self.site.output(subcommand, &[])
    }

    fn report<T: DeserializeOwned>(&self, subcommand: &str) -> Result<T> {
        let bytes = self.site.run(subcommand, &["-o", "json"])?;
        serde_json::from_slice(&bytes).with_context(|| {
            format!("parse the output of `overlay-agent {subcommand}`: {}", String::from_utf8_lossy(&bytes))
        })
    }

    /// Waits until the agent's routes fulfil `expected`.
    ///
    /// # Errors
    ///
    /// When they do not within 20 seconds.
    pub fn wait_for_routes(&self, what: &str, expected: impl Fn(&Routes) -> bool) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let routes = self.routes()?;
            if expected(&routes) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{what}: not within 20 seconds, the agent has {routes:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("read the state of an agent")?.is_none())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Pauses the process with SIGSTOP.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Resumes a paused process.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)
            .with_context(|| format!("send {signal} to an agent"))
    }

    /// Sends SIGTERM and checks that the agent ends with success.
    ///
    /// # Errors
    ///
    /// When it does not end within 20 seconds or with another exit code than 0, with the end of its log.
    pub fn stop(self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        self.wait_for_end()
    }

    /// Checks that the agent ends with success by itself.
    ///
    /// # Errors
    ///
    /// As [`Agent::stop`].
    pub fn wait_for_end(mut self) -> Result<()> {
        let Some(status) = wait(&mut self.child, TIMEOUT)? else {
            bail!("an agent does not end; the end of the last log:\n{}", self.site.log_tail());
        };
        self.ended = true;
        ensure!(
            status.success(),
            "an agent ended with {status}; the end of the last log:\n{}",
            self.site.log_tail()
        );
        Ok(())
    }

    /// Kills the agent, like a crash, without cleaning up.
    pub fn crash(mut self) -> Result<Arc<Site>> {
        self.child.kill().context("kill an agent")?;
        self.child.wait().context("wait for a killed agent")?;
        self.ended = true;
        Ok(Arc::clone(&self.site))
    }

    /// Leaves the agent running after this process.
    pub fn leave(mut self) {
        self.ended = true;
    }

    /// Waits until the agent runs.
    ///
    /// # Errors
    ///
    /// When it ends or is not running within 20 seconds, with the end of its log.
    pub fn wait_until_running(&mut self) -> Result<()> {
        self.run_up().map_err(|error| {
            let (netns, log) = (self.site.netns.name(), self.site.log_tail());
            anyhow::anyhow!("start an agent in {netns}: {error:#}; the end of its log:\n{log}")
        })
    }

    /// Waits until the agent runs in the place of another one, which answers until then.
    ///
    /// # Errors
    ///
    /// As [`Agent::wait_until_running`].
    pub fn wait_until_taken_over(&mut self) -> Result<()> {
        let (deadline, pid) = (Instant::now() + TIMEOUT, self.pid());
        while self.state().map_or(true, |state| state.pid != pid) {
            if !self.is_running()? || Instant::now() > deadline {
                bail!("an agent does not take over; the end of its log:\n{}", self.site.log_tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.wait_until_running()
    }

    fn run_up(&mut self) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().context("read the state of an agent")? {
                self.ended = true;
                bail!("it ended with {status}");
            }
            match self.state() {
                Ok(status) if status.state == "running" || status.lacks_only_nft() => return Ok(()),
                Ok(_) | Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
                Ok(status) => bail!("it is still {} after {TIMEOUT:?}", status.state),
                Err(error) => {
                    return Err(error).with_context(|| format!("it does not answer after {TIMEOUT:?}"));
                }
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // The namespace may go at the same time, and with it everything that is left: nothing to report.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.site.down();
    }
}

fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        let status = child.try_wait().context("wait for an agent to end")?;
        if status.is_some() || Instant::now() > deadline {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
