//! Part of a group restored to f32, for kernels that work through packed weights panel by panel.

use super::{kernel, Codebook, Scales};
use crate::isa::Isa;

/// Restores values `start..start + out.len()` of a group, code times absmax, as [`dequantize`](super::dequantize())
/// does. `out` stays in the cache.
///
/// Any `start` will do; fastest are even ones, and among them those at the start of a block.
pub(crate) fn decode_run(
    isa: Isa,
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [f32],
    codebook: Codebook,
) {
    let (odd, out) = out.split_at_mut(out.len().min(start % 2));
    if let [first] = odd {
        let index = packed[start / 2] & 15;
        *first = codebook.codes()[usize::from(index)] * scales.get(start / block_size);
    }
    if !out.is_empty() {
        kernel::restore(isa, codebook, packed, scales, block_size, start + odd.len(), out, false);
    }
}
