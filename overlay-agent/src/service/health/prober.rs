//! The checks of this node's endpoints: a task for each, so that none waits for another.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::{info, warn};

use super::{
    plan::{Probe, probes},
    verdict::{Streak, Verdict, Verdicts},
};
use crate::service::{Catalog, EndpointName, ServiceName, catalog::Service, record::EndpointState};

/// Most checks under way at once, each with a socket.
const MOST_CHECKS: usize = 256;

/// Verdicts as they change; `None` before the first catalog, when it is not known yet what to check.
pub type VerdictReceiver = watch::Receiver<Option<Arc<Verdicts>>>;
type VerdictSender = watch::Sender<Option<Arc<Verdicts>>>;

/// Checks the endpoints of this node. Dropped, it ends.
pub(super) struct Prober {
    /// This node, in the names of its endpoints.
    node: String,
    catalog: Arc<Catalog>,
    running: BTreeMap<EndpointName, Running>,
    tasks: JoinSet<()>,
    verdicts: Arc<VerdictSender>,
    places: Arc<Semaphore>,
    /// Services whose endpoints cannot be checked.
    problems: BTreeMap<ServiceName, String>,
}

struct Running {
    probe: Probe,
    task: AbortHandle,
}

impl Prober {
    pub(super) fn new(node: String) -> Self {
        Self {
            node,
            catalog: Arc::default(),
            running: BTreeMap::new(),
            tasks: JoinSet::new(),
            verdicts: Arc::new(watch::Sender::new(None)),
            places: Arc::new(Semaphore::new(MOST_CHECKS)),
            problems: BTreeMap::new(),
        }
    }

    pub(super) fn verdicts(&self) -> VerdictReceiver {
        self.verdicts.subscribe()
    }

    pub(super) fn problems(&self) -> &BTreeMap<ServiceName, String> {
        &self.problems
    }

    /// Checks what the catalog says. Looks only at services that have changed.
    pub(super) fn follow(&mut self, catalog: &Arc<Catalog>) {
        while self.tasks.try_join_next().is_some() {}
        let before = std::mem::replace(&mut self.catalog, Arc::clone(catalog));
        for name in before.services.keys().filter(|name| !catalog.services.contains_key(*name)) {
            self.set(name, None);
        }
        for (name, service) in &catalog.services {
            if before.services.get(name).is_none_or(|known| !Arc::ptr_eq(known, service)) {
                self.set(name, Some(service));
            }
        }
        self.verdicts.send_if_modified(|verdicts| {
            let is_first = verdicts.is_none();
            verdicts.get_or_insert_default();
            is_first
        });
    }

    fn set(&mut self, name: &ServiceName, service: Option<&Service>) {
        self.problems.remove(name);
        let mut wanted = match service.map(|service| probes(service, &self.node)) {
            None => BTreeMap::new(),
            Some(Ok(wanted)) => wanted,
            Some(Err(why)) => {
                self.problems.insert(name.clone(), why);
                BTreeMap::new()
            }
        };
        let first = EndpointName { service: name.clone(), node: "".into(), id: "".into() };
        let known = self.running.range(first..).take_while(|(endpoint, _)| endpoint.service == *name);
        let known: Vec<EndpointName> = known.map(|(endpoint, _)| endpoint.clone()).collect();
        for endpoint in known {
            let Some(running) = self.running.get(&endpoint) else { continue };
            match wanted.remove(&endpoint) {
                Some(probe) if probe == running.probe => {}
                Some(probe) => {
                    running.task.abort();
                    self.start(endpoint, probe, EndpointState::Ready);
                }
                None => {
                    running.task.abort();
                    self.running.remove(&endpoint);
                    self.change(|verdicts| verdicts.remove(&endpoint).is_some());
                }
            }
        }
        for (endpoint, probe) in wanted {
            let recorded = service.and_then(|service| service.endpoint(&endpoint));
            let state = recorded.map_or(EndpointState::Ready, |endpoint| endpoint.spec.state);
            self.start(endpoint, probe, state);
        }
    }

