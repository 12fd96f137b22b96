//! Log-probabilities of labels and their gradient, in place of a buffer of logits.
//!
//! Shapes: C rows, V vocabulary.
//!
//! Sums run in [`LANES`] parts whose order is written down, without fused multiply-add: every instruction set and number
//! of threads gives the same bits.

use rayon::prelude::*;

use crate::elementary::{exp, tanh};
use crate::gemm::{run, Kernel};
use crate::isa::Isa;
use crate::{parallel, Error, Result};

/// Parts of a sum and of a maximum.
const LANES: usize = 16;

/// Log-probability of each row's label under `softmax(softcap * tanh(logits / softcap))`, and its gradient with respect
/// to the logits, which takes their place.
///
/// A row with a logit that is not a number becomes all NaN.
///
/// # Arguments
/// * `logits` - `[C, V]`; becomes the gradient.
/// * `targets` - label of each row, C, each below V.
/// * `softcap` - soft cap of the logits, if they have one.
/// * `log_probs` - output, C.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, a label is out of range, or `softcap` is not positive and finite.
///
/// # Example
/// ```
/// let (mut logits, mut log_probs) = ([0.0, 0.0], [0.0]);
/// moeft_core::cross_entropy::log_probs_and_gradient(&mut logits, &[1], None, &mut log_probs)?;
/// assert!((log_probs[0] + 2f32.ln()).abs() < 1e-6);
/// assert!((logits[0] + 0.5).abs() < 1e-6 && (logits[1] - 0.5).abs() < 1e-6);
/// # Ok::<(), moeft_core::Error>(())
/// ```
pub fn log_probs_and_gradient(
    logits: &mut [f32],
    targets: &[i64],
    softcap: Option<f32>,
    log_probs: &mut [f32],
) -> Result<()> {
    let rows = targets.len();
    if log_probs.len() != rows {
        return Err(Error::invalid("log_probs", format!("{} long", log_probs.len()), format!("{rows}, as targets is")));
    }
    if rows == 0 && logits.is_empty() {
        return Ok(());
    }
    if rows == 0 || logits.is_empty() || !logits.len().is_multiple_of(rows) {
        let expected = format!("a multiple of the {rows} targets");
        return Err(Error::invalid("logits", format!("{} long", logits.len()), expected));
    }
    let vocabulary = logits.len() / rows;
    if let Some(target) = targets.iter().find(|&&target| usize::try_from(target).map_or(true, |t| t >= vocabulary)) {
        return Err(Error::invalid("targets", target, format!("classes in 0..{vocabulary}")));
    }
    if let Some(cap) = softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        return Err(Error::invalid("softcap", cap, "a positive number"));
    }
    let isa = Isa::active()?;
    let row = |((logits, &target), log_prob): ((&mut [f32], &i64), &mut f32)| {
        *log_prob = run(isa, Row { logits, target: target as usize, softcap });
    };
    if rows == 1 || parallel::threads() == 1 {
        logits.chunks_exact_mut(vocabulary).zip(targets).zip(log_probs).for_each(row);
    } else {
        parallel::install(|| logits.par_chunks_exact_mut(vocabulary).zip(targets).zip(log_probs).for_each(row));
    }
    Ok(())
}

struct Row<'a> {
    logits: &'a mut [f32],
    target: usize,
    softcap: Option<f32>,
}

impl Kernel for Row<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let Self { logits, target, softcap } = self;
        if let Some(cap) = softcap {
            logits.iter_mut().for_each(|value| *value = cap * tanh(*value / cap));
        }
        let largest = reduce(logits, f32::NEG_INFINITY, |value| value, |a, b| if b > a { b } else { a });
        let total = reduce(logits, 0.0, |value| exp(value - largest), |a, b| a + b);
        let log_prob = logits[target] - largest - total.ln();
        let scale = -1.0 / total;
        let hot = logits[target];
        match softcap {
            Some(cap) => {
                for value in logits.iter_mut() {
                    let share = *value / cap;
                    *value = exp(*value - largest) * scale * (1.0 - share * share);
                }
                logits[target] = (exp(hot - largest) * scale + 1.0) * (1.0 - (hot / cap) * (hot / cap));
            }
            None => {
                logits.iter_mut().for_each(|value| *value = exp(*value - largest) * scale);
                logits[target] = exp(hot - largest) * scale + 1.0;
            }
        }
        log_prob
    }
}

