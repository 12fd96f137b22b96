//! Root-mean-square normalisation of rows, and its gradient, each in one pass over memory.
//!
//! Source: Root Mean Square Layer Normalization, <https://arxiv.org/abs/1910.07467>.
//!
//! Sums run in [`LANES`] parts whose order is written down, without fused multiply-add: every instruction set and number
//! of threads gives the same bits.

use rayon::prelude::*;

use crate::isa::Isa;
use crate::{parallel, Error, Result};

/// Parts of a sum: two vectors of AVX2, one of AVX-512.
const LANES: usize = 16;

/// Values of one task of the pool; fewer are computed on the calling thread.
const TASK_LEN: usize = 1 << 16;

/// Normalises rows: `out = x * rstd * weight` with `rstd = 1 / sqrt(mean(x^2) + eps)`.
///
/// # Arguments
/// * `x`, `out` - `[N, H]`.
/// * `weight` - `[H]`, or none for ones.
/// * `rstd` - output `[N]`, which [`backward`] needs.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, `hidden` is zero, or `eps` is negative or not finite.
///
/// # Example
/// ```
/// let (mut out, mut rstd) = ([0.0; 2], [0.0]);
/// moeft_core::rms_norm::forward(&[3.0, 4.0], None, 2, 0.0, &mut out, &mut rstd)?;
/// assert_eq!(rstd, [1.0 / 12.5f32.sqrt()]);
/// # Ok::<(), moeft_core::Error>(())
/// ```
pub fn forward(
    x: &[f32],
    weight: Option<&[f32]>,
    hidden: usize,
    eps: f32,
    out: &mut [f32],
    rstd: &mut [f32],
) -> Result<()> {
    check(hidden, x.len(), &[("out", out.len())], weight, rstd.len())?;
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::invalid("eps", eps, "a finite number, not negative"));
    }
    let isa = Isa::active()?;
    let rows = rows_per_task(hidden);
    let tasks = || {
        let pieces = x.par_chunks(rows * hidden).zip(out.par_chunks_mut(rows * hidden)).zip(rstd.par_chunks_mut(rows));
        pieces.for_each(|((x, out), rstd)| run(isa, Task::Forward { x, weight, hidden, eps, out, rstd }));
    };
    if x.len() <= TASK_LEN || parallel::threads() == 1 {
        run(isa, Task::Forward { x, weight, hidden, eps, out, rstd });
    } else {
        parallel::install(tasks);
    }
    Ok(())
}

/// Gradient of the rows: `grad_x = rstd * g - x * rstd^3 * mean(g * x)` with `g = grad * weight`.
///
/// # Arguments
/// * `x`, `weight`, `hidden` - as given to [`forward`].
/// * `rstd` - what [`forward`] wrote.
/// * `grad` - gradient of its output.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, or `hidden` is zero.
pub fn backward(
    x: &[f32],
    weight: Option<&[f32]>,
    hidden: usize,
    rstd: &[f32],
    grad: &[f32],
    grad_x: &mut [f32],
) -> Result<()> {
    check(hidden, x.len(), &[("grad", grad.len()), ("grad_x", grad_x.len())], weight, rstd.len())?;
    let isa = Isa::active()?;
    let rows = rows_per_task(hidden);
    let tasks = || {
        let inputs = x.par_chunks(rows * hidden).zip(grad.par_chunks(rows * hidden)).zip(rstd.par_chunks(rows));
        inputs
            .zip(grad_x.par_chunks_mut(rows * hidden))
            .for_each(|(((x, grad), rstd), grad_x)| run(isa, Task::Backward { x, weight, hidden, rstd, grad, grad_x }));
    };
    if x.len() <= TASK_LEN || parallel::threads() == 1 {
        run(isa, Task::Backward { x, weight, hidden, rstd, grad, grad_x });
    } else {
        parallel::install(tasks);
    }
    Ok(())
}

fn rows_per_task(hidden: usize) -> usize {
    (TASK_LEN / hidden).max(1)
}

