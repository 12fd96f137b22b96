//! The inner loops of each instruction set behind one face. Arguments were checked by the callers.

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{portable, scales, Codebook, Element, Scales};
use crate::isa::Isa;

/// Quantises whole blocks: `values.len()` is a multiple of `block_size`, `packed` has half as many bytes and `absmax`
/// one scale per block.
pub(super) fn quantize_blocks<T: Element>(
    isa: Isa,
    codebook: Codebook,
    values: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    debug_assert!(isa.is_available());
    match isa {
        // SAFETY: every caller has its `isa` from `Isa::active` or `Isa::available`, so this CPU has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::quantize_blocks(codebook, values, block_size, packed, absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::quantize_blocks(codebook, values, block_size, packed, absmax) },
        _ => portable::quantize_blocks(codebook, values, block_size, packed, absmax),
    }
}

/// Restores values `start..start + out.len()` of a group; `start` is even.
///
/// With `streaming`, outputs that lie well for it bypass the cache.
#[allow(clippy::too_many_arguments)]
pub(super) fn restore<T: Element>(
    isa: Isa,
    codebook: Codebook,
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [T],
    streaming: bool,
) {
    debug_assert!(isa.is_available() && start.is_multiple_of(2));
    let packed = &packed[start / 2..];
    // A line of the cache is bypassed as a whole; blocks are multiples of it.
    let streaming = streaming && start.is_multiple_of(block_size) && (out.as_ptr() as usize).is_multiple_of(64);
    match isa {
        // SAFETY: every caller has its `isa` from `Isa::active` or `Isa::available`, so this CPU has it.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe {
            if streaming {
                avx512::restore::<T, true>(codebook, packed, scales, block_size, start, out);
            } else {
                avx512::restore::<T, false>(codebook, packed, scales, block_size, start, out);
            }
        },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe {
            if streaming {
                avx2::restore::<T, true>(codebook, packed, scales, block_size, start, out);
            } else {
                avx2::restore::<T, false>(codebook, packed, scales, block_size, start, out);
            }
        },
        _ => for_each_block(packed, scales, block_size, start, out, |bytes, absmax, out| {
            portable::restore_block(codebook, bytes, absmax, out);
        }),
    }
}

/// Block size for which the loop over blocks is compiled on its own: the usual one.
const USUAL_BLOCK: usize = 64;

/// Calls `work` with the bytes, the scale and the output of each block that values `start..start + out.len()` touch.
/// `packed` begins at value `start`, which is even.
///
/// With vectors a block takes some ten cycles, so what the loop itself costs counts: whole blocks go in runs, and in
/// those of the usual size all lengths are constants.
#[inline(always)]
pub(super) fn for_each_block<T>(
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [T],
    mut work: impl FnMut(&[u8], f32, &mut [T]),
) {
    let mut restored = [0.0; scales::RUN];
    let (mut at, mut bytes, mut rest) = (start, packed, out);
    while !rest.is_empty() {
        let block = at / block_size;
        let part = (block + 1) * block_size - at;
        let (blocks, len) = if part < block_size || rest.len() < block_size {
            (1, part.min(rest.len()))
        } else {
            (rest.len() / block_size, block_size)
        };
        let absmax = scales.run(block, blocks, &mut restored);
        let (run, after) = rest.split_at_mut(absmax.len() * len);
        if len == USUAL_BLOCK {
            let whole = run.as_chunks_mut::<USUAL_BLOCK>().0.iter_mut().zip(bytes.as_chunks::<{ USUAL_BLOCK / 2 }>().0);
            whole.zip(absmax).for_each(|((out, bytes), &absmax)| work(bytes, absmax, out));
        } else {
            let whole = run.chunks_exact_mut(len).zip(bytes.chunks(len.div_ceil(2)));
            whole.zip(absmax).for_each(|((out, bytes), &absmax)| work(bytes, absmax, out));
        }
        at += run.len();
        bytes = &bytes[run.len() / 2..];
        rest = after;
    }
}
