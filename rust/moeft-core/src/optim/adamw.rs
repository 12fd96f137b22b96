//! AdamW: Adam with bias correction and decoupled weight decay.
//!
//! Source: Decoupled Weight Decay Regularization, <https://arxiv.org/abs/1711.05101>.

use super::block;
use super::buffers::{Gradients, Moments, Parameters, Task};
use crate::isa::Isa;
use crate::{parallel, Error, Result};

/// Weights of one task of the pool: a multiple of the block size, 1 MiB of f32 weights, gradients and moments.
const TASK_LEN: usize = 1 << 16;

/// Fewer weights than this are updated without the pool.
const PARALLEL_LEN: usize = 2 * TASK_LEN;

/// What rules a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// Learning rate, finite, not negative.
    pub lr: f64,
    /// Decay of the mean of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the mean of squares, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the mean of squares after its bias correction; finite, not negative.
    pub eps: f64,
    /// Weights lose this part of themselves times `lr`; finite, not negative.
    pub weight_decay: f64,
}

/// What the arithmetic needs: computed in f64, rounded once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors {
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    pub root_correction: f32,
    pub eps: f32,
    /// `lr / (1 - beta1^step)`.
    pub step_size: f32,
    /// `1 - lr * weight_decay`.
    pub decay: f32,
}

impl Hyperparameters {
    fn check(&self) -> Result<()> {
        for (name, value) in [("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::invalid(name, value, "a finite number, not negative"));
            }
        }
        for (name, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::invalid(name, value, "a number from 0 to below 1"));
            }
        }
        Ok(())
    }

    fn factors(&self, step: u64) -> Factors {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Factors {
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            root_correction: (1.0 / correction(self.beta2).sqrt()) as f32,
            eps: self.eps as f32,
            step_size: (self.lr / correction(self.beta1)) as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
        }
    }
}

/// Updates weights and moments by one step, in parallel, each weight by itself:
///
/// ```text
/// m = m + (1 - beta1) (g - m)
/// v = beta2 v + (1 - beta2) g^2
/// w = (1 - lr weight_decay) w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
/// ```
///
/// Every operation is rounded to f32 on its own, without fused multiply-add: all CPUs give the same bits. 8-bit
/// moments are restored, used in f32 and quantised again. A gradient that is not finite spoils its weight, as in torch:
/// look before the step.
///
/// # Arguments
/// * `step` - number of this step, from 1.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, or a hyperparameter or `step` is out of its range; nothing is
/// changed then.
pub fn adamw_step(
    parameters: Parameters<'_>,
    gradients: Gradients<'_>,
    moments: Moments<'_>,
    hyperparameters: Hyperparameters,
    step: u64,
) -> Result<()> {
    hyperparameters.check()?;
    if step == 0 {
        return Err(Error::invalid("step", step, "at least 1: count the step before it is made"));
    }
    let task = Task { parameters, gradients, moments };
    task.check()?;
    let (isa, factors) = (Isa::active()?, hyperparameters.factors(step));
    if task.len() < PARALLEL_LEN || parallel::threads() == 1 {
        block::run(isa, task, &factors);
    } else {
        parallel::install(|| run_parallel(isa, task, &factors));
    }
    Ok(())
}

