use moeft_core::gemm::*;
use moeft_core::isa::Isa;
use moeft_core::nf4::{self, Layout, Scales};
fn cpu() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
fn main() {
    for isa in Isa::available() {
        for (n, rows, cols) in [
            (64, 512, 512),
            (256, 1408, 2816),
            (8, 1408, 2816),
            (6, 1408, 2816),
            (5, 1408, 2816),
            (4, 1408, 2816),
            (3, 1408, 2816),
            (1, 1408, 2816),
        ] {
            let w: Vec<f32> = (0..rows * cols).map(|i| ((i * 37) % 101) as f32 / 100.0 - 0.5).collect();
            let xv = vec![1.0f32; n * rows.max(cols)];
            let layout = Layout { groups: 1, group_len: rows * cols, block_size: 64 };
            let (mut p, mut a) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
            nf4::quantize(&w, layout, &mut p, &mut a).unwrap();
            for (kind, m) in [
                ("f32", Matrix::f32(&w, rows, cols)),
                (
                    "nf4",
                    Matrix {
                        values: Values::Nf4 { packed: &p, scales: Scales::Plain(&a), block_size: 64 },
                        rows,
                        cols,
                    },
                ),
            ] {
                for side in [Side::Columns, Side::Rows] {
                    let k = if side == Side::Columns { cols } else { rows };
                    let mut x = Rows::default();
                    x.load(isa, Floats::F32(&xv), (n, k), |i| i, &mut vec![]);
                    let mut out = Rows::default();
                    let mut s = vec![];
                    let mut best = f64::MAX;
                    let reps = (2e7 / (2.0 * n as f64 * rows as f64 * cols as f64)).max(1.0) as usize;
                    for _ in 0..9 {
                        let t = cpu();
                        for _ in 0..reps {
                            multiply(isa, &x, &m, side, &mut out, false, &mut s);
                        }
                        best = best.min((cpu() - t) / reps as f64);
                    }
                    println!(
                        "{isa:?} {kind} {n}x{rows}x{cols} {side:?}: {:.1} GFLOP/s, {:.2} Gw/s",
                        2.0 * (n * rows * cols) as f64 / best / 1e9,
                        (rows * cols) as f64 / best / 1e9
                    );
                }
            }
        }
    }
}
