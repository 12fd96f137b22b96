//! What a merge did.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::kernel::Gathered;

/// Whether the base was proved to be the one that the adapters were trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseCheck {
    /// Every adapter carries the fingerprint of this base.
    Verified,
    /// At least one adapter carries no fingerprint; shapes and names fit.
    Unverified,
    /// No adapter, so nothing to check.
    NoAdapter,
}

/// What became of one tensor that was computed, against the base, before the result was rounded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorReport {
    /// What was done where the values decide it: slerp or lerp, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Largest change of a weight.
    pub max_delta: f32,
    /// Largest magnitude in the base.
    pub max_weight: f32,
    /// Norm over that of the base; 1 if both are zero.
    pub norm_ratio: f32,
    /// Cosine of the angle with the base; 1 if one of them is zero.
    pub cosine: f32,
}

impl TensorReport {
    /// From the sums `[w'.w', w.w, w'.w]` and the extremes of all chunks.
    pub(super) fn new(branch: Option<String>, all: &Gathered) -> Self {
        let (sums, [change, weight]) = (&all.sums, all.range);
        let ratio = |over: f64, under: f64| if under > 0.0 { (over / under) as f32 } else { 1.0 };
        Self {
            branch,
            max_delta: (-change).max(0.0),
            max_weight: weight.max(0.0),
            norm_ratio: ratio(sums[0].sqrt(), sums[1].sqrt()),
            cosine: ratio(sums[2], (sums[0] * sums[1]).sqrt()).clamp(-1.0, 1.0),
        }
    }
}

/// What a merge did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MergeReport {
    /// The folder that was written.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub out: PathBuf,
    /// How weights were combined.
    pub method: String,
    /// Tensors that were computed.
    pub tensors_merged: u64,
    /// Tensors that were copied.
    pub tensors_copied: u64,
    /// Bytes of all tensors of the output.
    pub bytes: u64,
    /// Files that an interrupted run had finished.
    pub shards_resumed: u64,
    /// Bytes that an interrupted run had written, those of finished files included.
    pub bytes_resumed: u64,
    /// Wall time.
    pub seconds: f64,
    /// Every tensor that was computed.
    pub merged: BTreeMap<String, TensorReport>,
    /// Fingerprint of the base.
    pub base_fingerprint: String,
    /// Whether that is what the adapters expect.
    pub base_check: BaseCheck,
}
