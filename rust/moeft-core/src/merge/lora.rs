//! The arithmetic of a LoRA merge: `w' = round(w + sum_i weight_i * ((B_i @ A_i) * scaling_i))` in f32.
//!
//! `B @ A` is summed over the rank in order with fused multiply-adds, which is what torch's f32 matmul does: 0 of 10 M
//! products differ, while separate roundings change 5 of 100,000 merged bf16 weights. IEEE 754 defines the fused
//! operation, so every machine gives the same bytes. The scalar definition is [`merge_row_reference`]; the fast path
//! equals it bit for bit.

use rayon::prelude::*;

use super::recipe::Rounding;
use crate::checkpoint::Dtype;
use crate::float::{decode, encode, round_trip};
use crate::parallel;

/// Columns that are computed at once: sum and weights stay in the L1 cache.
const BLOCK: usize = 1024;

/// What one adapter adds to a panel of rows.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// A of this expert, `[rank, cols]`.
    pub a: &'a [f32],
    /// B of this expert and these rows, `[rows, rank]`.
    pub b: &'a [f32],
    /// Rank.
    pub rank: usize,
    /// `alpha / r` of the adapter.
    pub scaling: f32,
    /// Weight of the adapter times scale of the recipe.
    pub weight: f32,
}

/// How a panel is stored.
#[derive(Debug, Clone, Copy)]
pub struct Storage {
    /// Columns of a row.
    pub cols: usize,
    /// Type of the base.
    pub base: Dtype,
    /// Type of the output.
    pub out: Dtype,
    /// How often results are rounded.
    pub rounding: Rounding,
}

/// Largest values met, for the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Extremes {
    /// Largest magnitude that was added.
    pub max_delta: f32,
    /// Largest magnitude in the base.
    pub max_weight: f32,
}

impl Extremes {
    /// The larger of both.
    pub fn max(self, other: Self) -> Self {
        let larger = |left: f32, right: f32| if right > left { right } else { left };
        Self {
            max_delta: larger(self.max_delta, other.max_delta),
            max_weight: larger(self.max_weight, other.max_weight),
        }
    }
}