    /// A new endpoint is up unless it is recorded as down; one that is checked otherwise from now on is what it was.
    fn start(&mut self, name: EndpointName, probe: Probe, recorded: EndpointState) {
        let first = Verdict { is_up: recorded != EndpointState::Down, why: None };
        let mut streak = Streak::new(first.is_up);
        self.change(|verdicts| {
            if let Some(known) = verdicts.get(&name) {
                streak = Streak::new(known.is_up);
                return false;
            }
            verdicts.insert(name.clone(), first);
            true
        });
        let watching =
            watch(name.clone(), probe.clone(), streak, Arc::clone(&self.verdicts), Arc::clone(&self.places));
        let task = self.tasks.spawn(watching);
        self.running.insert(name, Running { probe, task });
    }

    fn change(&self, change: impl FnOnce(&mut Verdicts) -> bool) {
        self.verdicts.send_if_modified(|verdicts| change(Arc::make_mut(verdicts.get_or_insert_default())));
    }
}

/// Checks an endpoint until the task is ended.
async fn watch(
    name: EndpointName,
    probe: Probe,
    mut streak: Streak,
    verdicts: Arc<VerdictSender>,
    places: Arc<Semaphore>,
) {
    let pause = Duration::from_millis(u64::from(probe.check.interval_ms));
    // Endpoints that come together are not checked together.
    sleep(pause.mul_f64(rand::random::<f64>())).await;
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // It is never closed.
        let Ok(place) = places.acquire().await else { return };
        let result = probe.run().await;
        drop(place);
        if streak.observe(result.is_ok(), &probe.check) {
            match &result {
                Ok(()) => info!("the endpoint {name} is up"),
                Err(why) => warn!("the endpoint {name} is down: {why}"),
            }
        }
        // Compared each time: an earlier check of the endpoint may have ended late.
        verdicts.send_if_modified(|verdicts| {
            let Some(verdicts) = verdicts else { return false };
            if verdicts.get(&name).is_none_or(|known| known.is_up == streak.is_up()) {
                return false;
            }
            let verdict = Verdict { is_up: streak.is_up(), why: result.err() };
            Arc::make_mut(verdicts).insert(name.clone(), verdict);
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use tokio::time::timeout;

    use super::*;
    use crate::service::health::tests::catalog;

    const LONG: Duration = Duration::from_secs(20);

    fn web(ports: &str) -> String {
        format!(
            r#"{{"v":1,"health":{{"kind":"tcp","interval_ms":100,"timeout_ms":100,"fall":2,"rise":2}},
            "ports":[{ports}]}}"#
        )
    }

    fn endpoint(port: u16, state: &str) -> String {
        format!(r#"{{"overlay_ip":"10.0.0.1","ports":{{"p":{port}}},"state":"{state}"}}"#)
    }

    /// As no record may have an address of loopback.
    fn at_loopback(catalog: Arc<Catalog>) -> Arc<Catalog> {
        let mut catalog = (*catalog).clone();
        for service in catalog.services.values_mut() {
            for endpoint in &mut Arc::make_mut(service).endpoints {
                endpoint.spec.overlay_ip = Ipv4Addr::LOCALHOST;
            }
        }
        Arc::new(catalog)
    }

    async fn until(verdicts: &mut VerdictReceiver, wanted: &[(&str, bool)]) {
        let wanted: Vec<_> = wanted.iter().map(|(name, is_up)| ((*name).to_owned(), *is_up)).collect();
        let is = |verdicts: &Option<Arc<Verdicts>>| {
            verdicts.as_ref().is_some_and(|verdicts| {
                let found = verdicts.iter().map(|(name, verdict)| (name.to_string(), verdict.is_up));
                found.collect::<Vec<_>>() == wanted
            })
        };
        drop(timeout(LONG, verdicts.wait_for(is)).await.expect("other verdicts").unwrap());
    }

    fn port(listener: &TcpListener) -> u16 {
        listener.local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn endpoints_go_down_and_come_up_by_themselves() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (open, shut) = (port(&listener), port(&closed));
        let shut_at = closed.local_addr().unwrap();
        drop(closed);
        let endpoints = [
            ("shop/web/a/1".to_owned(), endpoint(open, "ready")),
            ("shop/web/a/2".to_owned(), endpoint(shut, "ready")),
            // Down at the start, and it passes.
            ("shop/web/a/3".to_owned(), endpoint(open, "down")),
            ("shop/web/b/1".to_owned(), endpoint(shut, "ready")),
        ];
        let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let service = web(r#"{"name":"p","port":80}"#);
        let mut prober = Prober::new("a".to_owned());
        let mut verdicts = prober.verdicts();
        assert!(verdicts.borrow().is_none());
        prober.follow(&at_loopback(catalog(&[("shop/web", &service)], &endpoints)));
        let first = verdicts.borrow_and_update().clone().unwrap();
        assert_eq!(first.values().map(|verdict| verdict.is_up).collect::<Vec<_>>(), [true, true, false]);
        let names = ["shop/web/a/1", "shop/web/a/2", "shop/web/a/3"];
        until(&mut verdicts, &[(names[0], true), (names[1], false), (names[2], true)]).await;
        let known = verdicts.borrow().clone().unwrap();
        assert!(known[&names[1].parse().unwrap()].why.as_ref().unwrap().contains("refused"));
        let listener_2 = TcpListener::bind(shut_at).unwrap();
        until(&mut verdicts, &names.map(|name| (name, true))).await;
        drop(listener_2);
        until(&mut verdicts, &[(names[0], true), (names[1], false), (names[2], true)]).await;

        // Checked otherwise from now on, an endpoint is what it was, and checked on.
        let other = service.replace("\"interval_ms\":100", "\"interval_ms\":101");
        prober.follow(&at_loopback(catalog(&[("shop/web", &other)], &endpoints)));
        until(&mut verdicts, &[(names[0], true), (names[1], false), (names[2], true)]).await;
        drop(listener);
        until(&mut verdicts, &names.map(|name| (name, false))).await;
        prober.follow(&at_loopback(catalog(&[("shop/web", &other)], &endpoints[..1])));
        until(&mut verdicts, &[(names[0], false)]).await;
        prober.follow(&Arc::default());
        until(&mut verdicts, &[]).await;
    }

    /// Far more endpoints that do not answer than checks under way at once, each for a tenth of a second.
    #[tokio::test]
    async fn endpoints_that_hang_hold_up_no_other() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // A listener whose queue is full answers no further connection.
        let full = tokio::net::TcpSocket::new_v4().unwrap();
        full.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let full = full.listen(1).unwrap();
        let hanging = full.local_addr().unwrap();
        let mut waiting = Vec::new();
        for _ in 0..8 {
            let connect = tokio::net::TcpStream::connect(hanging);
            waiting.extend(timeout(Duration::from_millis(100), connect).await);
        }
        let fast = web(r#"{"name":"p","port":80}"#);
        let slow = fast.replace("\"interval_ms\":100", "\"interval_ms\":1000");
        let hang = |number| (format!("shop/web/a/{number}"), endpoint(hanging.port(), "ready"));
        let mut endpoints: Vec<_> = (0..600).map(hang).collect();
        endpoints.push(("shop/api/a/1".to_owned(), endpoint(port(&listener), "down")));
        let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let mut prober = Prober::new("a".to_owned());
        let mut verdicts = prober.verdicts();
        prober.follow(&at_loopback(catalog(&[("shop/web", &slow), ("shop/api", &fast)], &endpoints)));
        let name: EndpointName = "shop/api/a/1".parse().unwrap();
        let is_up = |verdicts: &Option<Arc<Verdicts>>| {
            verdicts.as_ref().is_some_and(|verdicts| verdicts[&name].is_up)
        };
        drop(timeout(Duration::from_secs(3), verdicts.wait_for(is_up)).await.expect("it waits").unwrap());
        let all_down = |verdicts: &Option<Arc<Verdicts>>| {
            verdicts
                .as_ref()
                .is_some_and(|verdicts| verdicts.values().filter(|verdict| !verdict.is_up).count() == 600)
        };
        drop(timeout(LONG, verdicts.wait_for(all_down)).await.expect("some are up").unwrap());
        drop((waiting, full));
    }
}
