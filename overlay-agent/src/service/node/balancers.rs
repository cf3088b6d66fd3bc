//! The two ways of connections to virtual addresses: eBPF programs for the sockets of this node, and the proxy in user space for those
//! that the programs do not see. Both choose endpoints alike.

use std::{borrow::Cow, collections::BTreeSet, net::SocketAddrV4, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::{
    datapath::ebpf::{Pins, SERVICE_OBJECT, ServiceSet},
    service::{
        Catalog, LbRequest,
        catalog::Service,
        front::Rules,
        outcome::Outcomes,
        proxy::{self, Proxy},
        record::{App, Port},
        sockets::SocketKeeper,
        traffic::Measures,
    },
};

/// Pause between attempts to load programs that were asked for by name.
const PAUSE: Duration = Duration::from_secs(30);

/// The balancers of this node.
pub(super) struct Balancers {
    request: LbRequest,
    cgroup: Option<PathBuf>,
    /// The overlay device, by which an agent knows what it pinned.
    device: String,
    programs: Programs,
    /// Why programs would end with this process.
    unpinned: Option<String>,
    /// Whether it is settled what becomes of programs of an earlier agent: this one has taken them over or removed them.
    is_settled: bool,
    proxy: Option<Proxy>,
    /// Whether there are HTTP ports of which only connections are balanced.
    has_unread_http: bool,
}

fn http_ports(catalog: &Catalog) -> impl Iterator<Item = (&Service, &Port)> {
    let services = catalog.services.values().filter(|service| service.vip.is_some());
    let ports = services.flat_map(|service| service.spec.ports.iter().map(move |port| (&**service, port)));
    ports.filter(|(_, port)| port.app == App::Http)
}

/// The catalog for programs while the proxy cannot listen at some ports: of those that are HTTP ports, at least the connections are balanced. Not
/// of those with routes, whose requests could reach the wrong service.
fn by_connection<'a>(catalog: &'a Catalog, unserved: &BTreeSet<SocketAddrV4>) -> Cow<'a, Catalog> {
    let mut changed = Cow::Borrowed(catalog);
    for (service, port) in http_ports(catalog).filter(|(_, port)| port.routes.is_empty()) {
        let address = service.vip.map(|vip| SocketAddrV4::new(vip, port.port.get()));
        if address.is_none_or(|address| !unserved.contains(&address)) {
            continue;
        }
        let own = changed.to_mut().services.get_mut(&service.name).map(Arc::make_mut);
        for own in own.into_iter().flat_map(|own| &mut own.spec.ports).filter(|own| own.name == port.name) {
            own.app = App::Tcp;
        }
    }
    changed
}

/// Routes that nothing follows, because no proxy reads requests.
fn unread_routes(catalog: &Catalog) -> Vec<String> {
    let unread = http_ports(catalog).filter(|(_, port)| !port.routes.is_empty());
    let reason = |(service, port): (&Service, &Port)| {
        format!(
            "{}, port {}: its routes need the proxy, which does not run with --lb ebpf: use --lb auto",
            service.name, port.name
        )
    };
    unread.map(reason).collect()
}

/// The programs, or why there are none.
enum Programs {
    NotWanted,
    /// From this time on.
    Due(Instant),
    Attached(Box<ServiceSet>, SocketKeeper),
    /// Not tried again: the proxy takes their place.
    Missing(String),
}

impl Balancers {
    /// Starts nothing yet.
    pub(super) fn new(request: LbRequest, cgroup: Option<PathBuf>, device: &str) -> Self {
        let programs = match request {
            LbRequest::Auto | LbRequest::Ebpf => Programs::Due(Instant::now()),
            LbRequest::Proxy | LbRequest::Off => Programs::NotWanted,
        };
        Self {
            request,
            cgroup,
            device: device.to_owned(),
            programs,
            unpinned: None,
            is_settled: false,
            proxy: None,
            has_unread_http: false,
        }
    }

    /// Whether programs of an earlier agent translate virtual addresses.
    pub(super) fn has_left(&self) -> bool {
        Pins::find(&self.device).is_ok_and(|pins| pins.is_some_and(|pins| pins.services().has_links()))
    }

