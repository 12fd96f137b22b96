//! How important weights and layers are, from files.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::plan::{Action, Job};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::{Error, Result};

/// `format` of the file.
const FORMAT: &str = "moeft-layer-importance-v1";

/// Importance of every layer, brought to 0..1 by the smallest and the largest; all zero if they are equal.
#[derive(Debug, Clone, Serialize)]
pub struct LayerImportance(BTreeMap<u64, f64>);

#[derive(Deserialize)]
struct File {
    format: String,
    layers: BTreeMap<String, f64>,
}

impl LayerImportance {
    /// Reads `{"format": "moeft-layer-importance-v1", "layers": {"0": 0.5, ...}}` for layers `0..layers`.
    ///
    /// # Arguments
    /// * `missing`: importance, 0 to 1, of layers that the file does not name; without it, the file must name all.
    ///
    /// # Errors
    /// [`CheckpointError::Config`], [`Error::Io`].
    pub fn read(path: &Path, layers: u64, missing: Option<f64>) -> Result<Self> {
        let invalid = |cause: String| CheckpointError::Config { path: path.into(), cause };
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let file: File =
            serde_json::from_slice(&text).map_err(|error| invalid(format!("no layer importance: {error}")))?;
        if file.format != FORMAT {
            return Err(invalid(format!("format is {:?}, expected {FORMAT:?}", file.format)).into());
        }
        let mut values = BTreeMap::new();
        for (name, value) in file.layers {
            let layer = name.parse().ok().filter(|layer| *layer < layers);
            let layer = layer.ok_or_else(|| {
                invalid(format!("it names layer {name:?}, the base has 0 to {}", layers.saturating_sub(1)))
            })?;
            if !value.is_finite() {
                return Err(invalid(format!("layer {layer} is {value}, expected a finite number")).into());
            }
            values.insert(layer, value);
        }
        let absent: Vec<u64> = (0..layers).filter(|layer| !values.contains_key(layer)).collect();
        if !absent.is_empty() && missing.is_none() {
            let advice =
                "measure them too, or say in the recipe how important they are: missing_layers: 0 for as little \
                          as the least important layer, up to 1 for as much as the most important one";
            return Err(invalid(format!("of the {layers} layers of the base, {absent:?} are missing; {advice}")).into());
        }
        let low = values.values().copied().fold(f64::INFINITY, f64::min);
        let high = values.values().copied().fold(f64::NEG_INFINITY, f64::max);
        let scaled = |value: f64| if high > low { (value - low) / (high - low) } else { 0.0 };
        let measured = values.into_iter().map(|(layer, value)| (layer, scaled(value)));
        Ok(Self(measured.chain(absent.into_iter().zip(missing.into_iter().cycle())).collect()))
    }

    /// Importance of a layer; 0 outside of the layers.
    pub fn of(&self, layer: Option<u64>) -> f64 {
        layer.and_then(|layer| self.0.get(&layer)).copied().unwrap_or(0.0)
    }
}

/// Refuses Fisher information of another model, which would hold nothing back.
///
/// # Errors
/// [`CheckpointError::Config`].
pub fn check_fisher(fisher: &Checkpoint, jobs: &[Job]) -> Result<(), CheckpointError> {
    let merges: Vec<_> = jobs.iter().filter(|job| matches!(job.action, Action::Merge(_))).collect();
    let has_values = |job: &&Job| matches!(&job.action, Action::Merge(merge) if merge.fisher.is_some());
    if merges.is_empty() || merges.iter().any(has_values) {
        return Ok(());
    }
    let first = fisher.tensors().next().map(|tensor| tensor.info.name.clone()).unwrap_or_default();
    let count = merges.len();
    let cause =
        format!("it has {first:?}, but no values for any of the {count} merged tensors; measure it on this base");
    Err(CheckpointError::Config { path: fisher.path.clone(), cause })
}
