//! How many threads the kernels of a call may use, and the pools that hold them.
//!
//! Pools are ours and not rayon's global one, for two reasons: the limit may differ from call to call
//! (`torch.set_num_threads`), and threads do not survive `fork`, so a forked process needs new ones.

mod ordered;
mod pipeline;

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};

pub use ordered::ordered;
pub use pipeline::pipeline;
use rayon::{ThreadPool, ThreadPoolBuilder};

thread_local! {
    /// Limit of the call in progress on this thread.
    static LIMIT: Cell<Option<NonZeroUsize>> = const { Cell::new(None) };
}

/// `RAYON_NUM_THREADS` if it is set to a positive number, else the number of cores this process may use.
static MACHINE: LazyLock<NonZeroUsize> = LazyLock::new(|| {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.trim().parse().ok());
    asked.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN)
});

/// Calls `work` with at most `limit` threads for the kernels in it. `RAYON_NUM_THREADS` still caps it.
pub fn with_threads<R>(limit: NonZeroUsize, work: impl FnOnce() -> R) -> R {
    struct Restore(Option<NonZeroUsize>);
    impl Drop for Restore {
        fn drop(&mut self) {
            LIMIT.set(self.0);
        }
    }
    let _restore = Restore(LIMIT.replace(Some(limit)));
    work()
}

/// Threads that kernels called from this thread may use.
pub fn threads() -> usize {
    let machine = *MACHINE;
    LIMIT.get().map_or(machine, |limit| limit.min(machine)).get()
}

/// Runs `work` in a pool of [`threads()`] threads; rayon's parallel iterators in it use that pool.
///
/// Costs some microseconds even for one thread: callers take a plain loop for little work.
pub fn install<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    // A pool that already runs us has the right size, because this function chose it.
    if rayon::current_thread_index().is_some() {
        return work();
    }
    pool(threads()).install(work)
}

/// The pool of that many threads in this process.
fn pool(threads: usize) -> Arc<ThreadPool> {
    let mut pools = Process::current().pools.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, pool)) = pools.iter().find(|(size, _)| *size == threads) {
        return Arc::clone(pool);
    }
    let named = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("moeft-{i}"));
    let pool = Arc::new(named.build().expect("the system gives no more threads"));
    pools.push((threads, Arc::clone(&pool)));
    pool
}

/// The pools of one process, by size, and what a child of it adds.
///
/// A lock of our own for each process, because another thread may hold the parent's at the moment of the fork, and in
/// the child nobody would ever release it.
struct Process {
    id: u32,
    pools: Mutex<Vec<(usize, Arc<ThreadPool>)>>,
    child: OnceLock<Box<Process>>,
}

impl Process {
    fn current() -> &'static Self {
        static FIRST: OnceLock<Process> = OnceLock::new();

        let id = std::process::id();
        let new = || Self { id, pools: Mutex::default(), child: OnceLock::new() };
        let mut process = FIRST.get_or_init(new);
        while process.id != id {
            process = process.child.get_or_init(|| Box::new(new()));
        }
        process
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn a_limit_holds_inside_and_ends_with_the_call() {
        let outside = threads();
        let (inside, used) = with_threads(NonZeroUsize::MIN, || (threads(), install(rayon::current_num_threads)));
        assert_eq!((inside, used, threads()), (1, 1, outside));
    }

    #[test]
    fn nested_calls_stay_in_one_pool() {
        let sum: usize = install(|| (0..100).into_par_iter().map(|i| install(|| i)).sum());
        assert_eq!(sum, 4950);
    }
}
