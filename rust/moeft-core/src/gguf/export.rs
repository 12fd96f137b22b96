//! Writes a model: types are chosen and places known before the first weight is read.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::finished::Finished;
use super::plan::{FileType, Rules, Weight};
use super::shards::{self, Shard};
use super::source::Spec;
use super::writer::Inputs;
use super::{GgmlType, Imatrix, TensorInfo, Value, Weights};
use crate::checkpoint::stage::plan_hash;
use crate::progress::Progress;
use crate::{Error, Result};

/// A model in llama.cpp's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Keys and values, in their order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors, in their order.
    pub tensors: Vec<Spec>,
    /// Decoder layers.
    pub num_layers: u64,
    /// Experts per layer; 0 in a dense model.
    pub num_experts: u64,
}

/// What is asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Types as a whole.
    pub file_type: FileType,
    /// Patterns of names and their types; the first that matches wins.
    #[serde(default)]
    pub tensor_types: Vec<(String, GgmlType)>,
    /// A file is closed before its tensors take more than this; 0 for one file.
    #[serde(default)]
    pub max_shard_bytes: u64,
    /// Importance matrix that the quantisers weigh errors with.
    #[serde(default)]
    pub imatrix: Option<PathBuf>,
    /// Adapter that is added to the weights.
    #[serde(default)]
    pub adapter: Option<PathBuf>,
}

/// A tensor of the plan.
#[derive(Debug, Clone, Serialize)]
pub struct Planned {
    /// Name.
    pub name: String,
    /// Sizes, slowest axis first.
    pub shape: Vec<u64>,
    /// Type.
    #[serde(rename = "type")]
    pub kind: GgmlType,
    /// Bytes.
    pub bytes: u64,
}

/// What was written, or would be.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The files, or what they would be called.
    pub files: Vec<PathBuf>,
    /// Tensors in order.
    pub tensors: Vec<Planned>,
    /// Length of all files, headers included.
    pub bytes: u64,
    /// Bits of all tensors over their number of values.
    pub bits_per_weight: f64,
    /// Wall time.
    pub seconds: f64,
}

/// Chooses types and places, and writes nothing.
///
/// # Errors
/// [`crate::checkpoint::CheckpointError`] and [`super::GgufError`] for a checkpoint without the tensors of the model,
/// [`crate::adapter::AdapterError`] for an adapter that does not fit it, [`Error::InvalidArgument`] for options that do
/// not fit.
pub fn plan(source: &Path, out: &Path, model: &Model, options: &Options) -> Result<Report> {
    Ok(Export::new(source, out, model, options)?.report(0.0))
}

/// Writes the model to `out`, or to `out`'s name with `-00001-of-0000N` if it is split.
///
/// A file is written under its name with `.partial` and all are renamed at the end. If the same export was interrupted
/// before, tensors that were finished are checked and kept. Memory is bounded by some megabytes per thread, and no byte
/// depends on the number of threads.
///
/// # Errors
/// As [`plan`]; [`crate::checkpoint::CheckpointError::NonFinite`] for a value that is not finite,
/// [`crate::checkpoint::CheckpointError::OutputExists`], [`crate::checkpoint::CheckpointError::NoSpace`],
/// [`crate::checkpoint::CheckpointError::Locked`], [`Error::Io`].
pub fn write(
    source: &Path,
    out: &Path,
    model: &Model,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let started = Instant::now();
    let export = Export::new(source, out, model, options)?;
    shards::check_outputs(&export.shards)?;
    let headers: Vec<_> = export.shards.iter().map(|shard| (&shard.path, &shard.header)).collect();
    let summary = (headers, model, options, imatrix_state(options)?, export.weights.scalings());
    let plan = plan_hash(&summary, export.weights.inputs())?;
    // Before anything is removed: what an earlier run has written stays while the disk is full.
    shards::check_space(&export.shards)?;
    let mut finished = Finished::open(out, &plan)?;
    if finished.is_empty() {
        shards::discard(&export.shards);
    }
    progress.start(export.shards.iter().flat_map(|shard| &shard.tensors).map(|tensor| tensor.bytes).sum());
    match export.write_shards(&model.tensors, &mut finished, progress) {
        Ok(()) => {}
        // The same export can go on from here.
        Err(error @ (Error::Interrupted | Error::Io { .. })) => return Err(error),
        Err(error) => {
            shards::discard(&export.shards);
            finished.remove();
            return Err(error);
        }
    }
    shards::publish(&export.shards)?;
    finished.remove();
    Ok(export.report(started.elapsed().as_secs_f64()))
}