fn check(
    hidden: usize,
    values: usize,
    like_x: &[(&'static str, usize)],
    weight: Option<&[f32]>,
    statistics: usize,
) -> Result<()> {
    if hidden == 0 || !values.is_multiple_of(hidden) {
        return Err(Error::invalid("hidden", hidden, format!("a divisor of the {values} values of x")));
    }
    for &(name, len) in like_x {
        if len != values {
            return Err(Error::invalid(name, format!("{len} long"), format!("{values}, as x is")));
        }
    }
    if let Some(weight) = weight.filter(|weight| weight.len() != hidden) {
        return Err(Error::invalid("weight", format!("{} long", weight.len()), hidden));
    }
    if statistics != values / hidden {
        return Err(Error::invalid(
            "rstd",
            format!("{statistics} long"),
            format!("{}, the rows of x", values / hidden),
        ));
    }
    Ok(())
}

/// Some rows, on one thread.
enum Task<'a> {
    Forward {
        x: &'a [f32],
        weight: Option<&'a [f32]>,
        hidden: usize,
        eps: f32,
        out: &'a mut [f32],
        rstd: &'a mut [f32],
    },
    Backward {
        x: &'a [f32],
        weight: Option<&'a [f32]>,
        hidden: usize,
        rstd: &'a [f32],
        grad: &'a [f32],
        grad_x: &'a mut [f32],
    },
}

fn run(isa: Isa, task: Task<'_>) {
    match isa {
        Isa::Scalar => task.run(),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` says that the CPU has the instructions.
        Isa::Avx2 => unsafe { run_avx2(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { run_avx512(task) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("not available on this architecture"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn run_avx512(task: Task<'_>) {
    task.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2(task: Task<'_>) {
    task.run();
}

impl Task<'_> {
    #[inline(always)]
    fn run(self) {
        match self {
            Self::Forward { x, weight, hidden, eps, out, rstd } => {
                for ((x, out), rstd) in x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)).zip(rstd) {
                    *rstd = 1.0 / (dot(x, x, None) / hidden as f32 + eps).sqrt();
                    match weight {
                        Some(weight) => {
                            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                                *out = x * *rstd * weight;
                            }
                        }
                        None => out.iter_mut().zip(x).for_each(|(out, x)| *out = x * *rstd),
                    }
                }
            }
            Self::Backward { x, weight, hidden, rstd, grad, grad_x } => {
                let rows = x.chunks_exact(hidden).zip(grad.chunks_exact(hidden)).zip(rstd);
                for (((x, grad), &rstd), grad_x) in rows.zip(grad_x.chunks_exact_mut(hidden)) {
                    let along = dot(grad, x, weight) / hidden as f32 * rstd * rstd * rstd;
                    match weight {
                        Some(weight) => {
                            for (((out, x), grad), weight) in grad_x.iter_mut().zip(x).zip(grad).zip(weight) {
                                *out = grad * weight * rstd - x * along;
                            }
                        }
                        None => {
                            for ((out, x), grad) in grad_x.iter_mut().zip(x).zip(grad) {
                                *out = grad * rstd - x * along;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Sum of `a * b`, or of `a * weight * b`, in the written order: lane by lane, then pairs of lanes.
#[inline(always)]
fn dot(a: &[f32], b: &[f32], weight: Option<&[f32]>) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = a.len() - a.len() % LANES;
    match weight {
        Some(weight) => {
            let blocks = a.chunks_exact(LANES).zip(b.chunks_exact(LANES)).zip(weight.chunks_exact(LANES));
            for ((a, b), weight) in blocks {
                for lane in 0..LANES {
                    lanes[lane] += a[lane] * weight[lane] * b[lane];
                }
            }
            for i in whole..a.len() {
                lanes[i - whole] += a[i] * weight[i] * b[i];
            }
        }
        None => {
            for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
                for lane in 0..LANES {
                    lanes[lane] += a[lane] * b[lane];
                }
            }
            for i in whole..a.len() {
                lanes[i - whole] += a[i] * b[i];
            }
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2001)
            .map(|i| (i as f32 - 1000.0) / 512.0)
            .collect()
    }

    /// Output, statistics and gradient of some rows.
    fn on(isa: Isa, hidden: usize, weight: Option<&[f32]>) -> [Vec<f32>; 3] {
        let (x, grad) = (values(5 * hidden, 1), values(5 * hidden, 2));
        let (mut out, mut rstd, mut grad_x) = (vec![f32::NAN; x.len()], vec![f32::NAN; 5], vec![f32::NAN; x.len()]);
        run(isa, Task::Forward { x: &x, weight, hidden, eps: 1e-6, out: &mut out, rstd: &mut rstd });
        run(isa, Task::Backward { x: &x, weight, hidden, rstd: &rstd, grad: &grad, grad_x: &mut grad_x });
        [out, rstd, grad_x]
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits() {
        for hidden in [1, 15, 16, 37, 256] {
            let weight = values(hidden, 3);
            for weight in [None, Some(&weight[..])] {
                let expected = on(Isa::Scalar, hidden, weight);
                assert!(expected.iter().flatten().all(|value| value.is_finite()));
                for isa in Isa::available() {
                    assert_eq!(on(isa, hidden, weight), expected, "{} {hidden}", isa.name());
                }
            }
        }
    }

    #[test]
    fn gradient_is_that_of_differences_in_f64() {
        let hidden = 21;
        let (weight, x, grad) = (values(hidden, 3), values(hidden, 1), values(hidden, 2));
        let loss = |x: &[f64]| -> f64 {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / hidden as f64;
            let rstd = 1.0 / (mean + 1e-6).sqrt();
            x.iter().zip(&weight).zip(&grad).map(|((x, w), g)| x * rstd * f64::from(*w) * f64::from(*g)).sum()
        };
        let (mut out, mut rstd, mut grad_x) = (vec![0.0; hidden], [0.0], vec![0.0; hidden]);
        forward(&x, Some(&weight), hidden, 1e-6, &mut out, &mut rstd).expect("lengths fit");
        backward(&x, Some(&weight), hidden, &rstd, &grad, &mut grad_x).expect("lengths fit");
        for i in 0..hidden {
            let moved = |by: f64| {
                let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                x[i] += by;
                loss(&x)
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            // A few roundings of values near one.
            assert!((f64::from(grad_x[i]) - expected).abs() < 2e-6, "{i}: {} {expected}", grad_x[i]);
        }
    }

    #[test]
    fn the_pool_gives_the_bits_of_one_thread() {
        let hidden = 64;
        let x = values(3 * TASK_LEN + 5 * hidden, 1);
        let grad = values(x.len(), 2);
        let rows = x.len() / hidden;
        let (mut out, mut rstd, mut grad_x) = (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; x.len()]);
        forward(&x, None, hidden, 1e-6, &mut out, &mut rstd).expect("lengths fit");
        backward(&x, None, hidden, &rstd, &grad, &mut grad_x).expect("lengths fit");
        let (mut out1, mut rstd1, mut grad_x1) = (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; x.len()]);
        run(Isa::Scalar, Task::Forward { x: &x, weight: None, hidden, eps: 1e-6, out: &mut out1, rstd: &mut rstd1 });
        run(
            Isa::Scalar,
            Task::Backward { x: &x, weight: None, hidden, rstd: &rstd, grad: &grad, grad_x: &mut grad_x1 },
        );
        assert_eq!((out, rstd, grad_x), (out1, rstd1, grad_x1));
    }

    #[test]
    fn arguments_that_do_not_fit_are_named() {
        let message = |hidden, weight: Option<&[f32]>, eps, rows: usize| {
            let (mut out, mut rstd) = ([0.0; 6], vec![0.0; rows]);
            forward(&[1.0; 6], weight, hidden, eps, &mut out, &mut rstd).expect_err("must be refused").to_string()
        };
        assert!(message(0, None, 0.0, 2).starts_with("hidden is 0"));
        assert!(message(4, None, 0.0, 2).starts_with("hidden is 4"));
        assert!(message(3, Some(&[1.0; 2]), 0.0, 2).starts_with("weight is 2 long, expected 3"));
        assert!(message(3, None, f32::NAN, 2).starts_with("eps is NaN"));
        assert!(message(3, None, 0.0, 3).starts_with("rstd is 3 long, expected 2"));
    }
}