    /// Starts what is missing, and balances as the catalog says. Returns what does not work.
    pub(super) async fn reconcile(&mut self, catalog: &Catalog, rules: &Rules) -> Vec<String> {
        let mut problems = Vec::new();
        // Connections to HTTP ports end at the proxy, which reads the requests. Where there is none, they are balanced like others.
        let is_without_proxy = self.request == LbRequest::Ebpf;
        let of_programs = Rules { http: is_without_proxy, ..rules.clone() };
        self.has_unread_http = is_without_proxy && http_ports(catalog).next().is_some();
        if is_without_proxy {
            problems.extend(unread_routes(catalog));
        }
        let mut unserved = BTreeSet::new();
        if let Programs::Attached(_, sockets) = &self.programs {
            problems.extend(sockets.problem());
        }
        if matches!(self.request, LbRequest::Auto | LbRequest::Proxy) {
            let proxy = self.proxy.get_or_insert_with(|| Proxy::start(proxy::Options::default()));
            proxy.reconcile(catalog, rules).await;
            unserved = proxy.unserved();
            problems.extend(
                proxy
                    .problems()
                    .into_iter()
                    .map(|problem| format!("{} at {}: {}", problem.service, problem.address, problem.reason)),
            );
        }
        if let Err(error) = self.reconcile_programs(&by_connection(catalog, &unserved), &of_programs) {
            problems.push(format!("{error:#}"));
        }
        problems
    }

    fn reconcile_programs(&mut self, catalog: &Catalog, rules: &Rules) -> Result<()> {
        if let Programs::Due(time) = &self.programs {
            if Instant::now() < *time {
                return Ok(());
            }
            let has_left = self.has_left();
            match self.load(catalog, rules) {
                Ok(set) => {
                    self.is_settled = true;
                    info!("eBPF programs translate virtual addresses for the sockets of this node");
                    let sockets = SocketKeeper::start(set.udp_sockets());
                    sockets.update(catalog, rules);
                    if has_left {
                        // Endpoints may have left while no agent ran.
                        sockets.look();
                    }
                    self.programs = Programs::Attached(Box::new(set), sockets);
                    return Ok(());
                }
                Err(error) if self.request == LbRequest::Auto => {
                    warn!("connections to virtual addresses pass the proxy: {error:#}");
                    self.programs = Programs::Missing(format!("{error:#}"));
                    return Ok(());
                }
                Err(error) => {
                    self.programs = Programs::Due(Instant::now() + PAUSE);
                    return Err(error.context("--lb ebpf is not possible"));
                }
            }
        }
        if let Programs::Attached(set, sockets) = &mut self.programs {
            set.reconcile(catalog, rules).context("virtual addresses in eBPF")?;
            sockets.update(catalog, rules);
        }
        if let Programs::NotWanted | Programs::Missing(_) = &self.programs
            && !self.is_settled
        {
            // The proxy listens by now. They would go on with the endpoints of that time.
            remove_left(&self.device)?;
            self.is_settled = true;
        }
        Ok(())
    }

    /// The maps are filled before a program can see a connection.
    fn load(&mut self, catalog: &Catalog, rules: &Rules) -> Result<ServiceSet> {
        let object =
            SERVICE_OBJECT.context("this binary was built without eBPF programs (cargo xtask build)")?;
        let pins = Pins::open(&self.device);
        self.unpinned = pins.as_ref().err().map(|error| format!("{error:#}"));
        let mut set = match pins {
            Ok(pins) => ServiceSet::load_pinned(object, &pins)?,
            Err(_) => ServiceSet::load(object)?,
        };
        set.reconcile(catalog, rules)?;
        set.attach(self.cgroup.as_deref())?;
        Ok(set)
    }

    /// What programs and proxy have counted. Fails when the kernel's maps cannot be read.
    pub(super) fn measures(&self) -> Result<Measures> {
        let mut measures = Measures::default();
        if let Programs::Attached(set, _) = &self.programs {
            measures.kernel = Some(set.counts()?);
            measures.uncounted = set.uncounted().map(str::to_owned);
        }
        measures.proxy = self.proxy.as_ref().map(Proxy::counters);
        Ok(measures)
    }

    /// What became of connections of this node to endpoints, whichever way they took. Those that cannot be read eject no endpoint.
    pub(super) fn outcomes(&mut self) -> Outcomes {
        let mut sum = Outcomes::new();
        let programs = match &mut self.programs {
            Programs::Attached(set, _) => set.outcomes().inspect_err(|error| debug!("{error:#}")).ok(),
            Programs::NotWanted | Programs::Due(_) | Programs::Missing(_) => None,
        };
        for (target, outcome) in
            [programs, self.proxy.as_ref().map(Proxy::outcomes)].into_iter().flatten().flatten()
        {
            *sum.entry(target).or_default() += outcome;
        }
        sum
    }

