//! How important each layer is, from a file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::checkpoint::CheckpointError;
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
    /// Reads `{"format": "moeft-layer-importance-v1", "layers": {"0": 0.5, ...}}`; it must name layers `0..layers`.
    ///
    /// # Errors
    /// [`CheckpointError::Config`], [`Error::Io`].
    pub fn read(path: &Path, layers: u64) -> Result<Self> {
        let invalid = |cause: String| CheckpointError::Config { path: path.into(), cause };
        let text = std::fs::read(path).map_err(Error::io("read", path))?;
        let file: File =
            serde_json::from_slice(&text).map_err(|error| invalid(format!("no layer importance: {error}")))?;
        if file.format != FORMAT {
            return Err(invalid(format!("format is {:?}, expected {FORMAT:?}", file.format)).into());
        }
        let values = (0..layers).map(|layer| match file.layers.get(&layer.to_string()) {
            Some(value) if value.is_finite() => Ok((layer, *value)),
            Some(value) => Err(invalid(format!("layer {layer} is {value}, expected a finite number"))),
            None => Err(invalid(format!("layer {layer} is missing, the base has {layers} layers"))),
        });
        let values: BTreeMap<u64, f64> = values.collect::<Result<_, _>>()?;
        if file.layers.len() as u64 != layers {
            return Err(invalid(format!("it has {} layers, the base has {layers}", file.layers.len())).into());
        }
        let low = values.values().copied().fold(f64::INFINITY, f64::min);
        let high = values.values().copied().fold(f64::NEG_INFINITY, f64::max);
        let scaled = |value: f64| if high > low { (value - low) / (high - low) } else { 0.0 };
        Ok(Self(values.into_iter().map(|(layer, value)| (layer, scaled(value))).collect()))
    }

    /// Importance of a layer; 0 outside of the layers.
    pub fn of(&self, layer: Option<u64>) -> f64 {
        layer.and_then(|layer| self.0.get(&layer)).copied().unwrap_or(0.0)
    }
}
