//! One layer of NF4 experts with LoRA on one thread, in tokens. `MOEFT_ISA` chooses the instructions.
//!
//! `cargo bench -p moeft-core --bench experts`

mod common;

use std::hint::black_box;
use std::num::NonZeroUsize;

use common::{values, CpuTime};
use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use moeft_core::experts::{backward, forward, Block, Gate, Gradients, Lora, Routing};
use moeft_core::gemm::{Floats, FloatsMut, Stack, Values};
use moeft_core::nf4::{self, Codebook, Layout, Scales};
use moeft_core::parallel::with_threads;
use moeft_core::routing::bucket;

const EXPERTS: usize = 64;
const TOP_K: usize = 8;
const TOKENS: usize = 256;
const HIDDEN: usize = 512;
const INNER: usize = 256;
const RANK: usize = 8;

/// A packed stack.
struct Packed {
    rows: usize,
    cols: usize,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

impl Packed {
    fn new(rows: usize, cols: usize) -> Self {
        let layout = Layout { groups: EXPERTS, group_len: rows * cols, block_size: 64 };
        let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
        nf4::quantize(&values(layout.values_len()), Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
        Self { rows, cols, packed, absmax }
    }

    fn stack(&self) -> Stack<'_> {
        let (scales, codebook) = (Scales::Plain(&self.absmax), Codebook::Nf4);
        let values = Values::Nf4 { packed: &self.packed, scales, block_size: 64, codebook };
        Stack { values, num_experts: EXPERTS, rows: self.rows, cols: self.cols, transposed: false, bias: None }
    }
}

fn layer(criterion: &mut Criterion<CpuTime>) {
    let (gate_up, down) = (Packed::new(2 * INNER, HIDDEN), Packed::new(HIDDEN, INNER));
    let factors = |outputs: usize, inputs: usize| (values(EXPERTS * RANK * inputs), values(outputs * RANK * EXPERTS));
    let (up_factors, down_factors) = (factors(2 * INNER, HIDDEN), factors(HIDDEN, INNER));
    let lora = |(a, b)| Some(Lora { a, b, rank: RANK, scaling: 2.0 });
    let block = Block {
        gate_up: gate_up.stack(),
        down: down.stack(),
        gate: Gate::Silu,
        interleaved: false,
        gate_up_lora: lora((&up_factors.0, &up_factors.1)),
        down_lora: lora((&down_factors.0, &down_factors.1)),
    };

    let rows = TOKENS * TOP_K;
    let index: Vec<i64> = (0..rows).map(|row| ((row / TOP_K * 37 + row % TOP_K * 11) % EXPERTS) as i64).collect();
    let (mut permutation, mut inverse, mut offsets) = (vec![0; rows], vec![0; rows], vec![0; EXPERTS + 1]);
    bucket(&index, EXPERTS, &mut permutation, &mut inverse, &mut offsets).unwrap();
    let routing_weights = vec![1.0 / TOP_K as f32; rows];
    let routing = Routing { permutation: &permutation, offsets: &offsets, weights: &routing_weights, top_k: TOP_K };

    let (x, grad) = (values(TOKENS * HIDDEN), values(TOKENS * HIDDEN));
    let (mut h, mut out) = (vec![0.0; rows * 2 * INNER], vec![0.0; x.len()]);
    let (mut grad_x, mut grad_weights) = (vec![0.0; x.len()], vec![0.0; rows]);
    let (mut grad_up, mut grad_down) = (up_factors.clone(), down_factors.clone());

    let mut group = criterion.benchmark_group("experts");
    group.sample_size(10).throughput(Throughput::Elements(TOKENS as u64));
    group.bench_function("forward", |b| {
        b.iter(|| {
            let h = Some(FloatsMut::F32(&mut h));
            forward(&block, &routing, Floats::F32(black_box(&x)), h, FloatsMut::F32(&mut out)).unwrap();
        });
    });
    group.bench_function("backward", |b| {
        b.iter(|| {
            let gradients = Gradients {
                x: Some(FloatsMut::F32(&mut grad_x)),
                weights: &mut grad_weights,
                gate_up_lora: Some((&mut grad_up.0, &mut grad_up.1)),
                down_lora: Some((&mut grad_down.0, &mut grad_down.1)),
            };
            let (x, h, grad) = (Floats::F32(black_box(&x)), Floats::F32(&h), Floats::F32(&grad));
            backward(&block, &routing, x, h, grad, gradients).unwrap();
        });
    });
}

fn one_thread(criterion: &mut Criterion<CpuTime>) {
    with_threads(NonZeroUsize::MIN, || layer(criterion));
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = one_thread
}
criterion_main!(benches);
