//! Work in any order, results in one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::{install, threads};

/// Works on items `0..count` in parallel and hands the results to `commit` in order of the items.
///
/// What `commit` sums up is thus the same for any number of threads. Items are started in order, so few results
/// wait for an earlier one. A slot is memory that an item's work may use, `commit` included, and then leaves to another.
pub fn ordered<Slot: Default + Send>(
    count: usize,
    work: impl Fn(usize, &mut Slot) + Sync,
    commit: impl FnMut(usize, &mut Slot) + Send,
) {
    if threads() == 1 || count < 2 {
        let (mut slot, mut commit) = (Slot::default(), commit);
        for item in 0..count {
            work(item, &mut slot);
            commit(item, &mut slot);
        }
        return;
    }
    let started = AtomicUsize::new(0);
    let free = Mutex::new(Vec::new());
    let line = Mutex::new(Line { next: 0, waiting: BTreeMap::new(), commit });
    let worker = || loop {
        let item = started.fetch_add(1, Ordering::Relaxed);
        if item >= count {
            break;
        }
        let slot = lock(&free).pop();
        let mut slot: Slot = slot.unwrap_or_default();
        work(item, &mut slot);
        lock(&line).arrive(item, slot, |slot| lock(&free).push(slot));
    };
    install(|| rayon::broadcast(|_| worker()));
}

/// Results on their way to `commit`.
struct Line<Slot, Commit> {
    next: usize,
    waiting: BTreeMap<usize, Slot>,
    commit: Commit,
}

impl<Slot, Commit: FnMut(usize, &mut Slot)> Line<Slot, Commit> {
    /// Commits what is due now that `item` is done.
    fn arrive(&mut self, item: usize, slot: Slot, mut give_back: impl FnMut(Slot)) {
        self.waiting.insert(item, slot);
        while let Some(mut slot) = self.waiting.remove(&self.next) {
            (self.commit)(self.next, &mut slot);
            self.next += 1;
            give_back(slot);
        }
    }
}

/// A panic of another worker ends the whole call; until then its lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::parallel::with_threads;

    #[test]
    fn results_arrive_in_order_whatever_the_threads() {
        for threads in [1, 2, 5] {
            let mut seen = Vec::new();
            with_threads(NonZeroUsize::new(threads).unwrap(), || {
                let work = |item: usize, slot: &mut usize| {
                    std::thread::sleep(std::time::Duration::from_micros((item * 37 % 11) as u64 * 20));
                    *slot = item * item;
                };
                ordered(100, work, |item, slot| seen.push((item, *slot)));
            });
            assert_eq!(seen, (0..100).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
    }
}
