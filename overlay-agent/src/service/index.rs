//! All records of services by their keys, and the catalog that they make. A change costs a pass over the services that it concerns,
//! not over all. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::Ipv4Addr,
    sync::Arc,
};

use ipnet::Ipv4Net;

use super::{
    catalog::{Catalog, Skipped},
    name::ServiceName,
    record::{Endpoints, Services, Vip, Vips},
    vip::Work,
};
use crate::store::{Change, Kind, Record};

/// Records by their keys.
pub(super) type Records<K> = BTreeMap<Arc<str>, Record<K>>;

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    /// Of the virtual addresses.
    pool: Ipv4Net,
    services: Records<Services>,
    vips: Records<Vips>,
    endpoints: Records<Endpoints>,
    /// Virtual addresses by their holder, and the services that want an address.
    held: BTreeMap<ServiceName, BTreeSet<Ipv4Addr>>,
    wanted: BTreeMap<Ipv4Addr, BTreeSet<ServiceName>>,
    /// Records that are left out, by their keys below the network's prefix.
    skipped: BTreeMap<String, Skipped>,
    /// Services whose part of the catalog may have changed since the last one.
    touched: BTreeSet<ServiceName>,
    /// Whether records that belong to no service have changed.
    strays_changed: bool,
    /// Whether services or virtual addresses have changed.
    work_changed: bool,
    catalog: Arc<Catalog>,
    work: Arc<Work>,
}

/// A kind of which the index has records.
pub(super) trait Indexed: Kind + PartialEq {
    /// The index's records.
    fn records(index: &mut Index) -> &mut Records<Self>;

    /// Lets a record share the memory of what it has in common with the one before it.
    fn share(_record: &mut Record<Self>, _before: Option<&Record<Self>>) {}

    /// A record comes in, or goes out.
    fn touch(index: &mut Index, record: &Record<Self>, comes: bool);
}

impl Index {
    pub(super) fn new(pool: Ipv4Net) -> Self {
        Self {
            pool,
            services: Records::new(),
            vips: Records::new(),
            endpoints: Records::new(),
            held: BTreeMap::new(),
            wanted: BTreeMap::new(),
            skipped: BTreeMap::new(),
            touched: BTreeSet::new(),
            strays_changed: false,
            work_changed: true,
            catalog: Arc::default(),
            work: Arc::default(),
        }
    }

    /// Takes all records of a kind.
    pub(super) fn replace<K: Indexed>(&mut self, records: Vec<Record<K>>) {
        let mut before = mem::take(K::records(self));
        let mut present = Vec::with_capacity(records.len());
        for mut record in records {
            K::share(&mut record, present.last());
            match before.remove(&record.key) {
                Some(known) if known == record => present.push(known),
                known => {
                    if let Some(known) = known {
                        K::touch(self, &known, false);
                    }
                    K::touch(self, &record, true);
                    present.push(record);
                }
            }
        }
        for gone in before.values() {
            K::touch(self, gone, false);
        }
        // All at once: one by one, in order, they would leave each node of the tree half empty.
        *K::records(self) = present.into_iter().map(|record| (record.key.clone(), record)).collect();
    }

    /// Takes changes, in order.
    pub(super) fn apply<K: Indexed>(&mut self, changes: Vec<Change<K>>) {
        for change in changes {
            let key = match &change {
                Change::Put(record) => &record.key,
                Change::Delete { key } => key,
            };
            if let Some(known) = K::records(self).remove(key) {
                K::touch(self, &known, false);
            }
            if let Change::Put(record) = change {
                self.insert(record);
            }
        }
    }

    fn insert<K: Indexed>(&mut self, record: Record<K>) {
        K::touch(self, &record, true);
        K::records(self).insert(record.key.clone(), record);
    }

