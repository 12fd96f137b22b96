//! Search for values that must not be quantised.

use super::Element;

/// Position of the first infinite or NaN value, or `None`.
///
/// [`quantize`](super::quantize()) stores non-finite values the way bitsandbytes does, which destroys their
/// block; callers that quantise weights look here first and refuse.
pub fn first_non_finite<T: Element>(values: &[T]) -> Option<usize> {
    // Whole chunks are folded without an early exit, which vectorises; only a bad chunk is searched.
    const CHUNK: usize = 1024;
    values.chunks(CHUNK).enumerate().find_map(|(i, chunk)| {
        let any = chunk.iter().fold(false, |any, v| any | v.is_non_finite());
        any.then(|| chunk.iter().position(|v| v.is_non_finite()).map(|at| i * CHUNK + at)).flatten()
    })
}
