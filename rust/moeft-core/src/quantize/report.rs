//! What a quantisation did.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::plan::Component;

/// Bytes of a component.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// In the source.
    pub before: u64,
    /// In the packed checkpoint.
    pub after: u64,
}

/// What a quantisation did.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizeReport {
    /// The folder that was written.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub out: PathBuf,
    /// Bytes of each component before and after.
    pub components: BTreeMap<Component, Bytes>,
    /// Bytes of all tensors before and after.
    pub total: Bytes,
    /// Weights and stacks that were packed.
    pub weights_packed: u64,
    /// Tensors that were copied.
    pub tensors_copied: u64,
    /// Files that an interrupted run had finished.
    pub shards_resumed: u64,
    /// Bytes that an interrupted run had written, those of finished files included.
    pub bytes_resumed: u64,
    /// Wall time.
    pub seconds: f64,
    /// Fingerprint of the source.
    pub base_fingerprint: String,
}