/// Merges a panel of rows, in parallel.
///
/// # Arguments
/// * `input`: rows of the base, `[rows, cols]` of `storage.base`, little endian.
/// * `output`: the same rows, of `storage.out`.
/// * `terms`: one per adapter.
///
/// # Panics
/// If the lengths do not fit each other: our own mistake.
pub fn merge_panel(storage: Storage, input: &[u8], output: &mut [u8], terms: &[Term<'_>]) -> Extremes {
    let row_bytes = |dtype: Dtype| storage.cols * (dtype.bits() as usize / 8);
    let rows = input.par_chunks_exact(row_bytes(storage.base)).zip(output.par_chunks_exact_mut(row_bytes(storage.out)));
    let merge = |(row, (input, output)): (usize, (&[u8], &mut [u8]))| merge_row(storage, input, output, terms, row);
    // Rows of a small model are short; a task should be worth more than its hand-over.
    let rows = rows.enumerate().with_min_len((16 * BLOCK).div_ceil(storage.cols));
    parallel::install(|| rows.map(merge).reduce(Extremes::default, Extremes::max))
}

fn merge_row(storage: Storage, input: &[u8], output: &mut [u8], terms: &[Term<'_>], row: usize) -> Extremes {
    let (base_size, out_size) = (storage.base.bits() as usize / 8, storage.out.bits() as usize / 8);
    let (mut weights, mut deltas, mut product) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
    let mut extremes = Extremes::default();
    let blocks = input.chunks(BLOCK * base_size).zip(output.chunks_mut(BLOCK * out_size));
    for (start, (input, output)) in (0..).step_by(BLOCK).zip(blocks) {
        let count = input.len() / base_size;
        let (weights, deltas, product) = (&mut weights[..count], &mut deltas[..count], &mut product[..count]);
        decode(storage.base, input, weights);
        for (index, term) in terms.iter().enumerate() {
            let b = &term.b[row * term.rank..][..term.rank];
            multiply(product, &term.a[start..], storage.cols, b);
            for (delta, product) in deltas.iter_mut().zip(&*product) {
                let scaled = product * term.scaling * term.weight;
                *delta = if index == 0 { scaled } else { *delta + scaled };
            }
        }
        for (weight, delta) in weights.iter_mut().zip(deltas) {
            let delta = if storage.rounding == Rounding::Peft { round_trip(storage.base, *delta) } else { *delta };
            let seen = Extremes { max_delta: delta.abs(), max_weight: weight.abs() };
            extremes = extremes.max(seen);
            *weight = add(*weight, delta);
        }
        encode(storage.out, weights, output);
    }
    extremes
}

/// `weight + delta`, and `weight` itself for a zero delta: -0.0 + 0.0 would be +0.0 and change bytes.
#[inline(always)]
fn add(weight: f32, delta: f32) -> f32 {
    let sum = weight + delta;
    if delta == 0.0 {
        weight
    } else {
        sum
    }
}

/// `product[c] = sum_j b[j] * a[j * stride + c]`, summed in the order of j.
fn multiply(product: &mut [f32], a: &[f32], stride: usize, b: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512F.
            return unsafe { multiply_avx512(product, a, stride, b) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has AVX2 and FMA.
            return unsafe { multiply_avx2(product, a, stride, b) };
        }
    }
    multiply_plain(product, a, stride, b);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_avx512(product: &mut [f32], a: &[f32], stride: usize, b: &[f32]) {
    multiply_plain(product, a, stride, b);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2(product: &mut [f32], a: &[f32], stride: usize, b: &[f32]) {
    multiply_plain(product, a, stride, b);
}

/// Lanes are columns, so the width of the vectors does not change any sum. Without hardware for `mul_add` it is a slow
/// call, which gives the same bytes.
#[inline(always)]
fn multiply_plain(product: &mut [f32], a: &[f32], stride: usize, b: &[f32]) {
    let count = product.len();
    product.fill(0.0);
    for (j, &b) in b.iter().enumerate() {
        for (sum, a) in product.iter_mut().zip(&a[j * stride..][..count]) {
            *sum = b.mul_add(*a, *sum);
        }
    }
}

/// The definition of [`merge_panel`] for one row, element by element.
pub fn merge_row_reference(storage: Storage, input: &[u8], output: &mut [u8], terms: &[Term<'_>], row: usize) {
    let mut weights = vec![0.0; storage.cols];
    decode(storage.base, input, &mut weights);
    for (column, weight) in weights.iter_mut().enumerate() {
        let mut delta = 0.0;
        for (index, term) in terms.iter().enumerate() {
            let mut product = 0.0f32;
            for j in 0..term.rank {
                product = term.b[row * term.rank + j].mul_add(term.a[j * storage.cols + column], product);
            }
            let scaled = product * term.scaling * term.weight;
            delta = if index == 0 { scaled } else { delta + scaled };
        }
        if storage.rounding == Rounding::Peft {
            delta = round_trip(storage.base, delta);
        }
        if delta != 0.0 {
            *weight += delta;
        }
    }
    encode(storage.out, &weights, output);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(count: usize, seed: u64, spread: f32) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * spread
        };
        (0..count).map(|_| next()).collect()
    }

    proptest! {
        #[test]
        fn the_fast_path_equals_the_definition(
            rows in 1usize..5, cols in 1usize..2100, ranks in prop::collection::vec(1usize..20, 1..3), seed: u64,
            peft: bool, wide: bool, out_f16: bool,
        ) {
            let rounding = if peft { Rounding::Peft } else { Rounding::Single };
            let base = if wide { Dtype::F32 } else { Dtype::BF16 };
            let storage = Storage { cols, base, out: if out_f16 { Dtype::F16 } else { base }, rounding };
            let mut input = vec![0; rows * cols * base.bits() as usize / 8];
            encode(base, &values(rows * cols, seed, 0.5), &mut input);
            let factors: Vec<_> = ranks.iter().map(|&rank| {
                (rank, values(rank * cols, seed ^ 7, 0.1), values(rows * rank, seed ^ 9, 0.1))
            }).collect();
            let terms: Vec<_> = factors.iter().map(|(rank, a, b)| {
                Term { a, b, rank: *rank, scaling: 1.5, weight: 0.3 }
            }).collect();
            let size = rows * cols * storage.out.bits() as usize / 8;
            let (mut fast, mut slow) = (vec![0xaa; size], vec![0x55; size]);
            merge_panel(storage, &input, &mut fast, &terms);
            let (in_row, out_row) = (input.len() / rows, size / rows);
            for row in 0..rows {
                let output = &mut slow[row * out_row..][..out_row];
                merge_row_reference(storage, &input[row * in_row..][..in_row], output, &terms, row);
            }
            prop_assert_eq!(fast, slow);
        }

        #[test]
        fn zero_factors_change_no_byte(bytes in prop::collection::vec(any::<u8>(), 2..200), rank in 1usize..4) {
            let cols = bytes.len() / 2;
            let storage = Storage { cols, base: Dtype::BF16, out: Dtype::BF16, rounding: Rounding::Single };
            let mut input = bytes[..cols * 2].to_vec();
            // NaN payloads are not kept, and a NaN is refused before it is written.
            for item in input.chunks_exact_mut(2) {
                if item[1] & 0x7f == 0x7f { item[1] = 0; }
            }
            let (a, b) = (values(rank * cols, 3, 1.0), vec![0.0; rank]);
            let mut output = vec![0xaa; cols * 2];
            merge_panel(storage, &input, &mut output, &[Term { a: &a, b: &b, rank, scaling: 2.0, weight: 1.0 }]);
            prop_assert_eq!(output, input);
        }
    }
}
