//! Products of rows with weights, against sums in f64, on every instruction set of this CPU.

use half::{bf16, f16};
use moeft_core::gemm::{add_outer, multiply, Floats, Matrix, Rows, Side, Values};
use moeft_core::isa::Isa;
use moeft_core::nf4::{self, Codebook, Layout, Scales};
use proptest::prelude::*;

/// Values in [-1, 1) that depend on the seed alone.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn rows_of(isa: Isa, values: &[f32], count: usize, width: usize) -> Rows {
    let mut rows = Rows::default();
    rows.load(isa, Floats::F32(values), (count, width), |i| i, &mut Vec::new());
    rows
}

fn values_of(isa: Isa, rows: &Rows) -> Vec<f32> {
    let mut values = Vec::new();
    rows.unload(isa, &mut Vec::new(), |_, row| values.extend_from_slice(row));
    values
}

/// `x [n, steps]` by `w`, whose element for (output, step) `at` finds; f64.
fn naive(x: &[f32], n: usize, steps: usize, outputs: usize, at: impl Fn(usize, usize) -> f32) -> Vec<f64> {
    let product = |row: usize, output: usize| -> f64 {
        (0..steps).map(|step| f64::from(x[row * steps + step]) * f64::from(at(output, step))).sum()
    };
    (0..n * outputs).map(|i| product(i / outputs, i % outputs)).collect()
}

/// Terms of at most 1 each: a sum of k of them is off by at most k roundings of at most k * 2^-24.
fn assert_near(found: &[f32], expected: &[f64], steps: usize) {
    assert_eq!(found.len(), expected.len());
    let bound = (steps * steps) as f64 * f64::from(f32::EPSILON) + 1e-7;
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(found) - expected).abs() <= bound, "{found} at {i}, expected {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_on_both_sides_equal_sums_in_f64(
        n in 0usize..40, rows in 1usize..300, cols in 1usize..300, seed: u64, kind in 0u8..4,
    ) {
        let dense = random(rows * cols, seed);
        let layout = Layout { groups: 1, group_len: rows * cols, block_size: 64 };
        let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
        nf4::quantize(&dense, Codebook::Nf4, layout, &mut packed, &mut absmax)?;
        let (bf16s, f16s): (Vec<_>, Vec<_>) = dense.iter().map(|&v| (bf16::from_f32(v), f16::from_f32(v))).unzip();
        let values = match kind {
            0 => Values::Dense(Floats::F32(&dense)),
            1 => Values::Dense(Floats::Bf16(&bf16s)),
            2 => Values::Dense(Floats::F16(&f16s)),
            _ => Values::Nf4 { packed: &packed, scales: Scales::Plain(&absmax), block_size: 64, codebook: Codebook::Nf4 },
        };
        let mut held = dense.clone();
        match values {
            Values::Dense(floats) => floats.widen(0, &mut held),
            Values::Nf4 { .. } => nf4::dequantize(&packed, Scales::Plain(&absmax), Codebook::Nf4, layout, &mut held)?,
        }
        let weight = Matrix { values, rows, cols };
        for isa in Isa::available() {
            for (side, steps, outputs) in [(Side::Columns, cols, rows), (Side::Rows, rows, cols)] {
                let x = random(n * steps, seed ^ 1);
                let at = |output: usize, step: usize| match side {
                    Side::Columns => held[output * cols + step],
                    Side::Rows => held[step * cols + output],
                };
                let mut expected = naive(&x, n, steps, outputs, at);
                let (x, mut out, mut scratch) = (rows_of(isa, &x, n, steps), Rows::default(), Vec::new());
                multiply(isa, &x, &weight, side, &mut out, false, &mut scratch);
                assert_near(&values_of(isa, &out), &expected, steps);
                multiply(isa, &x, &weight, side, &mut out, true, &mut scratch);
                expected.iter_mut().for_each(|value| *value *= 2.0);
                assert_near(&values_of(isa, &out), &expected, 2 * steps);
            }
        }
    }

    #[test]
    fn outer_products_equal_sums_in_f64(n in 0usize..50, left in 1usize..20, right in 1usize..20, seed: u64) {
        let (l, r) = (random(n * left, seed), random(n * right, seed ^ 2));
        for isa in Isa::available() {
            let mut found = vec![0.0; left * right];
            add_outer(isa, &rows_of(isa, &l, n, left), &rows_of(isa, &r, n, right), 0.5, |i, j, value| {
                found[i * right + j] += value;
            });
            let expected: Vec<f64> = (0..left * right)
                .map(|at| {
                    let (i, j) = (at / right, at % right);
                    0.5 * (0..n).map(|row| f64::from(l[row * left + i]) * f64::from(r[row * right + j])).sum::<f64>()
                })
                .collect();
            assert_near(&found, &expected, n);
        }
    }

    #[test]
    fn rows_come_back_as_they_were_loaded(n in 0usize..40, width in 1usize..40, seed: u64) {
        let values = random(n * width, seed);
        for isa in Isa::available() {
            prop_assert_eq!(&values_of(isa, &rows_of(isa, &values, n, width)), &values);
        }
    }
}