/// Size and age of the importance matrix.
fn imatrix_state(options: &Options) -> Result<Option<(u64, u128)>> {
    let Some(path) = &options.imatrix else { return Ok(None) };
    let found = std::fs::metadata(path).map_err(Error::io("read", path))?;
    let modified = found.modified().map_err(Error::io("read", path))?;
    Ok(Some((found.len(), modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos())))
}

/// Everything that is known before a weight is read.
struct Export {
    weights: Weights,
    imatrix: Option<Imatrix>,
    shards: Vec<Shard>,
    values: u64,
}

impl Export {
    fn new(source: &Path, out: &Path, model: &Model, options: &Options) -> Result<Self> {
        let weights = Weights::open(source, options.adapter.as_deref())?;
        let imatrix = options.imatrix.as_deref().map(Imatrix::open).transpose()?;
        let mut names = std::collections::HashSet::new();
        if let Some(twice) = model.tensors.iter().find(|spec| !names.insert(&spec.name)) {
            return Err(Error::invalid("model.tensors", format!("{} twice", twice.name), "each name once"));
        }
        let kinds: Vec<GgmlType> =
            model.tensors.iter().map(|spec| spec.source_type(&weights)).collect::<Result<_>>()?;
        imatrix.as_ref().map_or(Ok(()), |imatrix| imatrix.check(&model.tensors))?;
        let described: Vec<Weight<'_>> = model
            .tensors
            .iter()
            .zip(kinds)
            .map(|(spec, source)| Weight { name: &spec.name, shape: &spec.shape, source })
            .collect();
        let rules = Rules {
            file_type: options.file_type,
            num_layers: model.num_layers,
            num_experts: model.num_experts,
            overrides: Rules::overrides(&options.tensor_types)?,
        };
        let tensors = model.tensors.iter().zip(rules.types(&described)).map(|(spec, kind)| {
            // A row of the type's blocks, as the rules chose it; the shape was checked not to overflow.
            let bytes = kind.bytes(spec.num_values()).expect("types fit their rows");
            TensorInfo { name: spec.name.clone(), shape: spec.shape.clone(), kind, offset: 0, bytes }
        });
        let mut metadata = model.metadata.clone();
        metadata.push(("general.file_type".into(), Value::Uint32(options.file_type.id())));
        metadata.push(("general.quantization_version".into(), Value::Uint32(2)));
        metadata.extend(imatrix.iter().flat_map(Imatrix::metadata));
        let values = model.tensors.iter().map(Spec::num_values).sum();
        let shards = shards::split(out, metadata, tensors.collect(), options.max_shard_bytes)?;
        Ok(Self { weights, imatrix, shards, values })
    }

    fn write_shards(&self, specs: &[Spec], finished: &mut Finished, progress: &mut dyn Progress) -> Result<()> {
        let inputs = Inputs { weights: &self.weights, imatrix: self.imatrix.as_ref() };
        let mut specs = specs;
        for shard in &self.shards {
            let (own, rest) = specs.split_at(shard.tensors.len());
            super::writer::write(&inputs, shard, own, finished, progress)?;
            specs = rest;
        }
        Ok(())
    }

    fn report(&self, seconds: f64) -> Report {
        let tensors: Vec<&TensorInfo> = self.shards.iter().flat_map(|shard| &shard.tensors).collect();
        let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
        let planned = |tensor: &&TensorInfo| Planned {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            kind: tensor.kind,
            bytes: tensor.bytes,
        };
        Report {
            files: self.shards.iter().map(|shard| shard.path.clone()).collect(),
            tensors: tensors.iter().map(planned).collect(),
            bytes: self.shards.iter().map(Shard::file_bytes).sum(),
            bits_per_weight: bytes as f64 * 8.0 / self.values.max(1) as f64,
            seconds,
        }
    }
}
