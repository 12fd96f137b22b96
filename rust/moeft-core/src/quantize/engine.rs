//! Runs a quantisation: read, pack, write, in bounded memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::plan::{Component, Job, Packing, Plan};
use super::report::{Bytes, QuantizeReport};
use super::{Options, QUANT_METHOD};
use crate::checkpoint::folder::{copy_side_files, write_index, write_json, Config};
use crate::checkpoint::stage::{check_output_of, plan_hash, Stage};
use crate::checkpoint::{
    fingerprint, unravel, Checkpoint, CheckpointError, Header, StagedFile, Tensor, TensorSpec, SINGLE,
};
use crate::families::Family;
use crate::float::{decode, first_non_finite};
use crate::names::DiskNames;
use crate::nf4::{nest, GroupQuantizer, NESTED_BLOCK_SIZE};
use crate::progress::Progress;
use crate::{Error, Result};

/// Where a text model that is not part of a larger one has its layers.
const TEXT_LAYERS: &str = "model.layers";

/// Packs the checkpoint folder `source` into the new folder `out`.
///
/// Writes to `OUT.partial` and renames it when all is on the disk. An interrupted run goes on where it was when the same
/// command is started again. Holds a few megabytes, and with `double_quant` the absmax of one stack.
///
/// # Errors
/// [`CheckpointError`] for a damaged, packed or non-finite source, [`Error::UnknownModelType`], [`Error::UnknownPart`],
/// [`Error::InvalidArgument`] for options that do not fit; nothing is under the final name then.
pub fn quantize(source: &Path, out: &Path, options: &Options, progress: &mut dyn Progress) -> Result<QuantizeReport> {
    let started = Instant::now();
    check_output_of(source, out)?;
    GroupQuantizer::new(1, options.block_size)?;
    let checkpoint = Checkpoint::open(source)?;
    let mut config = Config::read(source)?;
    if let Some(method) = config.quant_method() {
        let advice = "quantise the 16-bit checkpoint that it was made from";
        return Err(CheckpointError::AlreadyQuantized { path: source.into(), method, advice }.into());
    }
    let family = Family::of_checkpoint(config.model_type(source)?, &checkpoint)?;
    if family.experts_counted.is_some() && family.layers != TEXT_LAYERS {
        return Err(Error::UnknownPart { model_type: family.name.clone(), layers: family.layers.clone() });
    }
    let plan = Plan::new(&DiskNames::new(&checkpoint, &family, &config), options)?;
    let base_fingerprint = fingerprint(&checkpoint)?;
    let hash = plan_hash(&("quantize", options, &plan, &config.fields), [&checkpoint])?;
    let mut stage = Stage::open(out, &hash)?;

    let shards = split(&plan, options);
    let header = |(name, jobs): &(String, Vec<&Job>)| {
        let specs = jobs.iter().flat_map(|job| job.outputs(options)).collect();
        Ok((name.clone(), Header::layout(&stage.path(name), specs, &[("format".into(), "pt".into())])?))
    };
    let files: Vec<(String, Header)> = shards.iter().map(header).collect::<Result<_>>()?;
    let tensors = || files.iter().flat_map(|(file, header)| header.tensors.iter().map(move |tensor| (file, tensor)));
    let bytes = tensors().map(|(_, tensor)| tensor.bytes).sum();
    let places: BTreeMap<_, _> = tensors().map(|(file, tensor)| (tensor.name.clone(), file.clone())).collect();
    let jobs: BTreeMap<&str, &Vec<&Job>> = shards.iter().map(|(name, jobs)| (name.as_str(), jobs)).collect();
    let written = stage.write_files(files, progress, |name, writer, progress| {
        jobs[name].iter().try_for_each(|job| run(job, &checkpoint, options, writer, progress))
    })?;

    copy_side_files(source, &stage.path(""))?;
    let quantization = json!({
        "quant_method": QUANT_METHOD,
        "experts": options.experts,
        "attention": options.attention,
        "mlp": options.mlp,
        "double_quant": options.double_quant,
        "block_size": options.block_size,
        "base_fingerprint": base_fingerprint,
    });
    config.fields.insert("quantization_config".into(), quantization);
    write_json(&stage.path("config.json"), &config.fields)?;
    if shards.len() > 1 {
        write_index(source, &stage.path(""), bytes, &places)?;
    }
    stage.publish()?;
    let packed = plan.jobs.iter().filter(|(_, job)| matches!(job, Job::Pack(_))).count();
    Ok(QuantizeReport {
        out: out.into(),
        components: components(&plan, &checkpoint, options),
        total: Bytes { before: checkpoint.bytes(), after: bytes },
        weights_packed: packed as u64,
        tensors_copied: (plan.jobs.len() - packed) as u64,
        shards_resumed: written.shards_resumed,
        bytes_resumed: written.bytes_resumed,
        seconds: started.elapsed().as_secs_f64(),
        base_fingerprint,
    })
}

