//! Wrong usage is refused with one clear error, and the host stays as it was.

use std::{
    fs::File,
    net::Ipv4Addr,
    os::{
        fd::AsRawFd,
        unix::{fs::FileTypeExt, process::CommandExt},
    },
    process::Command,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{DEVICE, Rung, Site},
    pair::Store,
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Topology, UPLINK, Underlay},
    traffic::udp::occupy,
};

use crate::{foreign::attach_xdp, machine::Need, snapshot::Snapshot, suite::Suite};

/// An unprivileged user id.
const UNPRIVILEGED: u32 = 65534;

pub(crate) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("refusals::unknown_interface", tun, |sandbox| {
        Fixture::build(sandbox)?.refuses_arguments(&["--iface", "nosuch0"], "nosuch0")
    });
    suite.add("refusals::loopback_interface", tun, |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        fixture.topology.a.host.tool("ip address add 192.168.99.1/32 dev lo")?;
        fixture.refuses_arguments(&["--iface", "lo"], "the loopback device never leave this host")?;
        fixture.refuses_arguments(&["--iface", "192.168.99.1"], "the loopback device never leave this host")
    });
    suite.add("refusals::subnet_outside_the_network", tun, |sandbox| {
        Fixture::build(sandbox)?.refuses_arguments(&["--subnet", "10.99.1.0/24"], "10.99.1.0/24")
    });
    suite.add("refusals::peer_outside_the_network", tun, |sandbox| {
        Fixture::build(sandbox)?.refuses_peer("10.99.2.0/24=192.168.77.2", "10.99.2.0/24")
    });
    suite.add("refusals::peer_with_our_own_subnet", tun, |sandbox| {
        Fixture::build(sandbox)?.refuses_peer("10.244.1.0/25=192.168.77.2", "10.244.1.0/25")
    });
    suite.add("refusals::subnet_of_another_host", tun, |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        fixture.store.write_lease("10.244.1.0-24", "192.168.77.99")?;
        fixture.refuses_arguments(&[], "192.168.77.99")
    });
    suite.add("refusals::foreign_device_of_the_same_name", tun, |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        fixture.topology.a.host.tool(&format!("ip link add {DEVICE} type veth peer name foreign1"))?;
        fixture.refuses_arguments(&[], &format!("a device {DEVICE} exists that overlay-agent did not make"))
    });
    suite.add("refusals::foreign_xdp_program", &[Need::Tun, Need::Ebpf], |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        attach_xdp(&fixture.topology.a.host, &sandbox.new_directory("foreign")?)?;
        let arguments = fixture.store.arguments(&fixture.topology.a, Rung::Xdp);
        fixture.refuses(fixture.site.run_command(&arguments), UPLINK)
    });
    suite.add("refusals::port_in_use", tun, |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        let _taken = occupy(fixture.topology.a.host(), Ipv4Addr::UNSPECIFIED, 8285)?;
        fixture.refuses_arguments(&[], "8285")
    });
    suite.add("refusals::subnet_file_that_is_a_fifo", tun, subnet_file_is_a_fifo);
    suite.add("refusals::user_without_capabilities", tun, no_capabilities);
    suite.add("refusals::no_tun_device_node", tun, no_tun_device_node);
    suite.add("refusals::etcd_endpoint_with_an_impossible_port", tun, |sandbox| {
        Fixture::build(sandbox)?.refuses_etcd(&["--etcd-endpoints", "http://192.168.77.10:99999"], "99999")
    });
    suite.add("refusals::etcd_ca_file_without_a_certificate", tun, |sandbox| {
        let file = sandbox.new_directory("tls")?.join("ca.pem");
        std::fs::write(&file, "").context("write an empty file")?;
        let file = file.display().to_string();
        let arguments = ["--etcd-endpoints", "https://192.168.77.10:2379", "--etcd-cafile", &file];
        Fixture::build(sandbox)?.refuses_etcd(&arguments, &file)
    });
    suite.add("refusals::store_without_configuration", tun, |sandbox| {
        let fixture = Fixture::build(sandbox)?;
        fixture.store.remove("config")?;
        fixture.store.write("config", "no JSON")?;
        fixture.refuses_arguments(&[], "config")
    });
}