    /// How connections reach endpoints now, and why.
    pub(super) fn describe(&self) -> String {
        let uncounted = match &self.programs {
            Programs::Attached(set, _) => set.uncounted(),
            Programs::NotWanted | Programs::Due(_) | Programs::Missing(_) => None,
        };
        let uncounted = uncounted.map(|why| format!("; its TCP connections are not counted: {why}"));
        self.ways() + &uncounted.unwrap_or_default()
    }

    fn ways(&self) -> String {
        match (&self.programs, &self.proxy) {
            (Programs::Attached(..), Some(_)) => {
                "ebpf, and the proxy for HTTP and forwarded connections".to_owned()
            }
            (Programs::Attached(..), None) if self.has_unread_http => {
                "ebpf (--lb ebpf): HTTP ports are balanced by connection, not by request".to_owned()
            }
            (Programs::Attached(..), None) => "ebpf (--lb ebpf)".to_owned(),
            (Programs::Missing(why), _) => format!("proxy ({why})"),
            (Programs::NotWanted, Some(_)) => "proxy (--lb proxy)".to_owned(),
            (Programs::NotWanted | Programs::Due(_), _) => "none".to_owned(),
        }
    }

    /// Whether the programs go on when this process ends, and why, or why not.
    pub(super) fn without_agent(&self, keep: bool) -> (bool, String) {
        let (goes_on, why) = match (&self.programs, &self.unpinned) {
            (Programs::Attached(set, _), None) if set.is_pinned() && keep => {
                (true, "the eBPF programs are pinned; names, HTTP and forwarded connections need the agent")
            }
            (Programs::Attached(set, _), None) if set.is_pinned() => {
                (false, "--on-exit remove; only a kill leaves the eBPF programs")
            }
            (Programs::Due(_), None) if keep && self.has_left() => (true, "those of an earlier agent go on"),
            (_, Some(why)) => (false, why.as_str()),
            _ => (false, "no eBPF programs translate virtual addresses"),
        };
        (goes_on, why.to_owned())
    }

    /// Ends all but what is to go on: connections through the programs stay as they are, those through the proxy are reset.
    pub(super) async fn stop(self, leave: bool) {
        if !leave {
            if let Programs::Attached(mut set, _) = self.programs
                && let Err(error) = set.detach()
            {
                warn!("{error:#}");
            }
            if let Err(error) = remove_left(&self.device) {
                warn!("{error:#}");
            }
        }
        if let Some(proxy) = self.proxy {
            proxy.stop().await;
        }
    }
}

/// Removes programs and maps of services that an agent with this overlay device left. Fails when a pin cannot be removed.
pub(crate) fn remove_left(device: &str) -> Result<()> {
    if let Some(pins) = Pins::find(device)?
        && pins.services().remove()?
    {
        info!("the eBPF programs of services are removed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{catalog::tests::records, front::fronts};

    #[test]
    fn programs_get_the_http_ports_that_the_proxy_cannot_serve() {
        let services = records(&[(
            "shop/web",
            r#"{"v":1,"ports":[{"name":"a","port":1,"app":"http"},{"name":"b","port":2,"app":"http"},{"name":"c","port":3},
                {"name":"d","port":4,"app":"http","routes":[{"service":"shop/api"}]}]}"#,
        )]);
        let vips = records(&[("10.251.0.1", "shop/web")]);
        let catalog = Catalog::new(&services, &vips, &[], &Catalog::default());
        let ports = |unserved: &[u16]| {
            let address = |port: &u16| SocketAddrV4::new([10, 251, 0, 1].into(), *port);
            let catalog = by_connection(&catalog, &unserved.iter().map(address).collect());
            let fronts = fronts(&catalog, &Rules::default());
            fronts.keys().map(|key| u16::from_be_bytes(key.address.port)).collect::<Vec<_>>()
        };
        assert_eq!(ports(&[]), [3]);
        assert_eq!(ports(&[1]), [1, 3]);
        assert_eq!(ports(&[1, 2, 3, 4]), [1, 2, 3]);
    }
}
