//! Steps of AdamW on one thread, in parameters. `MOEFT_ISA` chooses the instructions.
//!
//! `cargo bench -p moeft-core --bench optim`

mod common;

use std::hint::black_box;
use std::num::NonZeroUsize;

use common::{values, CpuTime};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use moeft_core::optim::{adamw_step, Gradients, Hyperparameters, Moments, Parameters, Quantized, BLOCK_SIZE};
use moeft_core::parallel::with_threads;

const RATE: Hyperparameters = Hyperparameters { lr: 1e-5, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
/// 64 MiB of weights: past every cache.
const LARGE: usize = 16 << 20;
/// 8-bit state computes more than it moves.
const SMALL: usize = 1 << 20;

fn steps(criterion: &mut Criterion<CpuTime>) {
    let mut group = criterion.benchmark_group("adamw");
    group.sample_size(10);

    let (mut weights, gradients) = (values(LARGE), values(LARGE));
    let (mut first, mut second) = (vec![0.0; LARGE], vec![0.0; LARGE]);
    group.throughput(Throughput::Elements(LARGE as u64));
    group.bench_function("32-bit state", |b| {
        b.iter(|| {
            let moments = Moments::F32 { exp_avg: &mut first, exp_avg_sq: &mut second };
            let gradients = Gradients::F32(black_box(&gradients));
            adamw_step(Parameters::F32(&mut weights), gradients, moments, RATE, 1).unwrap();
        });
    });

    let (weights, gradients) = (&mut weights[..SMALL], &gradients[..SMALL]);
    let (mut first, mut second) = (vec![0; SMALL], vec![0; SMALL]);
    let (mut first_absmax, mut second_absmax) = (vec![0.0; SMALL / BLOCK_SIZE], vec![0.0; SMALL / BLOCK_SIZE]);
    group.throughput(Throughput::Elements(SMALL as u64));
    group.bench_function("8-bit state", |b| {
        b.iter(|| {
            let moments = Moments::Bits8 {
                exp_avg: Quantized { codes: &mut first, absmax: &mut first_absmax },
                exp_avg_sq: Quantized { codes: &mut second, absmax: &mut second_absmax },
            };
            adamw_step(Parameters::F32(weights), Gradients::F32(black_box(gradients)), moments, RATE, 1).unwrap();
        });
    });
}

fn one_thread(criterion: &mut Criterion<CpuTime>) {
    with_threads(NonZeroUsize::MIN, || steps(criterion));
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = one_thread
}
criterion_main!(benches);