/// A device node would be lost to the machine if the agent replaced it: a FIFO is not.
fn subnet_file_is_a_fifo(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::build(sandbox)?;
    let path = sandbox.new_directory("fifo")?.join("subnet.env");
    fixture.topology.a.host.tool(&format!("mkfifo {}", path.display()))?;
    let mut command = fixture.command();
    command.arg("--subnet-file").arg(&path);
    fixture.refuses(command, "it is a FIFO")?;
    ensure!(path.metadata()?.file_type().is_fifo(), "the agent replaced the FIFO");
    Ok(())
}

fn no_capabilities(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::build(sandbox)?;
    // The binary may lie where only root can reach it: open it as root, run what is open.
    let binary = File::open(fixture.site.binary()).context("open the agent's binary")?;
    let path = format!("/proc/self/fd/{}", binary.as_raw_fd());
    let mut command = rebuilt(Command::new(path), &fixture.command());
    command.uid(UNPRIVILEGED).gid(UNPRIVILEGED).current_dir("/");
    fixture.refuses(command, "CAP_NET_ADMIN")
}

fn no_tun_device_node(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::build(sandbox)?;
    let mut hidden = Command::new("unshare");
    hidden.args(["--mount", "--propagation", "private", "sh", "-c"]);
    hidden.arg(r#"mount -t tmpfs none /dev/net && exec "$@""#).arg("sh").arg(fixture.site.binary());
    fixture.refuses(rebuilt(hidden, &fixture.command()), "/dev/net/tun")
}

/// A topology on whose host A an agent is about to be refused.
struct Fixture {
    topology: Topology,
    store: Store,
    site: Arc<Site>,
}

impl Fixture {
    fn build(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let store = Store::create(sandbox)?;
        let site = Site::new(sandbox, &topology.a.host, "agent")?;
        Ok(Self { topology, store, site })
    }

    /// A command that would succeed.
    fn command(&self) -> Command {
        self.site.run_command(&self.store.arguments(&self.topology.a, Rung::Tun))
    }

    /// Starts the agent with these arguments in place of the right ones.
    fn refuses_arguments(&self, changed: &[&str], named: &str) -> Result<()> {
        let mut arguments = self.store.arguments(&self.topology.a, Rung::Tun);
        for pair in changed.chunks(2) {
            let [name, value] = pair else { continue };
            let slot = arguments.iter().position(|argument| argument == name).map(|position| position + 1);
            let slot = slot.and_then(|slot| arguments.get_mut(slot)).context("no such argument")?;
            (*value).clone_into(slot);
        }
        self.refuses(self.site.run_command(&arguments), named)
    }

    /// Starts the agent without a store, with this peer beside a right one.
    fn refuses_peer(&self, peer: &str, named: &str) -> Result<()> {
        let right = format!("{}={}", self.topology.b.subnet, self.topology.b.underlay);
        let arguments = [
            "--network",
            NETWORK,
            "--subnet",
            self.topology.a.subnet,
            "--iface",
            UPLINK,
            "--datapath",
            Rung::Tun.name(),
            "--peer",
            &right,
            "--peer",
            peer,
        ];
        self.refuses(self.site.run_command(&arguments.map(str::to_owned)), named)
    }

    /// Starts the agent with these options of etcd, which nothing needs to answer.
    fn refuses_etcd(&self, options: &[&str], named: &str) -> Result<()> {
        let arguments = [&["--iface", UPLINK, "--datapath", Rung::Tun.name()], options].concat();
        let arguments: Vec<_> = arguments.into_iter().map(str::to_owned).collect();
        self.refuses(self.site.run_command(&arguments), named)
    }

    /// Checks that the command is refused with an error that names `named`, and changes nothing.
    fn refuses(&self, command: Command, named: &str) -> Result<()> {
        let before = Snapshot::take(&self.topology.a.host)?;
        let error = self.site.refused(command)?;
        ensure!(error.contains(named), "the error does not name `{named}`: {error}");
        before.is_unchanged(&self.topology.a.host)?;
        let socket = self.site.socket();
        ensure!(!socket.exists(), "{} is left", socket.display());
        Ok(())
    }
}

/// `outer` with the arguments of `inner`.
fn rebuilt(mut outer: Command, inner: &Command) -> Command {
    outer.args(inner.get_args());
    outer
}
