use moeft_core::gemm::*;
use moeft_core::isa::Isa;
use std::time::Instant;
fn main() {
    for isa in Isa::available() {
        for (n, rows, cols) in
            [(64, 512, 512), (64, 512, 256), (256, 1408, 2816), (8, 1408, 2816), (1, 1408, 2816), (24, 512, 512)]
        {
            let w = vec![0.5f32; rows * cols];
            let xv = vec![1.0f32; n * rows.max(cols)];
            for side in [Side::Columns, Side::Rows] {
                let k = if side == Side::Columns { cols } else { rows };
                let mut x = Rows::default();
                x.load(isa, Floats::F32(&xv), (n, k), |i| i, &mut vec![]);
                let mut out = Rows::default();
                let mut s = vec![];
                let mut best = f64::MAX;
                let reps = (2e8 / (2.0 * n as f64 * rows as f64 * cols as f64)).max(3.0) as usize;
                for _ in 0..5 {
                    let t = Instant::now();
                    for _ in 0..reps {
                        multiply(isa, &x, &Matrix::f32(&w, rows, cols), side, &mut out, false, &mut s);
                    }
                    best = best.min(t.elapsed().as_secs_f64() / reps as f64);
                }
                println!(
                    "{isa:?} {n}x{rows}x{cols} {side:?}: {:.1} GFLOP/s, {:.2} Gw/s",
                    2.0 * (n * rows * cols) as f64 / best / 1e9,
                    (rows * cols) as f64 / best / 1e9
                );
            }
        }
    }
}
