//! What a merge did.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::lora::Extremes;

/// Whether the base was proved to be the one that the adapters were trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseCheck {
    /// Every adapter carries the fingerprint of this base.
    Verified,
    /// At least one adapter carries no fingerprint; shapes and names fit.
    Unverified,
}

/// What a merge did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MergeReport {
    /// The folder that was written.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub out: PathBuf,
    /// Tensors that got deltas.
    pub tensors_merged: u64,
    /// Tensors that were copied.
    pub tensors_copied: u64,
    /// Bytes of all tensors of the output.
    pub bytes: u64,
    /// Files that an interrupted run had finished.
    pub shards_resumed: u64,
    /// Wall time.
    pub seconds: f64,
    /// Largest delta and weight of every merged tensor.
    pub merged: BTreeMap<String, Extremes>,
    /// Fingerprint of the base.
    pub base_fingerprint: String,
    /// Whether that is what the adapters expect.
    pub base_check: BaseCheck,
}
