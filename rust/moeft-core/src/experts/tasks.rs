//! The rows of all experts, cut into tasks.

use std::ops::Range;

use super::block::Routing;
use crate::gemm::{Lanes, LANES};

/// Rows of a task: enough that restoring a weight costs little beside multiplying by it, and few enough that a
/// task's rows fit a cache. A multiple of [`LANES`].
const TASK_ROWS: usize = 256;

/// Rows of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    /// The expert.
    pub expert: usize,
    /// Sorted positions of the rows; never empty.
    pub positions: Range<usize>,
}

/// The tasks of a routing, by expert and position. They do not depend on the number of threads.
pub(super) fn tasks(routing: &Routing<'_>) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (expert, bounds) in routing.offsets.windows(2).enumerate() {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        for start in (start..end).step_by(TASK_ROWS) {
            tasks.push(Task { expert, positions: start..end.min(start + TASK_ROWS) });
        }
    }
    tasks
}

/// Routing weights of a task's rows, one lane per block; zero beyond the last row.
pub(super) fn weight_lanes(routing: &Routing<'_>, task: &Task, lanes: &mut Vec<Lanes>) {
    lanes.clear();
    lanes.resize(task.positions.len().div_ceil(LANES), Lanes::default());
    for (i, position) in task.positions.clone().enumerate() {
        lanes[i / LANES].0[i % LANES] = routing.weights[routing.row(position)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_row_once_and_stay_within_an_expert() {
        let routing = Routing { permutation: &[], offsets: &[0, 0, 3, 600, 600], weights: &[], top_k: 1 };
        let found: Vec<_> = tasks(&routing).into_iter().map(|t| (t.expert, t.positions)).collect();
        assert_eq!(found, [(1, 0..3), (2, 3..259), (2, 259..515), (2, 515..600)]);
    }
}