    /// The catalog of the records; the same `Arc` as before when nothing in it has changed.
    pub(super) fn catalog(&mut self) -> Arc<Catalog> {
        let touched = mem::take(&mut self.touched);
        if touched.is_empty() && !mem::take(&mut self.strays_changed) {
            return Arc::clone(&self.catalog);
        }
        self.strays_changed = false;
        let mut part = self.part(&touched);
        let mut services = self.catalog.services.clone();
        for name in &touched {
            match part.services.remove(name) {
                Some(service) => drop(services.insert(name.clone(), service)),
                None => drop(services.remove(name)),
            }
            self.skipped.remove(&format!("{}{name}", Services::PREFIX));
            let prefix = format!("{}{name}/", Endpoints::PREFIX);
            let endpoints = self.skipped.range(prefix.clone()..).map(|(key, _)| key);
            let endpoints: Vec<_> = endpoints.take_while(|key| key.starts_with(&prefix)).cloned().collect();
            for key in endpoints {
                // A record whose key names no endpoint is no service's.
                let short = key.strip_prefix(Endpoints::PREFIX).unwrap_or(&key);
                if self.endpoints.get(short).is_none_or(|record| record.id.is_ok()) {
                    self.skipped.remove(&key);
                }
            }
        }
        self.skipped.extend(part.skipped.into_iter().map(|skipped| (skipped.key.clone(), skipped)));
        let catalog = Catalog { services, skipped: self.skipped.values().cloned().collect() };
        if catalog != *self.catalog {
            self.catalog = Arc::new(catalog);
        }
        Arc::clone(&self.catalog)
    }

    /// The catalog of some services.
    fn part(&self, names: &BTreeSet<ServiceName>) -> Catalog {
        let (mut services, mut vips, mut endpoints) = (Vec::new(), BTreeMap::new(), Vec::new());
        for name in names {
            let service = self.services.get(&*name.to_string());
            services.extend(service.cloned());
            let wanted = service.and_then(|record| record.value.as_ref().ok()?.vip);
            let held = self.held.get(name).into_iter().flatten().copied();
            vips.extend(held.chain(wanted).filter_map(|vip| {
                let record = self.vips.get(&*vip.to_string()).filter(|record| record.value.is_ok())?;
                Some((vip, record.clone()))
            }));
            let prefix = format!("{name}/");
            let own =
                self.endpoints.range(Arc::from(&*prefix)..).take_while(|(key, _)| key.starts_with(&prefix));
            endpoints.extend(own.map(|(_, record)| record).filter(|record| record.id.is_ok()).cloned());
        }
        let vips: Vec<_> = vips.into_values().collect();
        Catalog::new(&services, &vips, &endpoints, &self.catalog)
    }

    /// What is to be done about virtual addresses.
    pub(super) fn work(&mut self) -> Arc<Work> {
        if mem::take(&mut self.work_changed) {
            let work = Work::new(self.pool, &self.services, &self.vips, &self.held);
            if work != *self.work {
                self.work = Arc::new(work);
            }
        }
        Arc::clone(&self.work)
    }

    /// A record that is no service's: left out for the reason that the catalog of it alone gives.
    fn stray(&mut self, prefix: &str, key: &str, alone: Option<Catalog>) {
        self.strays_changed = true;
        match alone.and_then(|mut catalog| catalog.skipped.pop()) {
            Some(skipped) => drop(self.skipped.insert(skipped.key.clone(), skipped)),
            None => drop(self.skipped.remove(&format!("{prefix}{key}"))),
        }
    }
}

