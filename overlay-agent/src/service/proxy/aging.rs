//! An order of things by when they were last used, which costs nothing when they are used: the order learns of it when it is asked.

use std::collections::BTreeSet;

/// Keys in the order in which they were last known to be used.
#[derive(Debug)]
pub(super) struct AgeOrder<K> {
    /// Each key with a time at which it was used. It may have been used since.
    order: BTreeSet<(u64, K)>,
}

impl<K: Ord> AgeOrder<K> {
    /// An empty one.
    pub(super) const fn new() -> Self {
        Self { order: BTreeSet::new() }
    }

    /// Adds a key that was used at `time`.
    pub(super) fn add(&mut self, key: K, time: u64) {
        self.order.insert((time, key));
    }

    /// Takes out the key that was used least recently, if that was at `limit` or before. `used` tells when a key was really used,
    /// `None` for one that is gone.
    pub(super) fn take_oldest(&mut self, limit: u64, used: impl Fn(&K) -> Option<u64>) -> Option<K> {
        loop {
            let (known, key) = self.order.pop_first()?;
            if known > limit {
                self.order.insert((known, key));
                return None;
            }
            match used(&key) {
                Some(since) if since > known => {
                    self.order.insert((since, key));
                }
                Some(_) => return Some(key),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut order = AgeOrder::new();
        let mut used = BTreeMap::from([("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
        for (key, time) in &used {
            order.add(*key, *time);
        }
        used.insert("a", 9);
        used.remove("c");
        let mut take = |limit| order.take_oldest(limit, |key| used.get(key).copied());
        assert_eq!(take(1), None);
        assert_eq!(take(8), Some("b"));
        assert_eq!(take(8), Some("d"));
        assert_eq!(take(8), None);
        assert_eq!(take(9), Some("a"));
        assert_eq!(take(u64::MAX), None);
    }
}
