//! The dequantiser that runs: one table of sixteen products per block, parallel over chunks of large weights.

use rayon::prelude::*;

use super::element::Element;
use super::quantize::{PARALLEL_LEN, TASK_LEN};
use super::{Layout, CODE};
use crate::{parallel, Result};

/// Restores NF4 values into `out`: code times absmax in f32, rounded once (to nearest even) to `T`.
///
/// # Arguments
/// * `packed` - [`Layout::packed_len`] bytes.
/// * `absmax` - [`Layout::absmax_len`] scales.
/// * `out` - output, `layout.groups * layout.group_len` values.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a length or the block size does not fit.
pub fn dequantize<T: Element>(packed: &[u8], absmax: &[f32], layout: Layout, out: &mut [T]) -> Result<()> {
    layout.check(("out", out.len()), packed.len(), absmax.len())?;
    if out.is_empty() {
        return Ok(());
    }
    let block_size = layout.block_size;
    let (group_packed, group_absmax) = (layout.group_packed_len(), layout.group_absmax_len());
    if out.len() < PARALLEL_LEN {
        let groups = packed.chunks(group_packed).zip(absmax.chunks(group_absmax));
        for ((p, a), o) in groups.zip(out.chunks_mut(layout.group_len)) {
            dequantize_group(p, a, block_size, o);
        }
    } else {
        parallel::install(|| {
            packed
                .par_chunks(group_packed)
                .zip(absmax.par_chunks(group_absmax))
                .zip(out.par_chunks_mut(layout.group_len))
                .with_min_len(TASK_LEN.div_ceil(layout.group_len))
                .for_each(|((p, a), o)| dequantize_group_parallel(p, a, block_size, o));
        });
    }
    Ok(())
}

/// Restores one group in parallel.
fn dequantize_group_parallel<T: Element>(packed: &[u8], absmax: &[f32], block_size: usize, out: &mut [T]) {
    if out.len() < PARALLEL_LEN {
        return dequantize_group(packed, absmax, block_size, out);
    }
    packed
        .par_chunks(TASK_LEN / 2)
        .zip(absmax.par_chunks(TASK_LEN / block_size))
        .zip(out.par_chunks_mut(TASK_LEN))
        .for_each(|((p, a), o)| dequantize_group(p, a, block_size, o));
}

/// Restores one group, or a part of one that starts at a block.
fn dequantize_group<T: Element>(packed: &[u8], absmax: &[f32], block_size: usize, out: &mut [T]) {
    for ((bytes, &absmax), out) in packed.chunks(block_size / 2).zip(absmax).zip(out.chunks_mut(block_size)) {
        let table = CODE.map(|code| T::from_f32(code * absmax));
        let mut pairs = out.chunks_exact_mut(2);
        for (pair, &byte) in (&mut pairs).zip(bytes) {
            pair[0] = table[usize::from(byte >> 4)];
            pair[1] = table[usize::from(byte & 15)];
        }
        if let ([last], Some(&byte)) = (pairs.into_remainder(), bytes.last()) {
            *last = table[usize::from(byte >> 4)];
        }
    }
}
