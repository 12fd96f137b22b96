//! GGUF blocks on one thread, in values per second. `MOEFT_ISA` chooses the instructions.
//!
//! `cargo bench -p moeft-core --bench gguf`

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use moeft_core::gguf::{quants, GgmlType};

const ROW_LEN: usize = 2816;
const ROWS: usize = 256;

fn kernels(criterion: &mut Criterion) {
    let values: Vec<f32> = (0..(ROW_LEN * ROWS) as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 2f32.powi(29) - 0.016)
        .collect();
    let mut group = criterion.benchmark_group("gguf");
    group.sample_size(10);
    group.throughput(Throughput::Elements(values.len() as u64));
    for kind in GgmlType::ALL {
        let mut blocks = vec![0; kind.bytes(values.len() as u64).unwrap() as usize];
        group.bench_function(format!("quantise {kind}"), |b| {
            b.iter(|| quants::quantize(kind, black_box(&values), ROW_LEN, None, &mut blocks).unwrap())
        });
        let mut back = vec![0.0; values.len()];
        group.bench_function(format!("dequantise {kind}"), |b| {
            b.iter(|| quants::dequantize(kind, black_box(&blocks), &mut back).unwrap())
        });
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
