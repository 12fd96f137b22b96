//! The dequantiser that runs: parallel over chunks of large weights, past the cache for outputs that do not fit it.

use rayon::prelude::*;

use super::element::Element;
use super::quantize::{runs_inline, TASK_LEN};
use super::{kernel, Codebook, Layout, Scales};
use crate::isa::Isa;
use crate::{cache, parallel, Result};

/// Restores 4-bit values into `out`: code times absmax in f32, rounded once (to nearest even) to `T`.
///
/// An `out` larger than the last-level cache is written past it: whoever reads it next finds it in memory.
///
/// # Arguments
/// * `packed` - [`Layout::packed_len`] bytes.
/// * `scales` - [`Layout::absmax_len`] scales, plain or nested; `first` is 0.
/// * `out` - output, `layout.groups * layout.group_len` values.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a length or the block size does not fit, or if
/// `MOEFT_ISA` names no instruction set of this CPU.
pub fn dequantize<T: Element>(
    packed: &[u8],
    scales: Scales<'_>,
    codebook: Codebook,
    layout: Layout,
    out: &mut [T],
) -> Result<()> {
    let streaming = size_of_val(out) > cache::last_level_bytes();
    dequantize_with(Isa::active()?, packed, scales, codebook, layout, out, streaming)
}

/// [`dequantize`] with the instructions of `isa`, which this CPU has, past the cache or not.
pub(super) fn dequantize_with<T: Element>(
    isa: Isa,
    packed: &[u8],
    scales: Scales<'_>,
    codebook: Codebook,
    layout: Layout,
    out: &mut [T],
    streaming: bool,
) -> Result<()> {
    layout.check(("out", out.len()), packed.len(), scales.len())?;
    scales.check()?;
    if out.is_empty() {
        return Ok(());
    }
    let restore = |group: usize, start: usize, out: &mut [T]| {
        let packed = &packed[group * layout.group_packed_len()..];
        let scales = scales.skip(group * layout.group_absmax_len());
        kernel::restore(isa, codebook, packed, scales, layout.block_size, start, out, streaming);
    };
    if runs_inline(out.len()) {
        out.chunks_mut(layout.group_len).enumerate().for_each(|(group, out)| restore(group, 0, out));
    } else {
        parallel::install(|| {
            out.par_chunks_mut(layout.group_len)
                .enumerate()
                .with_min_len(TASK_LEN.div_ceil(layout.group_len))
                .for_each(|(group, out)| {
                    let tasks = out.par_chunks_mut(TASK_LEN).enumerate();
                    tasks.for_each(|(task, out)| restore(group, task * TASK_LEN, out));
                });
        });
    }
    Ok(())
}
