//! Runs a merge: read, compute, write, one file after the other, in bounded memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::factors::{read_a, transpose, Factors};
use super::lora::{merge_panel, Extremes, Storage, Term};
use super::plan::{Delta, Patch, Plan};
use super::recipe::Recipe;
use super::report::{BaseCheck, MergeReport};
use crate::adapter::AdapterError;
use crate::checkpoint::folder::{copy_side_files, write_index, write_json};
use crate::checkpoint::stage::{check_output_of, plan_hash, Stage};
use crate::checkpoint::{fingerprint, Dtype, Header, Shard, ShardWriter, Tensor, TensorSpec, CHUNK_BYTES, SINGLE};
use crate::float::{decode, encode, first_non_finite};
use crate::progress::Progress;
use crate::Result;

/// Merges what `recipe` says into the new folder `out`.
///
/// Writes to `OUT.partial` and renames it when all is on the disk. An interrupted merge goes on where it was when the
/// same merge is started again.
///
/// # Errors
/// [`crate::Error`]; nothing is under the final name then, and the inputs are never changed.
pub fn merge(recipe: Recipe, out: &Path, progress: &mut dyn Progress) -> Result<MergeReport> {
    let started = Instant::now();
    check_output_of(&recipe.base_model, out)?;
    let plan = Plan::resolve(recipe)?;
    let base_fingerprint = fingerprint(&plan.base)?;
    let base_check = check_base(&plan, &base_fingerprint)?;
    let inputs = std::iter::once(&plan.base).chain(plan.adapters.iter().map(|adapter| &adapter.weights));
    let hash = plan_hash(&("merge", &plan.recipe, &plan.patches, &plan.config.fields), inputs)?;
    let mut stage = Stage::open(out, &hash)?;

    let header =
        |shard: &Shard| Ok((shard.name.clone(), out_header(&stage.path(&shard.name), shard, plan.recipe.out_dtype)?));
    let files: Vec<(String, Header)> = plan.base.shards.iter().map(header).collect::<Result<_>>()?;
    let tensors = || files.iter().flat_map(|(file, header)| header.tensors.iter().map(move |tensor| (file, tensor)));
    let bytes = tensors().map(|(_, tensor)| tensor.bytes).sum();
    let places: BTreeMap<_, _> = tensors().map(|(file, tensor)| (tensor.name.clone(), file.clone())).collect();
    let shards: BTreeMap<_, _> = plan.base.shards.iter().map(|shard| (shard.name.as_str(), shard)).collect();
    let written = stage
        .write_files(files, progress, |name, writer, progress| write_shard(&plan, shards[name], writer, progress))?;
    let merged: BTreeMap<String, Extremes> = written.reports.into_iter().flatten().collect();

    copy_side_files(&plan.base.path, &stage.path(""))?;
    if let Some(dtype) = plan.recipe.out_dtype {
        let mut config = plan.config.clone();
        config.set_dtype(torch_name(dtype));
        write_json(&stage.path("config.json"), &config.fields)?;
    }
    if plan.base.shards[0].name != SINGLE {
        write_index(&plan.base.path, &stage.path(""), bytes, &places)?;
    }
    stage.publish()?;
    let (tensors_merged, tensors) = (merged.len() as u64, places.len() as u64);
    Ok(MergeReport {
        out: out.into(),
        tensors_merged,
        tensors_copied: tensors - tensors_merged,
        bytes,
        shards_resumed: written.resumed,
        seconds: started.elapsed().as_secs_f64(),
        merged,
        base_fingerprint,
        base_check,
    })
}

