//! Which services differ from those of the catalog before: a service that has not changed is the same `Arc` in both. Pure.

use std::{collections::BTreeMap, sync::Arc};

use super::{Catalog, ServiceName, catalog::Service};

/// The services of the last catalog.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<ServiceName, Arc<Service>>);

/// What differs.
#[derive(Debug, Default)]
pub struct Changes {
    /// The services that are new or other than before.
    pub changed: Catalog,
    /// Those that were changed or removed, as they were.
    pub former: Vec<Arc<Service>>,
}

impl Seen {
    /// Takes the next catalog. Costs a pass over the names of all services.
    pub fn update(&mut self, catalog: &Catalog) -> Changes {
        let mut changes = Changes::default();
        let mut removed = Vec::new();
        let mut before = self.0.iter().peekable();
        for (name, service) in &catalog.services {
            while let Some(gone) = before.next_if(|(other, _)| *other < name) {
                removed.push(gone);
            }
            match before.next_if(|(other, _)| *other == name) {
                Some((_, same)) if Arc::ptr_eq(same, service) => continue,
                other => changes.former.extend(other.map(|(_, former)| Arc::clone(former))),
            }
            changes.changed.services.insert(name.clone(), Arc::clone(service));
        }
        removed.extend(before);
        changes.former.extend(removed.iter().map(|(_, former)| Arc::clone(former)));
        let removed: Vec<ServiceName> = removed.into_iter().map(|(name, _)| name.clone()).collect();
        removed.iter().for_each(|name| drop(self.0.remove(name)));
        self.0.extend(changes.changed.services.clone());
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::catalog::tests::records;

    fn next(names: &[&str], before: &Catalog) -> Catalog {
        let json = r#"{"v":1,"ports":[{"name":"p","port":1}]}"#;
        let services: Vec<_> = names.iter().map(|name| (*name, json)).collect();
        Catalog::new(&records(&services), &[], &[], before)
    }

    #[test]
    fn only_what_differs_is_returned() {
        let mut seen = Seen::default();
        let mut update = |catalog: &Catalog| {
            let Changes { changed, former } = seen.update(catalog);
            let former: Vec<_> = former.iter().map(|service| service.name.to_string()).collect();
            (changed.services.keys().map(ToString::to_string).collect::<Vec<_>>().join(" "), former.join(" "))
        };
        let text = |changed: &str, former: &str| (changed.to_owned(), former.to_owned());
        let first = next(&["a/b", "a/d", "a/f"], &Catalog::default());
        assert_eq!(update(&first), text("a/b a/d a/f", ""));
        assert_eq!(update(&first), text("", ""));
        let second = next(&["a/a", "a/d", "a/g"], &first);
        assert_eq!(update(&second), text("a/a a/g", "a/b a/f"));
        let third = next(&["a/a", "a/d", "a/g"], &Catalog::default());
        assert_eq!(update(&third), text("a/a a/d a/g", "a/a a/d a/g"));
        assert_eq!(update(&Catalog::default()), text("", "a/a a/d a/g"));
        assert_eq!(update(&first), text("a/b a/d a/f", ""));
    }
}