fn mark<K: Ord + Clone, V: Ord>(map: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: V, comes: bool) {
    if comes {
        map.entry(key.clone()).or_default().insert(value);
    } else if let Some(values) = map.get_mut(key) {
        values.remove(&value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}

impl Indexed for Services {
    fn records(index: &mut Index) -> &mut Records<Self> {
        &mut index.services
    }

    fn touch(index: &mut Index, record: &Record<Self>, comes: bool) {
        index.work_changed = true;
        let Ok(name) = &record.id else {
            let alone =
                comes.then(|| Catalog::new(std::slice::from_ref(record), &[], &[], &Catalog::default()));
            return index.stray(Self::PREFIX, &record.key, alone);
        };
        if let Some(wanted) = record.value.as_ref().ok().and_then(|service| service.vip) {
            mark(&mut index.wanted, &wanted, name.clone(), comes);
        }
        index.touched.insert(name.clone());
    }
}

impl Indexed for Vips {
    fn records(index: &mut Index) -> &mut Records<Self> {
        &mut index.vips
    }

    fn touch(index: &mut Index, record: &Record<Self>, comes: bool) {
        index.work_changed = true;
        let (Ok(vip), Ok(value)) = (&record.id, &record.value) else {
            let alone =
                comes.then(|| Catalog::new(&[], std::slice::from_ref(record), &[], &Catalog::default()));
            return index.stray(Self::PREFIX, &record.key, alone);
        };
        let Vip::Held(holder) = value else { return };
        mark(&mut index.held, holder, *vip, comes);
        index.touched.insert(holder.clone());
        index.touched.extend(index.wanted.get(vip).into_iter().flatten().cloned());
    }
}

impl Indexed for Endpoints {
    fn records(index: &mut Index) -> &mut Records<Self> {
        &mut index.endpoints
    }

    fn share(record: &mut Record<Self>, before: Option<&Record<Self>>) {
        if let (Ok(name), Some(Ok(before))) = (&mut record.id, before.map(|before| &before.id))
            && name.service == before.service
        {
            name.service = before.service.clone();
        }
    }

    fn touch(index: &mut Index, record: &Record<Self>, comes: bool) {
        match &record.id {
            Ok(name) => drop(index.touched.insert(name.service.clone())),
            Err(_) => {
                let alone =
                    comes.then(|| Catalog::new(&[], &[], std::slice::from_ref(record), &Catalog::default()));
                index.stray(Self::PREFIX, &record.key, alone);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::store::Version;

    const POOL: &str = "10.251.0.0/16";

    /// One of the few keys and values that meet each other: usable ones and others.
    fn record(kind: u8, key: u8, value: u8) -> (String, String) {
        let names = ["shop/web", "shop/api", "bank/web", "shop", "shop/we"];
        let name = |number: u8| names[usize::from(number) % names.len()];
        let port = r#""ports":[{"name":"http","port":80,"protocol":"tcp"}]"#;
        match kind % 3 {
            0 => {
                let value = match value % 5 {
                    0 => "{".to_owned(),
                    1 => format!(r#"{{"v":1,"headless":true,{port}}}"#),
                    2 => format!(r#"{{"v":1,{port}}}"#),
                    vip => format!(r#"{{"v":1,"vip":"10.251.0.{}",{port}}}"#, vip % 2),
                };
                (name(key).to_owned(), value)
            }
            1 => {
                let key = ["10.251.0.0", "10.251.0.1", "10.251.0.2", "10.251"][usize::from(key) % 4];
                let value = match value % 8 {
                    6 => r#"{"released":"shop/web"}"#.to_owned(),
                    7 => "{".to_owned(),
                    holder => name(holder).to_owned(),
                };
                (key.to_owned(), value)
            }
            _ => {
                let ends = ["a/1", "b/1", "b", "B/1"];
                let key = format!("{}/{}", name(key), ends[usize::from(key / 8) % ends.len()]);
                (key, [r#"{"overlay_ip":"10.244.1.2"}"#, "{}"][usize::from(value) % 2].to_owned())
            }
        }
    }

    fn put<K: Indexed>(
        index: &mut Index,
        known: &mut Records<K>,
        step: (u8, String, String, i64),
        snapshot: bool,
    ) {
        let (action, key, value, modified) = step;
        let version = Version { modified, ..Version::default() };
        let change = match action % 4 {
            0 => Change::Delete { key: key.into() },
            _ => Change::Put(Record::parse(&key, value.as_bytes(), version)),
        };
        match &change {
            Change::Put(record) => drop(known.insert(record.key.clone(), record.clone())),
            Change::Delete { key } => drop(known.remove(key)),
        }
        match snapshot {
            true => index.replace(known.values().cloned().collect::<Vec<Record<K>>>()),
            false => index.apply(vec![change]),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]
        #[test]
        fn the_catalog_in_steps_is_the_catalog_of_all_records(
            steps in prop::collection::vec((0u8..3, any::<u8>(), any::<u8>(), any::<u8>(), any::<bool>(), any::<bool>()), 1..60)
        ) {
            let mut index = Index::new(POOL.parse().unwrap());
            let (mut services, mut vips, mut endpoints) = (Records::new(), Records::new(), Records::new());
            for (number, (kind, action, key, value, snapshot, look)) in steps.into_iter().enumerate() {
                let (key, value) = record(kind, key, value);
                let step = (action, key, value, number as i64);
                match kind {
                    0 => put::<Services>(&mut index, &mut services, step, snapshot),
                    1 => put::<Vips>(&mut index, &mut vips, step, snapshot),
                    _ => put::<Endpoints>(&mut index, &mut endpoints, step, snapshot),
                }
                if !look {
                    continue;
                }
                let (services, vips, endpoints): (Vec<_>, Vec<_>, Vec<_>) = (
                    services.values().cloned().collect(),
                    vips.values().cloned().collect(),
                    endpoints.values().cloned().collect(),
                );
                let mut whole = Catalog::new(&services, &vips, &endpoints, &Catalog::default());
                whole.skipped.sort_by(|a, b| a.key.cmp(&b.key));
                prop_assert_eq!(&*index.catalog(), &whole);
            }
        }
    }

    /// A measurement with a wide limit: `cargo test --release -p overlay-agent one_change_is_cheap -- --nocapture`.
    #[test]
    fn one_change_is_cheap_among_many_records() {
        let mut index = Index::new(POOL.parse().unwrap());
        let port = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp","target_port":8080}]}"#;
        let version = Version::default();
        let name = |number: usize| format!("ns-{}/service-{number}", number % 100);
        let services = (0..10_000).map(|number| Record::parse(&name(number), port.as_bytes(), version));
        let vips = (0..10_000u32).map(|number| {
            let vip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 251, 1, 0)) + number);
            Record::parse(&vip.to_string(), name(number as usize).as_bytes(), version)
        });
        let endpoints = (0..100_000).map(|number| {
            let key = format!("{}/node-{}/{number}", name(number % 10_000), number % 500);
            Record::parse(&key, br#"{"overlay_ip":"10.244.1.2"}"#, version)
        });
        let (services, vips, endpoints): (Vec<_>, Vec<_>, Vec<_>) =
            (services.collect(), vips.collect(), endpoints.collect());
        let started = Instant::now();
        index.replace::<Services>(services);
        index.replace::<Vips>(vips);
        index.replace::<Endpoints>(endpoints);
        let (catalog, _) = (index.catalog(), index.work());
        let all = started.elapsed();
        assert_eq!((catalog.services.len(), catalog.skipped.len()), (10_000, 0));
        let started = Instant::now();
        let draining = br#"{"overlay_ip":"10.244.1.2","state":"draining"}"#;
        let change = Record::parse(&format!("{}/node-0/0", name(0)), draining, version);
        index.apply::<Endpoints>(vec![Change::Put(change)]);
        let changed = index.catalog();
        let one = started.elapsed();
        index.apply::<Services>(vec![Change::Delete { key: name(1).into() }]);
        let started = Instant::now();
        let fewer = (index.catalog(), index.work());
        let removal = started.elapsed();
        println!(
            "all records {all:?}, one endpoint {one:?}, one service with the work for addresses {removal:?}"
        );
        let differ =
            changed.services.iter().filter(|(name, service)| !Arc::ptr_eq(service, &catalog.services[*name]));
        assert_eq!(differ.count(), 1);
        assert_eq!((fewer.0.services.len(), fewer.0.skipped.len(), fewer.1.surplus.len()), (9_999, 10, 1));
        assert!(one < all, "a change costs less than everything");
    }
}
