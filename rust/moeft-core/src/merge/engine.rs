//! Runs a merge: read, compute and write at the same time, in bounded memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::chunk::Slot;
use super::factors::{side_bytes, Factors};
use super::files::{files, OutputFile};
use super::group::write_group;
use super::manifest;
use super::plan::{Action, Job, Plan, Values};
use super::recipe::Recipe;
use super::report::{BaseCheck, MergeReport, TensorReport};
use super::task::Task;
use crate::adapter::{Adapter, AdapterError};
use crate::checkpoint::folder::{copy_side_files, write_index, write_json};
use crate::checkpoint::stage::{check_output_of, plan_hash, Stage};
use crate::checkpoint::{fingerprint, Checkpoint, Dtype, StagedFile, CHUNK_BYTES, SINGLE};
use crate::isa::Isa;
use crate::parallel::threads;
use crate::progress::Progress;
use crate::Result;

/// Bytes of output after which tensors wait for those before them: what one pass has read, the next finds in memory.
const GROUP_BYTES: u64 = 64 << 20;
/// Memory for what passes count, over all tensors of a group: 512 KiB for each model of a tensor.
const GROUP_MODELS: usize = 64;
/// Memory for all chunks under way.
const SLOTS_BYTES: usize = 80 << 20;

/// What does not change the values of a merge.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Options {
    /// Cut the output anew into files of at most so many bytes; `None` keeps the files of the base.
    pub max_shard_bytes: Option<u64>,
}

/// Merges what `recipe` says into the new folder `out`.
///
/// Writes to `OUT.partial` and renames it when all is on the disk. An interrupted merge goes on where it was when the
/// same merge is started again. The bytes do not depend on the number of threads.
///
/// # Errors
/// [`crate::Error`]; nothing is under the final name then, and the inputs are never changed.
pub fn merge(recipe: Recipe, out: &Path, options: Options, progress: &mut dyn Progress) -> Result<MergeReport> {
    let started = Instant::now();
    Isa::active()?;
    let plan = Plan::resolve(recipe)?;
    for input in inputs(&plan) {
        check_output_of(&input.path, out)?;
    }
    let base_fingerprint = fingerprint(plan.base())?;
    let base_check = check_base(&plan.adapters, &base_fingerprint)?;
    let scalings: Vec<_> = plan.adapters.iter().map(Adapter::scalings).collect();
    let fields = &plan.checkpoints[0].config.fields;
    let summary = ("merge", &plan.recipe, &plan.jobs, &plan.importance, scalings, fields, options);
    let mut stage = Stage::open(out, &plan_hash(&summary, inputs(&plan))?)?;

    let files = files(&plan, options.max_shard_bytes)?;
    let tensors = || files.iter().flat_map(|file| file.header.tensors.iter().map(move |tensor| (&file.name, tensor)));
    let bytes = tensors().map(|(_, tensor)| tensor.bytes).sum();
    let places: BTreeMap<_, _> = tensors().map(|(file, tensor)| (tensor.name.clone(), file.clone())).collect();
    let by_name: BTreeMap<&str, &OutputFile<'_>> = files.iter().map(|file| (file.name.as_str(), file)).collect();
    let headers = files.iter().map(|file| (file.name.clone(), file.header.clone())).collect();
    let mut factors = Factors::default();
    let mut merged: BTreeMap<String, TensorReport> = BTreeMap::new();
    let written = stage.write_files(headers, progress, |name, writer, progress| {
        write_file(&plan, by_name[name], &mut factors, writer, progress, &mut merged)
    })?;

    copy_side_files(&plan.base().path, &stage.path(""))?;
    if let Some(dtype) = plan.recipe.out_dtype {
        let mut config = plan.checkpoints[0].config.clone();
        config.set_dtype(torch_name(dtype));
        write_json(&stage.path("config.json"), &config.fields)?;
    }
    if files[0].name != SINGLE {
        write_index(&plan.base().path, &stage.path(""), bytes, &places)?;
    }
    manifest::write(&plan, &stage.path(""), &base_fingerprint, &written.checksums, &merged)?;
    stage.publish()?;
    let (tensors_merged, tensors) = (merged.len() as u64, places.len() as u64);
    Ok(MergeReport {
        out: out.into(),
        method: plan.recipe.merge_method.spec().name.into(),
        tensors_merged,
        tensors_copied: tensors - tensors_merged,
        bytes,
        shards_resumed: written.shards_resumed,
        bytes_resumed: written.bytes_resumed,
        seconds: started.elapsed().as_secs_f64(),
        merged,
        base_fingerprint,
        base_check,
    })
}

