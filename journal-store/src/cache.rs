//! Recently used values within a budget of bytes: decompressed data, open files.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Keeps the most recently used values while their weights fit the budget. A value over the budget is not kept.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    budget: usize,
    inner: Mutex<Inner<K, V>>,
}

#[derive(Debug)]
struct Inner<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Keys by the time of their last use.
    by_use: BTreeMap<u64, K>,
    clock: u64,
    used: usize,
    /// The clock when unused values were last forgotten.
    forgotten_at: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: usize,
    last_use: u64,
}

impl<K: Eq + Hash + Copy, V: Clone> Cache<K, V> {
    pub(crate) fn new(budget: usize) -> Self {
        let inner =
            Inner { entries: HashMap::new(), by_use: BTreeMap::new(), clock: 0, used: 0, forgotten_at: 0 };
        Self { budget, inner: Mutex::new(inner) }
    }

    pub(crate) fn get(&self, key: K) -> Option<V> {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.clock += 1;
        let entry = inner.entries.get_mut(&key)?;
        inner.by_use.remove(&entry.last_use);
        entry.last_use = inner.clock;
        inner.by_use.insert(inner.clock, key);
        Some(entry.value.clone())
    }

    pub(crate) fn put(&self, key: K, value: V, weight: usize) {
        if weight > self.budget {
            return;
        }
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.clock += 1;
        let last_use = inner.clock;
        if let Some(old) = inner.entries.insert(key, Entry { value, weight, last_use }) {
            inner.by_use.remove(&old.last_use);
            inner.used -= old.weight;
        }
        inner.by_use.insert(last_use, key);
        inner.used += weight;
        while inner.used > self.budget
            && let Some((_, oldest)) = inner.by_use.pop_first()
        {
            inner.used -= inner.entries.remove(&oldest).map_or(0, |entry| entry.weight);
        }
    }

    /// Forgets the values that were not used since the last call.
    pub(crate) fn forget_unused(&self) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let used_since = inner.by_use.split_off(&inner.forgotten_at.saturating_add(1));
        for key in std::mem::replace(&mut inner.by_use, used_since).into_values() {
            inner.used -= inner.entries.remove(&key).map_or(0, |entry| entry.weight);
        }
        inner.forgotten_at = inner.clock;
        inner.entries.shrink_to_fit();
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        // What a panicking thread leaves behind is at worst a cache that forgets too much.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first_and_the_budget_holds() {
        let cache = Cache::new(10);
        cache.put(1, "one", 4);
        cache.put(2, "two", 4);
        assert_eq!(cache.get(1), Some("one"));
        cache.put(3, "three", 4);
        assert_eq!((cache.get(1), cache.get(2), cache.get(3)), (Some("one"), None, Some("three")));
        cache.put(4, "too large", 11);
        assert_eq!(cache.get(4), None);
        cache.put(1, "one again", 10);
        assert_eq!((cache.get(1), cache.get(3)), (Some("one again"), None));
    }

    #[test]
    fn what_was_not_used_between_two_calls_is_forgotten() {
        let cache = Cache::new(10);
        cache.put(1, "one", 4);
        cache.put(2, "two", 4);
        cache.forget_unused();
        assert_eq!(cache.get(2), Some("two"));
        cache.forget_unused();
        assert_eq!((cache.get(1), cache.get(2)), (None, Some("two")));
        cache.put(3, "three", 6);
        assert_eq!((cache.get(2), cache.get(3)), (Some("two"), Some("three")), "the room is given back");
        cache.forget_unused();
        cache.forget_unused();
        assert_eq!(cache.lock().used, 0);
    }
}
