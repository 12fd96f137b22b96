//! F32, F16 and BF16: one value a block.

use half::{bf16, f16};

use crate::float::round_bf16;

#[inline(always)]
pub(super) fn quantize_f32(values: &[f32], bytes: &mut [u8]) {
    for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<4>().0) {
        *bytes = value.to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn quantize_f16(values: &[f32], bytes: &mut [u8]) {
    for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<2>().0) {
        *bytes = f16::from_f32(*value).to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn quantize_bf16(values: &[f32], bytes: &mut [u8]) {
    for (value, bytes) in values.iter().zip(bytes.as_chunks_mut::<2>().0) {
        *bytes = round_bf16(*value).to_le_bytes();
    }
}

pub(super) fn dequantize_f32(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}

pub(super) fn dequantize_f16(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = f16::from_le_bytes(*bytes).to_f32();
    }
}

pub(super) fn dequantize_bf16(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = bf16::from_le_bytes(*bytes).to_f32();
    }
}