/// All inputs that are read, the base first.
fn inputs(plan: &Plan) -> impl Iterator<Item = &Checkpoint> {
    let checkpoints = plan.checkpoints.iter().map(|opened| &opened.checkpoint);
    checkpoints.chain(plan.adapters.iter().map(|adapter| &adapter.weights)).chain(&plan.fisher)
}

/// Whether adapters were trained on the base of this fingerprint.
///
/// # Errors
/// [`AdapterError::WrongBase`].
pub(super) fn check_base(adapters: &[Adapter], actual: &str) -> Result<BaseCheck> {
    let mut check = if adapters.is_empty() { BaseCheck::NoAdapter } else { BaseCheck::Verified };
    for adapter in adapters {
        match &adapter.base_fingerprint {
            Some(expected) if expected == actual => {}
            Some(expected) => {
                let (path, expected, actual) = (adapter.path.clone(), expected.clone(), actual.to_string());
                return Err(AdapterError::WrongBase { path, expected, actual }.into());
            }
            None => check = BaseCheck::Unverified,
        }
    }
    Ok(check)
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

fn write_file(
    plan: &Plan,
    file: &OutputFile<'_>,
    factors: &mut Factors,
    writer: &mut StagedFile<'_>,
    progress: &mut dyn Progress,
    reports: &mut BTreeMap<String, TensorReport>,
) -> Result<()> {
    let mut slots: Vec<Slot> = Vec::new();
    for jobs in groups(plan, &file.jobs) {
        let tasks = jobs.into_iter().map(|(number, job)| Task::resume(plan, number, job, writer));
        let (finished, tasks): (Vec<Task<'_>>, _) = tasks.partition(Task::is_finished);
        reports.extend(finished.into_iter().filter_map(Task::report));
        let patches = tasks.iter().flat_map(|task| patches(task.job));
        factors.load(&plan.adapters, patches)?;
        let largest = tasks.iter().map(|task| slot_bytes(plan, task.job)).max().unwrap_or(0);
        slots.resize_with(slot_count(largest), Slot::default);
        write_group(plan, tasks, factors, &mut slots, writer, progress, reports)?;
    }
    Ok(())
}

fn patches(job: &Job) -> impl Iterator<Item = &super::adapters::Patch> {
    let inputs = match &job.action {
        Action::Merge(merge) => merge.inputs.as_slice(),
        Action::Copy => &[],
    };
    inputs.iter().filter_map(|input| match &input.values {
        Values::Patch(patch) => Some(patch),
        _ => None,
    })
}

/// Tensors that are read pass by pass together, each with its number.
fn groups<'a>(plan: &Plan, jobs: &[&'a Job]) -> Vec<Vec<(u64, &'a Job)>> {
    let mut groups: Vec<Vec<(u64, &Job)>> = Vec::new();
    let (mut bytes, mut models) = (u64::MAX, 0);
    for (number, job) in (0..).zip(jobs) {
        let (size, inputs) = (plan.tensor(job).info.bytes, model_count(job));
        if bytes >= GROUP_BYTES || models + inputs > GROUP_MODELS {
            groups.push(Vec::new());
            (bytes, models) = (0, 0);
        }
        bytes += size;
        models += inputs;
        groups.last_mut().expect("just pushed").push((number, *job));
    }
    groups
}

fn model_count(job: &Job) -> usize {
    match &job.action {
        Action::Merge(merge) => merge.inputs.len(),
        Action::Copy => 0,
    }
}

/// Memory of one chunk under way, if all inputs are F32: base, output and models, and as much again for what passes count;
/// and the factors of the matrix that it lies in.
pub(super) fn slot_bytes(plan: &Plan, job: &Job) -> usize {
    match &job.action {
        Action::Merge(merge) => {
            let chunk = merge.grid.chunk;
            let factors: usize = patches(job).map(|patch| side_bytes(&plan.adapters, patch, chunk)).sum();
            chunk as usize * 4 * (2 + 2 * merge.inputs.len()) + factors
        }
        Action::Copy => 2 * CHUNK_BYTES,
    }
}

/// Chunks under way: two for each thread, as long as they fit into their memory.
pub(super) fn slot_count(bytes: usize) -> usize {
    (SLOTS_BYTES / bytes.max(1)).clamp(2, 2 * threads())
}