fn run_parallel(isa: Isa, task: Task<'_>, factors: &Factors) {
    if task.len() <= TASK_LEN {
        return block::run(isa, task, factors);
    }
    let middle = (task.len() / 2).next_multiple_of(TASK_LEN);
    let (left, right) = task.split_at(middle);
    rayon::join(|| run_parallel(isa, left, factors), || run_parallel(isa, right, factors));
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::{Code, Quantized, BLOCK_SIZE};
    use super::*;

    const RATE: Hyperparameters = Hyperparameters { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

    fn values(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2001)
            .map(|i| (i as f32 - 1000.0) / 512.0)
            .collect()
    }

    /// All that a step with a master copy and 8-bit moments writes.
    #[derive(Debug, PartialEq)]
    struct Written {
        master: Vec<f32>,
        rounded: Vec<bf16>,
        codes: [Vec<u8>; 2],
        absmax: [Vec<f32>; 2],
    }

    /// Some steps on that instruction set.
    fn bits8_steps(isa: Isa, len: usize) -> Written {
        let blocks = len.div_ceil(BLOCK_SIZE);
        let (mut master, mut rounded) = (values(len, 1), vec![bf16::ZERO; len]);
        let (mut codes, mut absmax) = ([vec![0; len], vec![0; len]], [vec![0.0; blocks], vec![0.0; blocks]]);
        for step in 1..4 {
            let gradients: Vec<_> = values(len, 7 + step as u32).into_iter().map(bf16::from_f32).collect();
            let ([first, second], [first_absmax, second_absmax]) = (&mut codes, &mut absmax);
            let moments = Moments::Bits8 {
                exp_avg: Quantized { codes: first, absmax: first_absmax },
                exp_avg_sq: Quantized { codes: second, absmax: second_absmax },
            };
            let parameters = Parameters::Master { master: &mut master, rounded: &mut rounded };
            let task = Task { parameters, gradients: Gradients::Bf16(&gradients), moments };
            task.check().expect("lengths fit");
            block::run(isa, task, &RATE.factors(step));
        }
        Written { master, rounded, codes, absmax }
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits() {
        for len in [1, 255, 256, 777] {
            let expected = bits8_steps(Isa::Scalar, len);
            assert!(expected.master.iter().all(|weight| weight.is_finite()));
            for isa in Isa::available() {
                assert_eq!(bits8_steps(isa, len), expected, "{} {len}", isa.name());
            }
        }
    }

    #[test]
    fn parallel_halves_give_the_bits_of_one_run() {
        let len = PARALLEL_LEN + 3 * BLOCK_SIZE + 5;
        let gradients = values(len, 3);
        let step = |parallel: bool| {
            let (mut weights, mut first, mut second) = (values(len, 1), vec![0.0; len], vec![0.0; len]);
            let moments = Moments::F32 { exp_avg: &mut first, exp_avg_sq: &mut second };
            let (parameters, gradients) = (Parameters::F32(&mut weights), Gradients::F32(&gradients));
            if parallel {
                adamw_step(parameters, gradients, moments, RATE, 1).expect("arguments fit");
            } else {
                block::run(Isa::Scalar, Task { parameters, gradients, moments }, &RATE.factors(1));
            }
            (weights, first, second)
        };
        assert_eq!(step(true), step(false));
    }

    #[test]
    fn arguments_that_do_not_fit_are_named() {
        let message = |rate: Hyperparameters, step, gradients: &[f32]| {
            let (mut weights, mut first, mut second) = ([1.0f32; 3], [0.0; 3], [0.0; 3]);
            let moments = Moments::F32 { exp_avg: &mut first, exp_avg_sq: &mut second };
            let error = adamw_step(Parameters::F32(&mut weights), Gradients::F32(gradients), moments, rate, step);
            assert_eq!(weights, [1.0; 3]);
            error.expect_err("must be refused").to_string()
        };
        let fits = [0.0; 3];
        assert!(message(Hyperparameters { lr: f64::NAN, ..RATE }, 1, &fits).starts_with("lr is NaN"));
        assert!(message(Hyperparameters { eps: -1.0, ..RATE }, 1, &fits).starts_with("eps is -1"));
        assert!(message(Hyperparameters { beta2: 1.0, ..RATE }, 1, &fits).starts_with("beta2 is 1"));
        assert!(message(RATE, 0, &fits).starts_with("step is 0"));
        assert!(message(RATE, 1, &[0.0; 2]).starts_with("grad is 2 long, expected 3"));
    }

    proptest! {
        #[test]
        fn quantising_keeps_zeros_and_signs(values in prop::collection::vec(-1e3f32..1e3, 1..600), zero in 0usize..600) {
            let mut values = values;
            let zero = zero % values.len();
            values[zero] = 0.0;
            let blocks = values.len().div_ceil(BLOCK_SIZE);
            let (mut codes, mut absmax, mut back) = (vec![0; values.len()], vec![0.0; blocks], vec![f32::NAN; values.len()]);
            Code::signed().quantize(&values, &mut codes, &mut absmax)?;
            Code::signed().dequantize(&codes, &absmax, &mut back)?;
            prop_assert_eq!(back[zero], 0.0);
            for (i, (value, back)) in values.iter().zip(&back).enumerate() {
                // The widest gap between two codes is 0.0141 of the scale.
                prop_assert!((value - back).abs() <= 0.0071 * absmax[i / BLOCK_SIZE], "{} {}", value, back);
            }
        }
    }
}
