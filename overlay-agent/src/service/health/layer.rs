//! A catalog in which some endpoints are changed, on top of another one. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::service::{
    Catalog, ServiceName,
    catalog::{Endpoint, Service},
};

/// The last catalog that was made, and what it was made of. Services without a change are the `Arc`s of the catalog below.
#[derive(Debug, Default)]
pub(super) struct Layer {
    below: Arc<Catalog>,
    above: Arc<Catalog>,
    changed: BTreeMap<ServiceName, Arc<Service>>,
}

impl Layer {
    /// Makes the catalog on top of `below`: `change` may change the endpoints of `services`. The same `Arc` as before when nothing has
    /// changed. Costs a pass over the endpoints of these services, and a copy of the map of all services if there are any.
    pub(super) fn lay(
        &mut self,
        below: &Arc<Catalog>,
        services: &BTreeSet<ServiceName>,
        change: impl Fn(&mut Endpoint),
    ) -> Arc<Catalog> {
        let mut changed = BTreeMap::new();
        for (name, base) in services.iter().filter_map(|name| below.services.get_key_value(name)) {
            let mut service = Service::clone(base);
            service.endpoints.iter_mut().for_each(&change);
            if service != **base {
                let before = self.changed.get(name).filter(|before| ***before == service);
                let service = before.map_or_else(|| Arc::new(service), Arc::clone);
                changed.insert(name.clone(), service);
            }
        }
        let is_same = |(name, service): (&ServiceName, &Arc<Service>)| {
            self.changed.get(name).is_some_and(|before| Arc::ptr_eq(before, service))
        };
        let is_unchanged = Arc::ptr_eq(below, &self.below)
            && changed.len() == self.changed.len()
            && changed.iter().all(is_same);
        if !is_unchanged {
            self.above = if changed.is_empty() {
                Arc::clone(below)
            } else {
                let mut services = below.services.clone();
                services.extend(changed.clone());
                Arc::new(Catalog { services, skipped: below.skipped.clone() })
            };
            (self.below, self.changed) = (Arc::clone(below), changed);
        }
        Arc::clone(&self.above)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::health::tests::{WEB, catalog};

    #[test]
    fn only_services_with_a_change_are_copied() {
        let services = [("shop/web", WEB), ("shop/api", WEB)];
        let endpoints = [
            ("shop/web/a/1", r#"{"overlay_ip":"10.244.1.1"}"#),
            ("shop/api/a/1", r#"{"overlay_ip":"10.244.1.2"}"#),
        ];
        let below = catalog(&services, &endpoints);
        let mut layer = Layer::default();
        let [web, api] = ["shop/web", "shop/api"].map(|name| name.parse::<ServiceName>().unwrap());
        let both = BTreeSet::from([web.clone(), api.clone(), "shop/none".parse().unwrap()]);
        let eject = |endpoint: &mut Endpoint| endpoint.local.is_ejected = endpoint.name.service == web;
        let above = layer.lay(&below, &both, eject);
        assert!(above.services[&web].endpoints[0].local.is_ejected && above.vips() == below.vips());
        assert!(Arc::ptr_eq(&above.services[&api], &below.services[&api]));
        assert!(Arc::ptr_eq(&above, &layer.lay(&below, &both, eject)));

        // Another service changes below: the changed one stays the same.
        let more = [endpoints[0], endpoints[1], ("shop/api/a/2", r#"{"overlay_ip":"10.244.1.3"}"#)];
        let next = catalog(&services, &more);
        let after = layer.lay(&next, &both, eject);
        assert!(Arc::ptr_eq(&after.services[&web], &above.services[&web]));
        assert_eq!(after.services[&api].endpoints.len(), 2);
        assert!(Arc::ptr_eq(&layer.lay(&next, &BTreeSet::new(), eject), &next));
        assert!(Arc::ptr_eq(&layer.lay(&next, &both, |_| {}), &next));
    }
}
