//! Sums over two tensors, for angles and for the report.

use super::simd::vectorised;

/// Values that are taken into all three sums at once: they stay in the L1 cache.
const PIECE: usize = 256;
/// Sums that go on side by side, so that no addition waits for the one before it.
const LANES: usize = 16;

vectorised! {
    /// `[a . a, b . b, a . b]`, summed in float64 in 16 lanes, then the lanes in order.
    pub fn products(a: &[f32], b: &[f32]) -> [f64; 3] {
        let mut lanes = [[0.0f64; LANES]; 3];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a.chunks(PIECE / LANES).zip(b.chunks(PIECE / LANES)) {
            // A loop for each sum becomes vector code; one loop for all three does not.
            add_products(a, a, &mut lanes[0]);
            add_products(b, b, &mut lanes[1]);
            add_products(a, b, &mut lanes[2]);
        }
        let mut sums = lanes.map(|lanes| lanes.iter().sum::<f64>());
        for (&a, &b) in a_rest.iter().zip(b_rest) {
            let (a, b) = (f64::from(a), f64::from(b));
            sums[0] += a * a;
            sums[1] += b * b;
            sums[2] += a * b;
        }
        sums
    }
}

#[inline(always)]
fn add_products(a: &[[f32; LANES]], b: &[[f32; LANES]], lanes: &mut [f64; LANES]) {
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
}

vectorised! {
    /// Largest `|a - b|` of finite values.
    pub fn largest_change(a: &[f32], b: &[f32]) -> f32 {
        // Bits of magnitudes are in the order of the magnitudes.
        f32::from_bits(a.iter().zip(b).fold(0, |largest, (a, b)| largest.max((a - b).abs().to_bits())))
    }
}
