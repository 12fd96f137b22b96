//! Values to blocks and back, byte for byte as ggml's reference quantisers do it on x86-64.
//!
//! A format is one file, written over lanes (see [`search`]) and compiled once per instruction set: every operation
//! rounds on its own in one order, so all sets give the same bytes.

// One index goes through several arrays of lanes; iterators over all of them would hide the formulas.
#![allow(clippy::needless_range_loop)]

mod block;
mod floats;
mod kernel;
mod q4_0;
mod q4_k;
mod q5_1;
mod q6_k;
mod q8_0;
mod search;

use rayon::prelude::*;

use super::GgmlType;
use crate::isa::Isa;
use crate::{parallel, Error, Result};

/// Values of a thread's piece of work.
const SLAB_LEN: usize = 1 << 16;

/// Quantises whole rows.
///
/// # Arguments
/// * `values`: finite, a multiple of `row_len`.
/// * `row_len`: values per row, a multiple of the block's length.
/// * `importance`: how much the error of each column counts (`row_len` values, llama.cpp's imatrix), or none. Q8_0 and
///   the float types do not use it.
/// * `bytes`: output, exactly as long as the blocks are.
///
/// # Errors
/// [`Error::InvalidArgument`] for lengths that do not fit, and for a scale that f16 cannot hold: values above 65504, or
/// for the quantised types a multiple of that.
///
/// ```
/// use moeft_core::gguf::{quants, GgmlType};
/// let (values, mut bytes, mut back) = ([1.0; 32], [0; 34], [0.0; 32]);
/// quants::quantize(GgmlType::Q8_0, &values, 32, None, &mut bytes)?;
/// quants::dequantize(GgmlType::Q8_0, &bytes, &mut back)?;
/// assert!((back[0] - 1.0).abs() < 1e-3);
/// # Ok::<(), moeft_core::Error>(())
/// ```
pub fn quantize(
    kind: GgmlType,
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) -> Result<()> {
    quantize_with(Isa::active()?, kind, values, row_len, importance, bytes)
}

/// As [`quantize`], on the threads of [`crate::parallel`]; every row is the work of one thread.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_rows(
    kind: GgmlType,
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) -> Result<()> {
    // Slabs of whole rows; those that do not fit are left to the checks of `quantize`.
    let rows = (SLAB_LEN / row_len.max(1)).max(1);
    let slab_bytes = kind.bytes((rows * row_len) as u64).unwrap_or(0) as usize;
    if parallel::threads() == 1 || slab_bytes == 0 || values.len() <= rows * row_len {
        return quantize(kind, values, row_len, importance, bytes);
    }
    check_bytes(kind, values.len(), bytes.len())?;
    let slabs = values.par_chunks(rows * row_len).zip(bytes.par_chunks_mut(slab_bytes));
    parallel::install(|| {
        slabs.map(|(values, bytes)| quantize(kind, values, row_len, importance, bytes)).collect::<Result<()>>()
    })
}

/// As [`quantize`], with an instruction set that the CPU must have.
#[doc(hidden)]
pub fn quantize_with(
    isa: Isa,
    kind: GgmlType,
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) -> Result<()> {
    if !isa.is_available() {
        return Err(Error::invalid("isa", isa.name(), "one that this CPU has"));
    }
    if row_len == 0 || !row_len.is_multiple_of(kind.block_len()) || !values.len().is_multiple_of(row_len) {
        let expected = format!("a multiple of {} for {kind} that divides {} values", kind.block_len(), values.len());
        return Err(Error::invalid("row_len", row_len, expected));
    }
    if let Some(importance) = importance.filter(|importance| importance.len() != row_len) {
        return Err(Error::invalid("importance", format!("{} values", importance.len()), format!("{row_len}")));
    }
    check_bytes(kind, values.len(), bytes.len())?;
    kernel::quantize(isa, kind, values, row_len, importance, bytes);
    if kernel::has_infinite_scale(kind, bytes) {
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let expected = format!("values whose scales {kind} can hold; keep this tensor in bf16 or f32");
        return Err(Error::invalid("values", format!("up to {largest}"), expected));
    }
    Ok(())
}

/// Restores values from blocks.
///
/// # Errors
/// [`Error::InvalidArgument`] if the lengths do not fit.
pub fn dequantize(kind: GgmlType, bytes: &[u8], values: &mut [f32]) -> Result<()> {
    if !values.len().is_multiple_of(kind.block_len()) {
        return Err(Error::invalid("values", values.len(), format!("a multiple of {}", kind.block_len())));
    }
    check_bytes(kind, values.len(), bytes.len())?;
    match kind {
        GgmlType::F32 => floats::dequantize_f32(bytes, values),
        GgmlType::F16 => floats::dequantize_f16(bytes, values),
        GgmlType::BF16 => floats::dequantize_bf16(bytes, values),
        GgmlType::Q4_0 => q4_0::dequantize::<18>(bytes, values),
        GgmlType::Q5_0 => q4_0::dequantize::<22>(bytes, values),
        GgmlType::Q5_1 => q5_1::dequantize(bytes, values),
        GgmlType::Q8_0 => q8_0::dequantize(bytes, values),
        GgmlType::Q4_K => q4_k::dequantize::<144>(bytes, values),
        GgmlType::Q5_K => q4_k::dequantize::<176>(bytes, values),
        GgmlType::Q6_K => q6_k::dequantize(bytes, values),
    }
    Ok(())
}

fn check_bytes(kind: GgmlType, values: usize, bytes: usize) -> Result<()> {
    let expected = values / kind.block_len() * kind.block_bytes();
    if bytes == expected {
        return Ok(());
    }
    Err(Error::invalid("bytes", format!("{bytes} long"), format!("{expected} for {values} values of {kind}")))
}