fn check_base(plan: &Plan, actual: &str) -> Result<BaseCheck> {
    let mut check = BaseCheck::Verified;
    for adapter in &plan.adapters {
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

/// The base's own header, byte for byte, unless the types change.
fn out_header(path: &Path, shard: &Shard, out_dtype: Option<Dtype>) -> Result<Header> {
    let specs: Vec<TensorSpec> = shard.header.tensors.iter().map(TensorSpec::from).collect();
    let convert = |spec: &TensorSpec| TensorSpec { dtype: out_type(spec.dtype, out_dtype), ..spec.clone() };
    let converted: Vec<TensorSpec> = specs.iter().map(convert).collect();
    if converted == specs {
        return Ok(shard.header.clone());
    }
    Header::layout(path, converted, &shard.header.metadata)
}

fn out_type(dtype: Dtype, out_dtype: Option<Dtype>) -> Dtype {
    if dtype.is_weight() {
        out_dtype.unwrap_or(dtype)
    } else {
        dtype
    }
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

fn write_shard(
    plan: &Plan,
    shard: &Shard,
    writer: &mut ShardWriter,
    progress: &mut dyn Progress,
) -> Result<BTreeMap<String, Extremes>> {
    let mut merged = BTreeMap::new();
    let mut factors = Factors::default();
    for info in &shard.header.tensors {
        let tensor = Tensor { shard, info };
        let out = out_type(info.dtype, plan.recipe.out_dtype);
        match plan.patches.get(&info.name) {
            Some(patch) => {
                let extremes = write_merged(plan, patch, tensor, out, &mut factors, writer, progress)?;
                merged.insert(info.name.clone(), extremes);
            }
            None => write_copy(tensor, out, writer, progress)?,
        }
    }
    Ok(merged)
}

fn write_copy(tensor: Tensor<'_>, out: Dtype, writer: &mut ShardWriter, progress: &mut dyn Progress) -> Result<()> {
    let (name, dtype) = (&tensor.info.name, tensor.info.dtype);
    let mut input = vec![0; CHUNK_BYTES.min(tensor.info.bytes as usize)];
    let (mut values, mut output) = (Vec::new(), Vec::new());
    let mut start = 0;
    while start < tensor.info.bytes {
        let count = input.len().min((tensor.info.bytes - start) as usize);
        let piece = &mut input[..count];
        tensor.read_at(piece, start)?;
        let written = if out == dtype {
            &*piece
        } else {
            let elements = count * 8 / dtype.bits() as usize;
            values.resize(elements, 0.0);
            output.resize(elements * out.bits() as usize / 8, 0);
            decode(dtype, piece, &mut values);
            encode(out, &values, &mut output);
            // An infinity of the base may stay one, but f16 must not make new ones.
            let broken = first_non_finite(out, &output).filter(|&(place, _)| values[place].is_finite());
            if let Some((place, value)) = broken {
                let first = start * 8 / u64::from(dtype.bits());
                return Err(non_finite(tensor, first + place as u64, value).into());
            }
            &output
        };
        writer.append(name, written)?;
        progress.advance(written.len() as u64, name)?;
        start += count as u64;
    }
    Ok(())
}

fn write_merged(
    plan: &Plan,
    patch: &Patch,
    tensor: Tensor<'_>,
    out: Dtype,
    factors: &mut Factors,
    writer: &mut ShardWriter,
    progress: &mut dyn Progress,
) -> Result<Extremes> {
    let (name, base) = (&tensor.info.name, tensor.info.dtype);
    let storage = Storage { cols: patch.cols as usize, base, out, rounding: patch.rounding };
    let row_bytes = |dtype: Dtype| patch.cols as usize * dtype.bits() as usize / 8;
    let panel_rows = (CHUNK_BYTES / row_bytes(base).max(1)).clamp(1, patch.rows.max(1) as usize);
    let (mut input, mut output) = (vec![0; panel_rows * row_bytes(base)], vec![0; panel_rows * row_bytes(out)]);
    let inputs = if patch.transposed { patch.rows } else { patch.cols };
    let mut a_factors = vec![Vec::new(); patch.deltas.len()];
    let mut extremes = Extremes::default();
    factors.load(&plan.adapters, patch)?;
    for expert in 0..patch.experts {
        let factor_expert = patch.first_expert + expert;
        for (a, delta) in a_factors.iter_mut().zip(&patch.deltas) {
            let adapter = &plan.adapters[delta.adapter];
            read_a(adapter, &adapter.pairs[delta.pair], factor_expert, inputs, a)?;
        }
        let side = |(a, &delta): (_, &Delta)| {
            let rank = plan.adapters[delta.adapter].pairs[delta.pair].rank as usize;
            sides(patch, a, factors.b(delta, factor_expert, patch.factor_experts), rank)
        };
        let sides: Vec<_> = a_factors.iter().map(Vec::as_slice).zip(&patch.deltas).map(side).collect();
        for first in (0..patch.rows as usize).step_by(panel_rows) {
            let rows = panel_rows.min(patch.rows as usize - first);
            let mut terms = Vec::new();
            for ((left, right), delta) in sides.iter().zip(&patch.deltas) {
                let pair = &plan.adapters[delta.adapter].pairs[delta.pair];
                let rank = pair.rank as usize;
                let b = &left[(patch.first_row as usize + first) * rank..][..rows * rank];
                let weight = (plan.recipe.models[delta.adapter].weight * plan.recipe.scale) as f32;
                terms.push(Term { a: right, b, rank, scaling: pair.scaling, weight });
            }
            let (input, output) = (&mut input[..rows * row_bytes(base)], &mut output[..rows * row_bytes(out)]);
            let place = expert * patch.rows + first as u64;
            tensor.read_at(input, place * row_bytes(base) as u64)?;
            extremes = extremes.max(merge_panel(storage, input, output, &terms));
            if let Some((position, value)) = first_non_finite(out, output) {
                return Err(non_finite(tensor, place * patch.cols + position as u64, value).into());
            }
            writer.append(name, output)?;
            progress.advance(output.len() as u64, name)?;
        }
    }
    Ok(extremes)
}

/// Both sides of the product that is added to one matrix as it is stored: `[rows, rank]` and `[rank, cols]`. They are B
/// and A; for a transposed matrix, the transposes of A and B.
fn sides<'f>(patch: &Patch, a: &'f [f32], b: &'f [f32], rank: usize) -> (Cow<'f, [f32]>, Cow<'f, [f32]>) {
    if patch.transposed {
        (transpose(a, patch.rows as usize).into(), transpose(b, rank).into())
    } else {
        (b.into(), a.into())
    }
}

fn non_finite(tensor: Tensor<'_>, position: u64, value: f32) -> AdapterError {
    AdapterError::NonFinite {
        name: tensor.info.name.clone(),
        value,
        position: crate::checkpoint::unravel(position, &tensor.info.shape),
    }
}
