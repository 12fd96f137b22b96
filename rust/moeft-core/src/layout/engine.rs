//! Runs a change of layout: read, rearrange, write, one file after the other, in bounded memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::plan::{Output, Plan};
use super::Direction;
use crate::checkpoint::folder::{copy_side_files, write_index, Config};
use crate::checkpoint::stage::{check_output_of, plan_hash, Stage};
use crate::checkpoint::{Checkpoint, CheckpointError, Header, Shard, StagedFile, TensorInfo, TensorSpec, SINGLE};
use crate::families::Family;
use crate::names::DiskNames;
use crate::progress::Progress;
use crate::Result;

/// What a change of layout did.
#[derive(Debug, Clone, Serialize)]
pub struct LayoutReport {
    /// The folder that was written.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub out: PathBuf,
    /// What was done.
    pub direction: Direction,
    /// Decoder layers whose experts changed their layout.
    pub layers: u64,
    /// Tensors that were taken apart or put together.
    pub tensors_read: u64,
    /// Tensors that were made of them.
    pub tensors_made: u64,
    /// Tensors that were copied.
    pub tensors_copied: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Files that an interrupted run had finished.
    pub shards_resumed: u64,
    /// Bytes that an interrupted run had written, those of finished files included.
    pub bytes_resumed: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Writes the checkpoint folder `source` with its experts fused or taken apart into the new folder `out`.
///
/// Weights keep every bit, and everything but the experts is copied byte for byte. Writes to `OUT.partial` and renames it
/// when all is on the disk; an interrupted run goes on where it was when the same command is started again. Holds some
/// megabytes, whatever the size of a stack.
///
/// # Errors
/// [`CheckpointError`] if the experts are damaged, mixed or already so, [`crate::Error::UnknownModelType`]; nothing is
/// under the final name then.
pub fn convert(source: &Path, out: &Path, direction: Direction, progress: &mut dyn Progress) -> Result<LayoutReport> {
    let started = Instant::now();
    check_output_of(source, out)?;
    let checkpoint = Checkpoint::open(source)?;
    let config = Config::read(source)?;
    if let Some(method) = config.quant_method() {
        let advice = "change the layout of the 16-bit checkpoint that it was made from";
        return Err(CheckpointError::AlreadyQuantized { path: source.into(), method, advice }.into());
    }
    let family = Family::of_checkpoint(config.model_type(source)?, &checkpoint)?;
    let plan = Plan::new(&DiskNames::new(&checkpoint, &family, &config), &config, direction)?;
    let mut stage = Stage::open(out, &plan_hash(&("layout", &plan), [&checkpoint])?)?;

    let outputs: BTreeMap<&str, &Output> =
        plan.outputs.iter().map(|output| (output.spec.name.as_str(), output)).collect();
    let mut files = Vec::with_capacity(checkpoint.shards.len());
    for shard in &checkpoint.shards {
        let header = header(&stage.path(&shard.name), shard, &plan)?;
        // All tensors of a file may have gone to the stacks of the file before it.
        if !header.tensors.is_empty() {
            files.push((shard.name.clone(), header));
        }
    }
    let tensors = || files.iter().flat_map(|(file, header)| header.tensors.iter().map(move |tensor| (file, tensor)));
    let bytes = tensors().map(|(_, tensor)| tensor.bytes).sum();
    let places: BTreeMap<_, _> = tensors().map(|(file, tensor)| (tensor.name.clone(), file.clone())).collect();
    let headers: BTreeMap<String, Header> = files.iter().cloned().collect();
    let written = stage.write_files(files, progress, |name, writer, progress| {
        let tensors = headers[name].tensors.iter();
        tensors.into_iter().try_for_each(|tensor| write(&checkpoint, &outputs, tensor, writer, progress))
    })?;

    copy_side_files(source, &stage.path(""))?;
    if checkpoint.shards[0].name != SINGLE {
        write_index(source, &stage.path(""), bytes, &places)?;
    }
    stage.publish()?;
    Ok(LayoutReport {
        out: out.into(),
        direction,
        layers: plan.consumed.values().collect::<BTreeSet<_>>().len() as u64,
        tensors_read: plan.consumed.len() as u64,
        tensors_made: plan.outputs.len() as u64,
        tensors_copied: (places.len() - plan.outputs.len()) as u64,
        bytes,
        shards_resumed: written.shards_resumed,
        bytes_resumed: written.bytes_resumed,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The header of a file, the source's own byte for byte if it has no experts.
fn header(path: &Path, shard: &Shard, plan: &Plan) -> Result<Header> {
    let kept = shard.header.tensors.iter().filter(|tensor| !plan.consumed.contains_key(&tensor.name));
    let mut specs: Vec<TensorSpec> = kept.map(TensorSpec::from).collect();
    let made = plan.outputs.iter().filter(|output| output.file == shard.name).map(|output| output.spec.clone());
    let unchanged = specs.len() == shard.header.tensors.len();
    specs.extend(made);
    if unchanged && specs.len() == shard.header.tensors.len() {
        return Ok(shard.header.clone());
    }
    Header::layout(path, specs, &shard.header.metadata)
}

fn write(
    checkpoint: &Checkpoint,
    outputs: &BTreeMap<&str, &Output>,
    tensor: &TensorInfo,
    writer: &mut StagedFile<'_>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let name = tensor.name.as_str();
    if let Some(output) = outputs.get(name) {
        let element_bytes = u64::from(output.spec.dtype.bits() / 8);
        let done: usize = writer.state(name).unwrap_or(0);
        return (done..).zip(&output.gathers[done..]).try_for_each(|(index, gather)| {
            gather.run(checkpoint, element_bytes, name, writer, progress)?;
            writer.mark(&[name], index + 1)
        });
    }
    writer.copy(checkpoint.get(name).expect("what is not made is copied"), progress)
}
