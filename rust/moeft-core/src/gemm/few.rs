//! Up to four rows: a weight is read once, a row of it at a time, and never held as more than that row.
//!
//! Generating a token sends one row to each of its experts. Lanes of sixteen rows would then be nearly empty.

use super::matrix::Matrix;
use super::multiply::Side;
use super::rows::Rows;
use super::vector::Vector;
use super::{run, Kernel};
use crate::isa::Isa;

/// Rows up to which this path is faster than lanes: with five, both read as much per weight.
pub(super) const MOST_ROWS: usize = 4;

/// Columns at a time: four rows of them and one of the weight fit the L1 cache.
const CHUNK: usize = 1024;

/// As [`multiply`](super::multiply()), for at most [`MOST_ROWS`] rows; adds to `out`.
pub(super) fn multiply_few(
    isa: Isa,
    x: &Rows,
    weight: &Matrix<'_>,
    side: Side,
    out: &mut Rows,
    scratch: &mut Vec<f32>,
) {
    let count = x.count();
    scratch.resize(CHUNK * (1 + MOST_ROWS), 0.0);
    let (row, chunks) = scratch.split_at_mut(CHUNK);
    for start in (0..weight.cols).step_by(CHUNK) {
        let cols = start..weight.cols.min(start + CHUNK);
        let chunks = &mut chunks[..count * cols.len()];
        match side {
            Side::Columns => {
                for (lane, inputs) in chunks.chunks_exact_mut(cols.len()).enumerate() {
                    for (input, lanes) in inputs.iter_mut().zip(&x.lanes()[cols.clone()]) {
                        *input = lanes.0[lane];
                    }
                }
                for (at, lanes) in out.lanes_mut().iter_mut().enumerate() {
                    let (values, _) = weight.panel(isa, at..at + 1, cols.clone(), row);
                    for (sum, product) in lanes.0.iter_mut().zip(products(isa, values, chunks, count)) {
                        *sum += product;
                    }
                }
            }
            Side::Rows => {
                chunks.fill(0.0);
                for (at, lanes) in x.lanes().iter().enumerate() {
                    let (values, _) = weight.panel(isa, at..at + 1, cols.clone(), row);
                    for (sums, &factor) in chunks.chunks_exact_mut(cols.len()).zip(&lanes.0) {
                        run(isa, AddScaled(factor, values, sums));
                    }
                }
                for (lane, sums) in chunks.chunks_exact(cols.len()).enumerate() {
                    for (lanes, sum) in out.lanes_mut()[cols.clone()].iter_mut().zip(sums) {
                        lanes.0[lane] += sum;
                    }
                }
            }
        }
    }
}

/// Products of `weights` with each of `count` rows of `inputs`; zero beyond them.
fn products(isa: Isa, weights: &[f32], inputs: &[f32], count: usize) -> [f32; MOST_ROWS] {
    super::dispatch!(isa, dots(weights, inputs, count))
}

/// `sums += factor * values`.
struct AddScaled<'a>(f32, &'a [f32], &'a mut [f32]);

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sum, value) in self.2.iter_mut().zip(self.1) {
            *sum += self.0 * value;
        }
    }
}

/// Products of `weights` with each of `count` rows of `inputs`.
#[inline(always)]
pub(super) fn dots<V: Vector>(weights: &[f32], inputs: &[f32], count: usize) -> [f32; MOST_ROWS] {
    match count {
        1 => dots_of::<V, 1, 4>(weights, inputs),
        2 => dots_of::<V, 2, 4>(weights, inputs),
        3 => dots_of::<V, 3, 2>(weights, inputs),
        4 => dots_of::<V, 4, 2>(weights, inputs),
        _ => unreachable!("one to MOST_ROWS rows"),
    }
}

/// `CHAINS` sums per row do not wait for each other: an addition takes four cycles.
#[inline(always)]
fn dots_of<V: Vector, const N: usize, const CHAINS: usize>(weights: &[f32], inputs: &[f32]) -> [f32; MOST_ROWS] {
    let len = weights.len();
    assert_eq!(inputs.len(), N * len);
    let mut sums = [[V::splat(0.0); CHAINS]; N];
    let stride = CHAINS * V::LEN;
    let whole = len - len % stride;
    for start in (0..whole).step_by(stride) {
        for chain in 0..CHAINS {
            let at = start + chain * V::LEN;
            // SAFETY: `at + LEN` is at most `len`, and `inputs` holds `N` rows of that length.
            unsafe {
                let weight = V::load(weights.as_ptr().add(at));
                for (row, sums) in sums.iter_mut().enumerate() {
                    sums[chain] = weight.mul_add(V::load(inputs.as_ptr().add(row * len + at)), sums[chain]);
                }
            }
        }
    }
    let mut products = [0.0; MOST_ROWS];
    for (row, (product, sums)) in products.iter_mut().zip(&sums).enumerate() {
        let tail = weights[whole..].iter().zip(&inputs[row * len + whole..]);
        *product = tail.map(|(w, x)| w * x).sum::<f32>() + sums.iter().map(|sum| sum.sum()).sum::<f32>();
    }
    products
}
