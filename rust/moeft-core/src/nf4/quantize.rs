//! The quantiser that runs: no allocation, parallel over chunks of large weights.

use rayon::prelude::*;

use super::element::Element;
use super::{kernel, portable, Codebook, Layout};
use crate::isa::Isa;
use crate::{parallel, Result};

/// Values per parallel task; a multiple of every block size.
pub(super) const TASK_LEN: usize = 1 << 16;

/// Below this many values one thread is faster than waking others.
const PARALLEL_LEN: usize = 1 << 19;

/// Quantises `values` to 4 bits, byte-identical to bitsandbytes' `quantize_4bit` on each group.
///
/// NaN and infinite values are stored as bitsandbytes stores them, which destroys their block: its absmax is not
/// finite either, so [`first_non_finite`](super::first_non_finite) of `absmax` tells whether there were any.
///
/// # Arguments
/// * `values` - `layout.groups * layout.group_len` values.
/// * `packed` - output, [`Layout::packed_len`] bytes; the first value of a byte is its high nibble.
/// * `absmax` - output, [`Layout::absmax_len`] scales.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a length or the block size does not fit, or if
/// `MOEFT_ISA` names no instruction set of this CPU.
pub fn quantize<T: Element>(
    values: &[T],
    codebook: Codebook,
    layout: Layout,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    quantize_with(Isa::active()?, values, codebook, layout, packed, absmax)
}

/// [`quantize`] with the instructions of `isa`, which this CPU has.
pub(super) fn quantize_with<T: Element>(
    isa: Isa,
    values: &[T],
    codebook: Codebook,
    layout: Layout,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    layout.check(("values", values.len()), packed.len(), absmax.len())?;
    if values.is_empty() {
        return Ok(());
    }
    let block_size = layout.block_size;
    let (group_packed, group_absmax) = (layout.group_packed_len(), layout.group_absmax_len());
    if runs_inline(values.len()) {
        let scales = absmax.chunks_mut(group_absmax);
        for ((v, p), a) in values.chunks(layout.group_len).zip(packed.chunks_mut(group_packed)).zip(scales) {
            quantize_group(isa, codebook, v, block_size, p, a);
        }
    } else {
        parallel::install(|| {
            values
                .par_chunks(layout.group_len)
                .zip(packed.par_chunks_mut(group_packed))
                .zip(absmax.par_chunks_mut(group_absmax))
                .with_min_len(TASK_LEN.div_ceil(layout.group_len))
                .for_each(|((v, p), a)| quantize_group_parallel(isa, codebook, v, block_size, p, a));
        });
    }
    Ok(())
}

/// Quantises one group in parallel. Lengths are as in [`quantize`] and were checked by the caller.
pub(super) fn quantize_group_parallel<T: Element>(
    isa: Isa,
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    if runs_inline(values.len()) {
        return quantize_group(isa, codebook, values, block_size, packed, absmax);
    }
    parallel::install(|| {
        values
            .par_chunks(TASK_LEN)
            .zip(packed.par_chunks_mut(TASK_LEN / 2))
            .zip(absmax.par_chunks_mut(TASK_LEN / block_size))
            .for_each(|((v, p), a)| quantize_group(isa, codebook, v, block_size, p, a));
    });
}

/// Whether work on `len` values is for the calling thread alone.
pub(super) fn runs_inline(len: usize) -> bool {
    len < PARALLEL_LEN || parallel::threads() == 1
}

/// Quantises one group, or a part of one that starts at a block.
fn quantize_group<T: Element>(
    isa: Isa,
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let whole = values.len() / block_size;
    let (blocks, short) = values.split_at(whole * block_size);
    let (packed, short_packed) = packed.split_at_mut(whole * block_size / 2);
    let (absmax, short_absmax) = absmax.split_at_mut(whole);
    kernel::quantize_blocks(isa, codebook, blocks, block_size, packed, absmax);
    if let [absmax] = short_absmax {
        *absmax = portable::quantize_short_block(codebook, short, short_packed);
    }
}
