//! Which tensor goes into which file of the output.

use std::path::Path;

use super::plan::{Job, Plan};
use crate::checkpoint::{Header, TensorSpec, SINGLE};
use crate::Result;

/// A file of the output.
pub struct OutputFile<'a> {
    /// Its name.
    pub name: String,
    /// Its header: the base's own, byte for byte, where nothing in it changes.
    pub header: Header,
    /// Its tensors, in the order in which they are written.
    pub jobs: Vec<&'a Job>,
}

/// The files of the base, or with a limit as many as are needed, filled in the order of the base. A tensor above the limit
/// gets a file of its own.
///
/// # Errors
/// [`crate::checkpoint::CheckpointError::HeaderTooLarge`] for millions of tensors.
pub fn files<'a>(plan: &'a Plan, max_shard_bytes: Option<u64>) -> Result<Vec<OutputFile<'a>>> {
    match max_shard_bytes {
        None => as_base(plan),
        Some(limit) => cut_anew(plan, limit),
    }
}

fn as_base(plan: &Plan) -> Result<Vec<OutputFile<'_>>> {
    let mut jobs = plan.jobs.iter();
    let file = |shard: &crate::checkpoint::Shard| {
        let jobs: Vec<&Job> = jobs.by_ref().take(shard.header.tensors.len()).collect();
        let is_same = jobs.iter().zip(&shard.header.tensors).all(|(job, info)| job.out == info.dtype);
        let header = match is_same {
            true => shard.header.clone(),
            false => layout(plan, &shard.name, &jobs, &shard.header.metadata)?,
        };
        Ok(OutputFile { name: shard.name.clone(), header, jobs })
    };
    plan.base().shards.iter().map(file).collect()
}

fn cut_anew(plan: &Plan, limit: u64) -> Result<Vec<OutputFile<'_>>> {
    let mut parts: Vec<Vec<&Job>> = vec![Vec::new()];
    let mut held = 0;
    for job in &plan.jobs {
        let bytes = spec(plan, job).bytes();
        if held > 0 && held + bytes > limit {
            parts.push(Vec::new());
            held = 0;
        }
        held += bytes;
        parts.last_mut().expect("never empty").push(job);
    }
    let count = parts.len();
    let metadata = &plan.base().shards[0].header.metadata;
    let mut files = Vec::with_capacity(count);
    for (index, jobs) in parts.into_iter().enumerate() {
        let name = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        files.push(OutputFile { header: layout(plan, &name, &jobs, metadata)?, name, jobs });
    }
    Ok(files)
}

fn layout(plan: &Plan, name: &str, jobs: &[&Job], metadata: &[(String, String)]) -> Result<Header> {
    Header::layout(Path::new(name), jobs.iter().map(|job| spec(plan, job)).collect(), metadata)
}

fn spec(plan: &Plan, job: &Job) -> TensorSpec {
    TensorSpec { dtype: job.out, ..TensorSpec::from(plan.tensor(job).info) }
}
