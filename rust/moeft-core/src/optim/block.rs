//! The arithmetic of an AdamW step, block by block through the L1 cache, compiled once per instruction set.

use super::adamw::Factors;
use super::buffers::{Gradients, Moments, Parameters, Task};
use super::quantized::Code;
use super::BLOCK_SIZE;
use crate::float::round_bf16;
use crate::isa::Isa;
use half::bf16;

/// Makes a step on this thread.
pub(super) fn run(isa: Isa, task: Task<'_>, factors: &Factors) {
    match isa {
        Isa::Scalar => run_blocks(task, factors),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` says that the CPU has the instructions.
        Isa::Avx2 => unsafe { run_avx2(task, factors) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { run_avx512(task, factors) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 => unreachable!("not available on this architecture"),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn run_avx512(task: Task<'_>, factors: &Factors) {
    run_blocks(task, factors);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2(task: Task<'_>, factors: &Factors) {
    run_blocks(task, factors);
}

/// One block in f32, for what is stored in another type.
struct Scratch {
    weights: [f32; BLOCK_SIZE],
    gradients: [f32; BLOCK_SIZE],
    exp_avg: [f32; BLOCK_SIZE],
    exp_avg_sq: [f32; BLOCK_SIZE],
}

#[inline(always)]
fn run_blocks(mut task: Task<'_>, factors: &Factors) {
    if let Task {
        parameters: Parameters::F32(weights),
        gradients: Gradients::F32(gradients),
        moments: Moments::F32 { exp_avg, exp_avg_sq },
    } = task
    {
        return update(weights, gradients, exp_avg, exp_avg_sq, factors);
    }
    let mut scratch = Scratch {
        weights: [0.0; BLOCK_SIZE],
        gradients: [0.0; BLOCK_SIZE],
        exp_avg: [0.0; BLOCK_SIZE],
        exp_avg_sq: [0.0; BLOCK_SIZE],
    };
    while task.len() > 0 {
        let len = task.len().min(BLOCK_SIZE);
        let (block, rest) = task.split_at(len);
        run_block(block, factors, &mut scratch);
        task = rest;
    }
}

#[inline(always)]
fn run_block(mut block: Task<'_>, factors: &Factors, scratch: &mut Scratch) {
    let len = block.len();
    let Scratch { weights, gradients, exp_avg, exp_avg_sq } = scratch;
    let gradients = match block.gradients {
        Gradients::F32(stored) => stored,
        Gradients::Bf16(stored) => widen(stored, &mut gradients[..len]),
    };
    let (first, second): (&mut [f32], &mut [f32]) = match &mut block.moments {
        Moments::F32 { exp_avg, exp_avg_sq } => (exp_avg, exp_avg_sq),
        Moments::Bits8 { exp_avg: first, exp_avg_sq: second } => {
            Code::signed().decode(first.codes, first.absmax[0], &mut exp_avg[..len]);
            Code::unsigned().decode(second.codes, second.absmax[0], &mut exp_avg_sq[..len]);
            (&mut exp_avg[..len], &mut exp_avg_sq[..len])
        }
    };
    match block.parameters {
        Parameters::F32(stored) => update(stored, gradients, first, second, factors),
        Parameters::Bf16(stored) => {
            widen(stored, &mut weights[..len]);
            update(&mut weights[..len], gradients, first, second, factors);
            round(&weights[..len], stored);
        }
        Parameters::Master { master, rounded } => {
            update(master, gradients, first, second, factors);
            round(master, rounded);
        }
    }
    if let Moments::Bits8 { exp_avg: first, exp_avg_sq: second } = block.moments {
        first.absmax[0] = Code::signed().encode(&exp_avg[..len], first.codes);
        second.absmax[0] = Code::unsigned().encode(&exp_avg_sq[..len], second.codes);
    }
}

#[inline(always)]
fn update(weights: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32], factors: &Factors) {
    let values = weights.iter_mut().zip(gradients).zip(first.iter_mut().zip(second));
    for ((weight, &gradient), (first, second)) in values {
        let mean = *first + factors.one_minus_beta1 * (gradient - *first);
        let square = factors.beta2 * *second + factors.one_minus_beta2 * (gradient * gradient);
        let root = square.sqrt() * factors.root_correction + factors.eps;
        *weight = factors.decay * *weight - factors.step_size * (mean / root);
        *first = mean;
        *second = square;
    }
}

#[inline(always)]
fn widen<'a>(stored: &[bf16], wide: &'a mut [f32]) -> &'a [f32] {
    for (wide, stored) in wide.iter_mut().zip(stored) {
        *wide = f32::from_bits(u32::from(stored.to_bits()) << 16);
    }
    wide
}

#[inline(always)]
fn round(wide: &[f32], stored: &mut [bf16]) {
    for (stored, &wide) in stored.iter_mut().zip(wide) {
        *stored = bf16::from_bits(round_bf16(wide));
    }
}