/// Fills files in the order of the plan; the tensors of one weight stay together.
fn split<'p>(plan: &'p Plan, options: &Options) -> Vec<(String, Vec<&'p Job>)> {
    let mut shards: Vec<Vec<&Job>> = vec![Vec::new()];
    let mut bytes = 0;
    for (_, job) in &plan.jobs {
        let size = job.outputs(options).iter().map(TensorSpec::bytes).sum::<u64>();
        if bytes > 0 && bytes + size > options.max_shard_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        shards.last_mut().expect("starts with one").push(job);
    }
    let count = shards.len();
    let name = |index: usize| match count {
        1 => SINGLE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    shards.into_iter().enumerate().map(|(index, jobs)| (name(index), jobs)).collect()
}

fn components(plan: &Plan, checkpoint: &Checkpoint, options: &Options) -> BTreeMap<Component, Bytes> {
    let mut components: BTreeMap<Component, Bytes> = BTreeMap::new();
    let size = |name: &String| checkpoint.get(name).map_or(0, |tensor| tensor.info.bytes);
    for (component, job) in &plan.jobs {
        let bytes = components.entry(*component).or_default();
        bytes.after += job.outputs(options).iter().map(TensorSpec::bytes).sum::<u64>();
        bytes.before += match job {
            Job::Pack(packing) => packing.sources.iter().map(size).sum(),
            Job::Copy(spec) => spec.bytes(),
        };
    }
    components
}

fn run(
    job: &Job,
    checkpoint: &Checkpoint,
    options: &Options,
    writer: &mut StagedFile<'_>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let tensor = |name: &String| checkpoint.get(name).expect("the plan names only what the checkpoint holds");
    match job {
        Job::Pack(packing) => {
            let sources: Vec<Tensor<'_>> = packing.sources.iter().map(tensor).collect();
            pack(packing, &sources, options, writer, progress)
        }
        Job::Copy(spec) => writer.copy(tensor(&spec.name), progress),
    }
}

fn pack(
    packing: &Packing,
    sources: &[Tensor<'_>],
    options: &Options,
    writer: &mut StagedFile<'_>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let name = |suffix: &str| format!("{}.{suffix}", packing.name);
    let (packed_name, absmax_name) = (name("packed"), name("absmax"));
    let outputs: Vec<String> = packing.outputs(options).into_iter().map(|spec| spec.name).collect();
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    let first = packed_groups(&outputs, writer);
    if first == packing.groups() {
        return Ok(());
    }
    let (mut packed, mut absmax, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for group in first..packing.groups() {
        let mut quantizer = GroupQuantizer::new(packing.group_len as usize, options.block_size)?;
        for (source, start, bytes) in segments(packing, sources, group) {
            let dtype = source.info.dtype;
            source.for_each_chunk(start, bytes, |place, piece| {
                let first = place * 8 / u64::from(dtype.bits());
                if let Some((position, value)) = first_non_finite(dtype, piece) {
                    return Err(non_finite(source, first + position as u64, value).into());
                }
                values.resize(piece.len() * 8 / dtype.bits() as usize, 0.0);
                decode(dtype, piece, &mut values);
                quantizer.push(&values, &mut packed, &mut absmax)?;
                writer.append(&packed_name, &packed)?;
                progress.advance(packed.len() as u64, &packing.name)?;
                packed.clear();
                Ok(())
            })?;
        }
        quantizer.finish(&mut packed, &mut absmax)?;
        writer.append(&packed_name, &packed)?;
        progress.advance(packed.len() as u64, &packing.name)?;
        packed.clear();
        if !options.double_quant {
            write_f32(&absmax_name, &absmax, writer, progress)?;
            absmax.clear();
            writer.mark(&outputs, group + 1)?;
        }
    }
    if options.double_quant {
        let mut codes = vec![0; absmax.len()];
        let mut nested = vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)];
        let offset = nest(&absmax, None, &mut codes, &mut nested)?;
        writer.append(&absmax_name, &codes)?;
        progress.advance(codes.len() as u64, &packing.name)?;
        write_f32(&name("nested_absmax"), &nested, writer, progress)?;
        write_f32(&name("nested_offset"), &[offset], writer, progress)?;
        writer.mark(&outputs, packing.groups())?;
    }
    Ok(())
}

/// Groups that an earlier run had packed, if it says so of every output of the weight; else all start over.
fn packed_groups(outputs: &[&str], writer: &mut StagedFile<'_>) -> u64 {
    let states: Vec<Option<u64>> = outputs.iter().map(|output| writer.state(output)).collect();
    match states[0] {
        Some(groups) if states.iter().all(|state| *state == Some(groups)) => groups,
        _ => {
            outputs.iter().for_each(|output| writer.restart(output));
            0
        }
    }
}

/// The pieces of the sources that make up one group: tensor, first byte, bytes.
fn segments<'s, 'a>(packing: &Packing, sources: &'s [Tensor<'a>], group: u64) -> Vec<(&'s Tensor<'a>, u64, u64)> {
    if let [whole] = sources {
        let bytes = whole.info.bytes / packing.groups();
        return vec![(whole, group * bytes, bytes)];
    }
    let parts = sources.len() / packing.groups() as usize;
    sources[group as usize * parts..][..parts].iter().map(|tensor| (tensor, 0, tensor.info.bytes)).collect()
}

fn write_f32(name: &str, values: &[f32], writer: &mut StagedFile<'_>, progress: &mut dyn Progress) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    writer.append(name, &bytes)?;
    progress.advance(bytes.len() as u64, name)
}

fn non_finite(tensor: &Tensor<'_>, position: u64, value: f32) -> CheckpointError {
    CheckpointError::NonFinite {
        name: tensor.info.name.clone(),
        value,
        position: unravel(position, &tensor.info.shape),
        advice:
            "a packed block would turn all its weights into NaN; download the checkpoint again or repair that tensor",
    }
}
