//! Thins out deltas by how large their values are in the whole tensor: what TIES and breadcrumbs have in common.

use super::task_vectors::Thin;
use crate::merge::kernel::{Block, Gathered, Reads};
use crate::merge::select::Largest;

/// What becomes of the values among the largest of a cut, and of all others.
#[derive(Clone, Copy)]
pub enum Keep {
    /// The largest stay.
    Largest,
    /// The others stay.
    Others,
}

/// Applies cuts of [`Largest`] one after the other.
pub struct ByMagnitude {
    largest: Largest,
    cuts: &'static [(usize, Keep)],
}

impl ByMagnitude {
    /// `cuts` names cuts of `largest` by their place there.
    pub fn new(largest: Largest, cuts: &'static [(usize, Keep)]) -> Self {
        Self { largest, cuts }
    }
}

impl Thin for ByMagnitude {
    fn pass(&self) -> Option<Reads> {
        self.largest.pass()
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        self.largest.gather(block, into);
    }

    fn learn(&mut self, all: Gathered) {
        self.largest.learn(&all);
    }

    fn thin(&self, input: usize, start: u64, delta: &mut [f32]) {
        for &(cut, keep) in self.cuts {
            self.largest.keep(input, cut, start, matches!(keep, Keep::Others), delta);
        }
    }
}
