//! A short name for the content of a checkpoint, whatever its sharding.

use sha2::{Digest, Sha256};

use super::{Checkpoint, Tensor};
use crate::Result;

/// Bytes that each sample of a tensor holds.
const SAMPLE_BYTES: u64 = 4096;

/// Fingerprint of a checkpoint: `sampled-v1:` and 64 hex digits.
///
/// SHA-256 over all tensors sorted by name: name, dtype, shape, and the first, middle and last 4 KiB of the content
/// (the whole content of a tensor of up to 12 KiB). Reads megabytes where a full hash would read 50 GB; a different
/// training run changes every tensor that it trains, so the samples tell bases apart.
///
/// # Errors
/// [`crate::Error::Io`] if a file cannot be read.
pub fn fingerprint(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = Vec::new();
    for tensor in checkpoint.tensors() {
        add_text(&mut hash, &tensor.info.name);
        add_text(&mut hash, &tensor.info.dtype.to_string());
        hash.update((tensor.info.shape.len() as u64).to_le_bytes());
        for size in &tensor.info.shape {
            hash.update(size.to_le_bytes());
        }
        for (start, bytes) in samples(&tensor) {
            buffer.resize(bytes as usize, 0);
            tensor.read_at(&mut buffer, start)?;
            hash.update(&buffer);
        }
    }
    Ok(format!("sampled-v1:{}", hex(&hash.finalize())))
}

fn samples(tensor: &Tensor<'_>) -> Vec<(u64, u64)> {
    let bytes = tensor.info.bytes;
    if bytes <= 3 * SAMPLE_BYTES {
        return vec![(0, bytes)];
    }
    vec![(0, SAMPLE_BYTES), (bytes / 2 - SAMPLE_BYTES / 2, SAMPLE_BYTES), (bytes - SAMPLE_BYTES, SAMPLE_BYTES)]
}

/// The length keeps two texts from being mistaken for two others of the same bytes.
fn add_text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text.as_bytes());
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
