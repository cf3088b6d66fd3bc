//! The agent's route map, read from outside of the agent: what the kernel's programs see.

use std::{
    fs,
    net::Ipv4Addr,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{LpmTrie, Map, MapData, MapError, MapInfo, lpm_trie::Key};

/// Prefix length of the subnets here.
const LENGTH: u32 = 24;
/// Pause between two looks: short against what is measured, long enough to leave the core to those who work.
const PAUSE: Duration = Duration::from_micros(200);
/// How long to wait for anything.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The kernel's map of routes.
pub(super) struct RouteMap(LpmTrie<MapData, [u8; 4], [u8; 4]>);

impl RouteMap {
    /// The route map of the process `pid` that has a route for `subnet`; `None` while there is none. Other agents may run on
    /// this machine, and while one starts it has more than one such map.
    pub(super) fn find(pid: u32, subnet: Ipv4Addr) -> Result<Option<Self>> {
        let directory = format!("/proc/{pid}/fdinfo");
        let files =
            fs::read_dir(&directory).with_context(|| format!("read {directory}: has the agent ended?"))?;
        for file in files.flatten() {
            // Files may be closed meanwhile, and maps with them.
            let text = fs::read_to_string(file.path()).unwrap_or_default();
            let id = text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
            let Some(id) = id else { continue };
            let Ok(info) = MapInfo::from_id(id) else { continue };
            if info.name_as_str() != Some("ROUTES") {
                continue;
            }
            let Ok(data) = MapData::from_id(id) else { continue };
            let map = Self(LpmTrie::try_from(Map::LpmTrie(data))?);
            if map.get(subnet)?.is_some() {
                return Ok(Some(map));
            }
        }
        Ok(None)
    }

    /// The peer that exactly `subnet` is routed to.
    pub(super) fn get(&self, subnet: Ipv4Addr) -> Result<Option<Ipv4Addr>> {
        match self.0.get(&Key::new(LENGTH, subnet.octets()), 0) {
            Ok(peer) => Ok(Some(peer.into())),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read the agent's route map"),
        }
    }

    /// How many routes there are.
    pub(super) fn len(&self) -> Result<usize> {
        let mut count = 0;
        for key in self.0.keys() {
            key.context("read the agent's route map")?;
            count += 1;
        }
        Ok(count)
    }

    /// Waits until `subnet` is routed to `peer`, or to nobody, and returns when that was seen.
    pub(super) fn await_peer(&self, subnet: Ipv4Addr, peer: Option<Ipv4Addr>) -> Result<Instant> {
        let begun = Instant::now();
        loop {
            let found = self.get(subnet)?;
            let now = Instant::now();
            if found == peer {
                return Ok(now);
            }
            ensure!(
                now - begun < TIMEOUT,
                "the route for {subnet} is {found:?} after {TIMEOUT:?}, not {peer:?}"
            );
            thread::sleep(PAUSE);
        }
    }
}

/// Waits until a map of `pid` has a route for `subnet`.
pub(super) fn await_map(pid: u32, subnet: Ipv4Addr) -> Result<RouteMap> {
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT {
        if let Some(map) = RouteMap::find(pid, subnet)? {
            return Ok(map);
        }
        thread::sleep(Duration::from_millis(2));
    }
    bail!("the agent has no route for {subnet} after {TIMEOUT:?}")
}

/// One thing to wait for.
type Wish = (Ipv4Addr, Option<Ipv4Addr>);

/// Looks at a map in a thread of its own, so that a change is seen also while its writer waits for etcd's answer.
pub(super) struct Observer {
    wishes: Sender<Wish>,
    seen: Receiver<Result<Instant>>,
}

impl Observer {
    pub(super) fn start(map: RouteMap) -> Self {
        let (wishes, wished) = channel::<Wish>();
        let (answers, seen) = channel();
        thread::spawn(move || {
            for (subnet, peer) in wished {
                if answers.send(map.await_peer(subnet, peer)).is_err() {
                    return;
                }
            }
        });
        Self { wishes, seen }
    }

    /// Starts to look for `peer` as the peer of `subnet`.
    pub(super) fn watch(&self, subnet: Ipv4Addr, peer: Option<Ipv4Addr>) -> Result<()> {
        self.wishes.send((subnet, peer)).context("the thread that looks at the route map has ended")
    }

    /// When it was seen.
    pub(super) fn seen(&self) -> Result<Instant> {
        self.seen.recv().context("the thread that looks at the route map has ended")?
    }
}
