//! Runs the passes of some tensors, then writes them.

use std::collections::BTreeMap;

use super::chunk::{copy, Slot, Work};
use super::factors::Factors;
use super::kernel::{Gathered, Kernel};
use super::plan::{Action, Plan};
use super::report::TensorReport;
use super::task::Task;
use crate::checkpoint::{StagedFile, CHUNK_BYTES};
use crate::parallel::{pipeline, threads};
use crate::progress::Progress;
use crate::Result;

/// A chunk of a tensor: the place of the tensor in its group, and the number of the chunk.
type Item = (usize, usize);

/// Writes what is left of the tensors of a group and adds what became of them to `reports`.
///
/// # Errors
/// [`crate::Error`] of the first chunk, in order, that failed.
pub fn write_group(
    plan: &Plan,
    mut tasks: Vec<Task<'_>>,
    factors: &Factors,
    slots: &mut Vec<Slot>,
    writer: &mut StagedFile<'_>,
    progress: &mut dyn Progress,
    reports: &mut BTreeMap<String, TensorReport>,
) -> Result<()> {
    let mut kernels = tasks.iter().map(|task| plan.kernel(task.job)).collect::<Result<Vec<_>>>()?;
    let jobs: Vec<_> = tasks.iter().map(|task| (task.number, task.job)).collect();
    let work = |place: usize| {
        let (number, job) = jobs[place];
        match &job.action {
            Action::Merge(merge) => Some(Work { plan, factors, number, job, merge }),
            Action::Copy => None,
        }
    };
    while gather(&mut kernels, &work, slots, &mut |place| progress.advance(0, &jobs[place].1.name))? {}

    for (task, kernel) in tasks.iter_mut().zip(&kernels) {
        if kernel.as_deref().is_some_and(Kernel::counts_while_combining) {
            task.restart(writer);
        }
    }
    let left = |place: usize| (tasks[place].done..tasks[place].chunks).map(move |chunk| (place, chunk));
    let items: Vec<Item> = (0..tasks.len()).flat_map(left).collect();
    let fill = |item: usize, slot: &mut Slot| {
        let (place, chunk) = items[item];
        match (work(place), &kernels[place]) {
            (Some(work), Some(kernel)) => work.combine(kernel.as_ref(), chunk, slot),
            _ => copy(plan.tensor(jobs[place].1), jobs[place].1, (chunk * CHUNK_BYTES) as u64, slot),
        }
    };
    let commit = |item: usize, slot: &mut Slot| {
        let (place, chunk) = items[item];
        let (job, tensor) = (jobs[place].1, plan.tensor(jobs[place].1));
        let is_copy = kernels[place].is_none() && job.out == tensor.info.dtype;
        let source = is_copy.then(|| (tensor.shard, tensor.info.offset + (chunk * CHUNK_BYTES) as u64));
        writer.append_from(&job.name, &slot.output, source)?;
        let task = &mut tasks[place];
        task.add(&slot.gathered);
        if task.is_finished() {
            task.branch = kernels[place].as_deref().and_then(Kernel::branch);
        }
        writer.mark(&[&job.name], tasks[place].state())?;
        progress.advance(slot.output.len() as u64, &job.name)
    };
    pipeline(threads(), slots, items.len(), fill, commit)?;
    for (mut task, kernel) in tasks.into_iter().zip(kernels) {
        task.branch = kernel.as_deref().and_then(Kernel::branch);
        reports.extend(task.report());
    }
    Ok(())
}

/// Runs the next pass over the tensors whose kernels ask for one; false if none does.
fn gather<'w>(
    kernels: &mut [Option<Box<dyn Kernel>>],
    work: &(impl Fn(usize) -> Option<Work<'w>> + Sync),
    slots: &mut Vec<Slot>,
    advance: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<bool> {
    let asks = |place: usize| Some((work(place)?, kernels[place].as_deref()?.pass()?));
    let places: Vec<usize> = (0..kernels.len()).filter(|&place| asks(place).is_some()).collect();
    let chunks = |&place: &usize| {
        (0..asks(place).map_or(0, |(work, _)| work.merge.grid.chunks())).map(move |chunk| (place, chunk))
    };
    let items: Vec<Item> = places.iter().flat_map(chunks).collect();
    if items.is_empty() {
        return Ok(false);
    }
    let mut all: BTreeMap<usize, Gathered> = places.iter().map(|&place| (place, Gathered::default())).collect();
    let look = |item: usize, slot: &mut Slot| {
        let (place, chunk) = items[item];
        let (work, reads) = asks(place).expect("it asked");
        work.gather(kernels[place].as_deref().expect("it asked"), reads, chunk, slot)
    };
    let commit = |item: usize, slot: &mut Slot| {
        let place = items[item].0;
        all.get_mut(&place).expect("one for each place").add(&slot.gathered);
        advance(place)
    };
    pipeline(threads(), slots, items.len(), look, commit)?;
    for (place, gathered) in all {
        kernels[place].as_deref_mut().expect("it asked").learn(gathered);
    }
    Ok(true)
}