/// Joins `of(value)` of all values in the written order: lane by lane, then pairs of lanes.
#[inline(always)]
fn reduce(values: &[f32], start: f32, of: impl Fn(f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let blocks = values.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = join(lanes[lane], of(block[lane]));
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = join(*lane, of(value));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: usize, vocabulary: usize) -> Vec<f32> {
        let values = (0..(rows * vocabulary) as u32).map(|i| i.wrapping_mul(2_654_435_761) % 2001);
        values.map(|i| (i as f32 - 1000.0) / 64.0).collect()
    }

    /// Log-probabilities and gradient by the formula, in f64.
    fn exact(logits: &[f32], vocabulary: usize, targets: &[i64], softcap: Option<f64>) -> (Vec<f64>, Vec<f64>) {
        let (mut log_probs, mut gradient) = (Vec::new(), Vec::new());
        for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
            let capped = |x: f32| softcap.map_or(f64::from(x), |cap| cap * (f64::from(x) / cap).tanh());
            let total: f64 = row.iter().map(|&x| capped(x).exp()).sum();
            log_probs.push(capped(row[target as usize]) - total.ln());
            gradient.extend(row.iter().enumerate().map(|(i, &x)| {
                let slope = softcap.map_or(1.0, |cap| 1.0 - (capped(x) / cap).powi(2));
                (f64::from(i as i64 == target) - capped(x).exp() / total) * slope
            }));
        }
        (log_probs, gradient)
    }

    #[test]
    fn values_are_those_of_the_formula_and_all_instruction_sets_agree() {
        for vocabulary in [1, 2, 15, 16, 17, 101] {
            for softcap in [None, Some(5.0)] {
                let (x, targets) = (logits(3, vocabulary), [0, (vocabulary / 2) as i64, vocabulary as i64 - 1]);
                let (expected, expected_gradient) = exact(&x, vocabulary, &targets, softcap.map(f64::from));
                let on = |isa: Isa| {
                    let mut gradient = x.clone();
                    let rows = gradient.chunks_exact_mut(vocabulary).zip(targets);
                    let found: Vec<f32> = rows
                        .map(|(logits, target)| run(isa, Row { logits, target: target as usize, softcap }))
                        .collect();
                    (found, gradient)
                };
                let scalar = on(Isa::Scalar);
                for (found, expected) in scalar.0.iter().zip(&expected) {
                    // Roundings of logits up to 16: a unit in their last place is 1e-6.
                    assert!((f64::from(*found) - expected).abs() < 4e-6, "{vocabulary} {found} {expected}");
                }
                for (found, expected) in scalar.1.iter().zip(&expected_gradient) {
                    assert!((f64::from(*found) - expected).abs() < 4e-6, "{vocabulary} {found} {expected}");
                }
                for isa in Isa::available() {
                    assert_eq!(on(isa), scalar, "{}", isa.name());
                }
            }
        }
    }

    #[test]
    fn nan_stays_in_its_row() {
        let mut values = logits(2, 40);
        values[3] = f32::NAN;
        let mut log_probs = [0.0; 2];
        log_probs_and_gradient(&mut values, &[7, 7], Some(30.0), &mut log_probs).expect("lengths fit");
        assert!(log_probs[0].is_nan() && values[..40].iter().all(|value| value.is_nan()));
        assert!(log_probs[1].is_finite() && values[40..].iter().all(|value| value.is_finite()));
    }

    #[test]
    fn arguments_that_do_not_fit_are_named() {
        let message = |len: usize, targets: &[i64], softcap, rows: usize| {
            let (mut logits, mut log_probs) = (vec![0.0; len], vec![0.0; rows]);
            let result = log_probs_and_gradient(&mut logits, targets, softcap, &mut log_probs);
            result.expect_err("must be refused").to_string()
        };
        assert!(message(6, &[0, 3], None, 2).starts_with("targets is 3, expected classes in 0..3"));
        assert!(message(6, &[0, -1], None, 2).starts_with("targets is -1"));
        assert!(message(7, &[0, 0], None, 2).starts_with("logits is 7 long"));
        assert!(message(6, &[0, 0], None, 3).starts_with("log_probs is 3 long, expected 2"));
        assert!(message(6, &[0, 0], Some(0.0), 2).starts_with("softcap is 0"));
        assert!(message(0, &[0], None, 1).starts_with("logits is 0 long"));
        assert!(message(3, &[], None, 0).starts_with("logits is 3 long"));
    }
}
