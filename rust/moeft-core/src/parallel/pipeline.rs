//! Work on threads, results in order on the thread that asked.

use std::collections::BTreeMap;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Works on items `0..count` with `workers` threads and hands the results to `commit` in order, on this thread.
///
/// A slot is memory for one item: a worker fills it, `commit` empties it. As many items are under way as there are slots,
/// so a slow `commit` holds the workers back, and items start in order. What `commit` writes or sums up is the same for
/// any number of threads. Afterwards `slots` holds the slots again, for the next call.
///
/// # Errors
/// The error of the first item, in order, whose work or commit failed; later items may have been worked on then.
///
/// # Panics
/// If there is no slot: our own mistake. A panic of `work` goes on here.
pub fn pipeline<Slot: Send, E: Send>(
    workers: usize,
    slots: &mut Vec<Slot>,
    count: usize,
    work: impl Fn(usize, &mut Slot) -> Result<(), E> + Sync,
    mut commit: impl FnMut(usize, &mut Slot) -> Result<(), E>,
) -> Result<(), E> {
    assert!(!slots.is_empty());
    if count == 1 {
        work(0, &mut slots[0])?;
        return commit(0, &mut slots[0]);
    }
    let line = Line::new(count, std::mem::take(slots));
    let (done, arrived) = channel();
    let result = std::thread::scope(|scope| {
        // However this closure ends, every worker stops at its next item.
        let _end = EndOfLine(&line);
        for _ in 0..workers.clamp(1, count.max(1)) {
            let (done, line, work) = (done.clone(), &line, &work);
            scope.spawn(move || {
                while let Some((item, mut slot)) = line.start() {
                    let result = catch_unwind(AssertUnwindSafe(|| work(item, &mut slot)));
                    if done.send((item, slot, result)).is_err() {
                        break;
                    }
                }
            });
        }
        let arrived = arrived;
        let mut waiting = BTreeMap::new();
        for next in 0..count {
            let (mut slot, result) = loop {
                if let Some(found) = waiting.remove(&next) {
                    break found;
                }
                let (item, slot, result) = arrived.recv().expect("this function holds a sender");
                waiting.insert(item, (slot, result));
            };
            match result {
                Ok(result) => result?,
                Err(panic) => resume_unwind(panic),
            }
            commit(next, &mut slot)?;
            line.give_back(slot);
        }
        Ok(())
    });
    *slots = line.state.into_inner().unwrap_or_else(PoisonError::into_inner).free;
    result
}

/// What is started next, and with what.
struct Line<Slot> {
    state: Mutex<State<Slot>>,
    given_back: Condvar,
}

struct State<Slot> {
    left: std::ops::Range<usize>,
    /// The last one given back goes first, as it may still lie in the caches.
    free: Vec<Slot>,
}

impl<Slot> Line<Slot> {
    fn new(count: usize, free: Vec<Slot>) -> Self {
        Self { state: Mutex::new(State { left: 0..count, free }), given_back: Condvar::new() }
    }

    /// The next item and a slot for it, after waiting for one; `None` if there are no more items.
    fn start(&self) -> Option<(usize, Slot)> {
        let is_short = |state: &mut State<Slot>| state.free.is_empty() && !state.left.is_empty();
        let waited = self.given_back.wait_while(self.lock(), is_short);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        Some((state.left.next()?, state.free.pop()?))
    }

    fn give_back(&self, slot: Slot) {
        self.lock().free.push(slot);
        self.given_back.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State<Slot>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets no item start after it is dropped.
struct EndOfLine<'l, Slot>(&'l Line<Slot>);

impl<Slot> Drop for EndOfLine<'_, Slot> {
    fn drop(&mut self) {
        self.0.lock().left = 0..0;
        self.0.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_committed_in_order_with_few_slots() {
        for (workers, slots) in [(1, 1), (2, 2), (5, 3)] {
            let mut seen = Vec::new();
            let mut slots = vec![0usize; slots];
            let before = slots.len();
            let work = |item: usize, slot: &mut usize| {
                std::thread::sleep(std::time::Duration::from_micros((item * 37 % 11) as u64 * 20));
                *slot = item * item;
                Ok::<(), ()>(())
            };
            let commit = |item, slot: &mut usize| {
                seen.push((item, *slot));
                Ok(())
            };
            pipeline(workers, &mut slots, 100, work, commit).unwrap();
            assert_eq!(seen, (0..100).map(|i| (i, i * i)).collect::<Vec<_>>());
            assert_eq!(slots.len(), before);
        }
    }

    #[test]
    fn the_first_error_in_order_ends_the_call() {
        for failing_commit in [false, true] {
            let work = |item, _: &mut ()| if item >= 7 && !failing_commit { Err(item) } else { Ok(()) };
            let commit = |item, _: &mut ()| if item == 7 { Err(item) } else { Ok(()) };
            assert_eq!(pipeline(3, &mut vec![(); 4], 1000, work, commit), Err(7));
        }
    }

    #[test]
    #[should_panic(expected = "our own mistake")]
    fn a_panic_of_a_worker_goes_on_in_the_caller() {
        let work = |item, _: &mut ()| if item == 3 { panic!("our own mistake") } else { Ok::<(), ()>(()) };
        let _ = pipeline(2, &mut vec![(); 2], 10, work, |_, _| Ok(()));
    }
}
