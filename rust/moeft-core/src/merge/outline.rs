//! What a merge would do, for `--dry-run`.

use serde::Serialize;

use super::engine::{check_base, slot_bytes, slot_count, Options};
use super::factors::CACHE_VALUES;
use super::files::files;
use super::plan::{Action, Job, Plan, Values};
use super::recipe::{ModelSource, Recipe};
use crate::checkpoint::fingerprint;
use crate::isa::Isa;
use crate::Result;

/// What a merge would do.
#[derive(Debug, Clone, Serialize)]
pub struct Outline {
    /// How weights are combined.
    pub method: &'static str,
    /// Every tensor of the output, file by file.
    pub tensors: Vec<TensorOutline>,
    /// Name and bytes of each file.
    pub files: Vec<(String, u64)>,
    /// Bytes that one pass over everything reads. Methods that need to see a tensor first read it up to three times more.
    pub read_bytes: u64,
    /// Bytes of all tensors of the output.
    pub written_bytes: u64,
    /// Buffers and factors at most; the process itself needs some megabytes more.
    pub memory_bytes: u64,
}

/// What would become of one tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorOutline {
    /// Its name.
    pub name: String,
    /// The file it goes into.
    pub file: String,
    /// `copy`, or `merge`.
    pub action: &'static str,
    /// Folders of the models that take part.
    pub inputs: Vec<String>,
    /// Bytes that one pass reads.
    pub read_bytes: u64,
    /// Bytes of the output.
    pub written_bytes: u64,
}

/// Opens and checks every input and says what [`super::merge`] would do.
///
/// # Errors
/// As [`super::merge`] before it writes.
pub fn outline(recipe: Recipe, options: Options) -> Result<Outline> {
    Isa::active()?;
    let plan = Plan::resolve(recipe)?;
    if !plan.adapters.is_empty() {
        check_base(&plan.adapters, &fingerprint(plan.base())?)?;
    }
    let files = files(&plan, options.max_shard_bytes)?;
    let mut tensors = Vec::with_capacity(plan.jobs.len());
    for file in &files {
        tensors.extend(file.jobs.iter().map(|job| tensor(&plan, job, &file.name)));
    }
    let buffers =
        plan.jobs.iter().map(|job| slot_bytes(&plan, job)).map(|bytes| bytes * slot_count(bytes)).max().unwrap_or(0);
    let has_stacks = !plan.adapters.is_empty();
    Ok(Outline {
        method: plan.recipe.merge_method.spec().name,
        read_bytes: tensors.iter().map(|tensor| tensor.read_bytes).sum(),
        written_bytes: tensors.iter().map(|tensor| tensor.written_bytes).sum(),
        memory_bytes: (buffers + if has_stacks { 4 * CACHE_VALUES } else { 0 }) as u64,
        files: files.iter().map(|file| (file.name.clone(), file.header.file_bytes())).collect(),
        tensors,
    })
}

fn tensor(plan: &Plan, job: &Job, file: &str) -> TensorOutline {
    let info = plan.tensor(job).info;
    let elements: u64 = info.shape.iter().product();
    let mut outline = TensorOutline {
        name: job.name.clone(),
        file: file.to_string(),
        action: "copy",
        inputs: Vec::new(),
        read_bytes: info.bytes,
        written_bytes: elements * u64::from(job.out.bits()) / 8,
    };
    if let Action::Merge(merge) = &job.action {
        outline.action = "merge";
        for input in &merge.inputs {
            let (ModelSource::Model(path) | ModelSource::Adapter(path)) = &plan.recipe.models[input.entry].source;
            outline.inputs.push(path.display().to_string());
            if let Values::Weights(_, source) = &input.values {
                outline.read_bytes += elements * u64::from(source.dtype.bits()) / 8;
            }
        }
        let fisher = merge.fisher.as_ref().map_or(0, |source| u64::from(source.dtype.bits()) / 8);
        outline.read_bytes += elements * fisher;
    }
    outline
}
