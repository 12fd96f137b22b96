//! Sums over two tensors, for angles and for the report.

use super::simd::vectorised;

/// Values that are widened at once: they stay in the L1 cache.
const PIECE: usize = 256;

vectorised! {
    /// `[a . a, b . b, a . b]`, summed in float64 in eight lanes, then the lanes in order.
    pub fn products(a: &[f32], b: &[f32]) -> [f64; 3] {
        let mut lanes = [[0.0f64; 8]; 3];
        let mut wide = [[0.0f64; PIECE]; 2];
        let whole = a.len() / 8 * 8;
        for (a, b) in a[..whole].chunks(PIECE).zip(b[..whole].chunks(PIECE)) {
            // Loops of one kind of work each become vector code; one loop that widens and adds up does not.
            let [wide_a, wide_b] = &mut wide;
            wide_a.iter_mut().zip(a).for_each(|(wide, &value)| *wide = f64::from(value));
            wide_b.iter_mut().zip(b).for_each(|(wide, &value)| *wide = f64::from(value));
            let (a, b) = (&wide_a[..a.len()], &wide_b[..b.len()]);
            add_products(a, a, &mut lanes[0]);
            add_products(b, b, &mut lanes[1]);
            add_products(a, b, &mut lanes[2]);
        }
        let mut sums = lanes.map(|lanes| lanes.iter().sum::<f64>());
        for (&a, &b) in a[whole..].iter().zip(&b[whole..]) {
            let (a, b) = (f64::from(a), f64::from(b));
            sums[0] += a * a;
            sums[1] += b * b;
            sums[2] += a * b;
        }
        sums
    }
}

#[inline(always)]
fn add_products(a: &[f64], b: &[f64], lanes: &mut [f64; 8]) {
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
}

vectorised! {
    /// Largest `|a - b|` and largest `|b|`.
    pub fn extremes(a: &[f32], b: &[f32]) -> [f32; 2] {
        let (mut change, mut weight) = ([0.0f32; 16], [0.0f32; 16]);
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..16 {
                change[lane] = larger((a[lane] - b[lane]).abs(), change[lane]);
            }
            for lane in 0..16 {
                weight[lane] = larger(b[lane].abs(), weight[lane]);
            }
        }
        let mut largest = [change, weight].map(|lanes| lanes.into_iter().fold(0.0, f32::max));
        for (&a, &b) in a_rest.iter().zip(b_rest) {
            largest = [largest[0].max((a - b).abs()), largest[1].max(b.abs())];
        }
        largest
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}
