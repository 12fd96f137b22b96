//! The formats behind one face, compiled once per instruction set. Arguments were checked by the callers.

use super::{floats, q4_0, q4_k, q5_1, q6_k, q8_0};
use crate::gguf::GgmlType;
use crate::isa::Isa;

/// Quantises whole rows.
pub(super) fn quantize(
    isa: Isa,
    kind: GgmlType,
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) {
    match isa {
        Isa::Scalar => run(kind, values, row_len, importance, bytes),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller made sure that the CPU has the instructions.
        Isa::Avx2 => unsafe { run_avx2(kind, values, row_len, importance, bytes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { run_avx512(kind, values, row_len, importance, bytes) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("not available on this architecture"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
fn run_avx512(kind: GgmlType, values: &[f32], row_len: usize, importance: Option<&[f32]>, bytes: &mut [u8]) {
    run(kind, values, row_len, importance, bytes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn run_avx2(kind: GgmlType, values: &[f32], row_len: usize, importance: Option<&[f32]>, bytes: &mut [u8]) {
    run(kind, values, row_len, importance, bytes);
}

#[inline(always)]
fn run(kind: GgmlType, values: &[f32], row_len: usize, importance: Option<&[f32]>, bytes: &mut [u8]) {
    match kind {
        GgmlType::F32 => floats::quantize_f32(values, bytes),
        GgmlType::F16 => floats::quantize_f16(values, bytes),
        GgmlType::BF16 => floats::quantize_bf16(values, bytes),
        GgmlType::Q4_0 => q4_0::quantize::<18>(values, row_len, importance, bytes),
        GgmlType::Q5_0 => q4_0::quantize::<22>(values, row_len, importance, bytes),
        GgmlType::Q5_1 => q5_1::quantize(values, row_len, importance, bytes),
        GgmlType::Q8_0 => q8_0::quantize(values, bytes),
        GgmlType::Q4_K => q4_k::quantize::<144>(values, row_len, importance, bytes),
        GgmlType::Q5_K => q4_k::quantize::<176>(values, row_len, importance, bytes),
        GgmlType::Q6_K => q6_k::quantize(values, row_len, importance, bytes),
    }
}

/// Whether a scale or, in F16 and BF16, a value overflowed.
pub(super) fn has_infinite_scale(kind: GgmlType, bytes: &[u8]) -> bool {
    let (places, exponent): (&[usize], u16) = match kind {
        GgmlType::F32 => return false,
        GgmlType::BF16 => (&[0], 0x7f80),
        GgmlType::F16 | GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => (&[0], 0x7c00),
        GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => (&[0, 2], 0x7c00),
        GgmlType::Q6_K => (&[208], 0x7c00),
    };
    let overflowed =
        |block: &[u8], place: usize| u16::from_le_bytes([block[place], block[place + 1]]) & exponent == exponent;
    let mut blocks = bytes.chunks_exact(kind.block_bytes());
    blocks.any(|block| places.iter().any(|&place| overflowed(block, place)))
}
