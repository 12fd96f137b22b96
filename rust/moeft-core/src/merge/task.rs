//! What is left to do of a tensor, and what is known of the part that is written.

use serde::{Deserialize, Serialize};

use super::kernel::Gathered;
use super::plan::{Action, Job, Plan};
use super::report::TensorReport;
use crate::checkpoint::{StagedFile, CHUNK_BYTES};

/// A tensor of the output while it is written.
pub struct Task<'a> {
    /// A number of the tensor, different from all others of its file.
    pub number: u64,
    /// The tensor.
    pub job: &'a Job,
    /// Chunks that are written, and all of them.
    pub done: usize,
    pub chunks: usize,
    /// What was done where the values decide it.
    pub branch: Option<String>,
    /// What the report says, of the chunks that are written.
    found: Gathered,
}

/// As the journal keeps it: floats by their bits, which decimal digits may not give back.
#[derive(Serialize, Deserialize)]
pub struct State {
    chunks: usize,
    sums: Vec<u64>,
    range: [u32; 2],
    branch: Option<String>,
}

impl<'a> Task<'a> {
    /// Goes on where an earlier run was.
    pub fn resume(plan: &Plan, number: u64, job: &'a Job, writer: &mut StagedFile<'_>) -> Self {
        let chunks = match &job.action {
            Action::Merge(merge) => merge.grid.chunks(),
            Action::Copy => plan.tensor(job).info.bytes.div_ceil(CHUNK_BYTES as u64) as usize,
        };
        let mut task = Self { number, job, done: 0, chunks, branch: None, found: Gathered::default() };
        match writer.state::<State>(&job.name).filter(|state| state.chunks <= chunks) {
            Some(state) => {
                task.done = state.chunks;
                task.branch = state.branch;
                task.found.sums = state.sums.into_iter().map(f64::from_bits).collect();
                task.found.range = state.range.map(f32::from_bits);
            }
            None => writer.restart(&job.name),
        }
        task
    }

    /// Starts over.
    pub fn restart(&mut self, writer: &mut StagedFile<'_>) {
        writer.restart(&self.job.name);
        (self.done, self.found) = (0, Gathered::default());
    }

    /// Whether every chunk is written.
    pub fn is_finished(&self) -> bool {
        self.done > 0 && self.done == self.chunks
    }

    /// Takes in the next chunk.
    pub fn add(&mut self, gathered: &Gathered) {
        self.done += 1;
        if matches!(self.job.action, Action::Merge(_)) {
            self.found.add(gathered);
        }
    }

    /// What a run that goes on from here has to know.
    pub fn state(&self) -> State {
        State {
            chunks: self.done,
            sums: self.found.sums.iter().map(|sum| sum.to_bits()).collect(),
            range: self.found.range.map(f32::to_bits),
            branch: self.branch.clone(),
        }
    }

    /// What became of the tensor; `None` of one that is copied.
    pub fn report(self) -> Option<(String, TensorReport)> {
        match &self.job.action {
            Action::Merge(_) => Some((self.job.name.clone(), TensorReport::new(self.branch, &self.found))),
            Action::Copy => None,
        }
    }
}
