//! Sums over two tensors, for angles and for the report.

use super::simd::vectorised;

vectorised! {
    /// `[a . a, b . b, a . b]`, summed in float64 in eight lanes, then the lanes in order.
    pub fn products(a: &[f32], b: &[f32]) -> [f64; 3] {
        let mut lanes = [[0.0f64; 8]; 3];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..8 {
                let (a, b) = (f64::from(a[lane]), f64::from(b[lane]));
                lanes[0][lane] += a * a;
                lanes[1][lane] += b * b;
                lanes[2][lane] += a * b;
            }
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

vectorised! {
    /// Largest `|a - b|` and largest `|b|`.
    pub fn extremes(a: &[f32], b: &[f32]) -> [f32; 2] {
        let mut lanes = [[0.0f32; 16]; 2];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
        for (a, b) in a.iter().zip(b) {
            for lane in 0..16 {
                let (delta, weight) = ((a[lane] - b[lane]).abs(), b[lane].abs());
                lanes[0][lane] = if delta > lanes[0][lane] { delta } else { lanes[0][lane] };
                lanes[1][lane] = if weight > lanes[1][lane] { weight } else { lanes[1][lane] };
            }
        }
        let mut largest = lanes.map(|lanes| lanes.into_iter().fold(0.0, f32::max));
        for (&a, &b) in a_rest.iter().zip(b_rest) {
            largest = [largest[0].max((a - b).abs()), largest[1].max(b.abs())];
        }
        largest
    }
}
