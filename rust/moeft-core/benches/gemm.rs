//! Rows times a weight on one thread, in multiplications and additions. `MOEFT_ISA` chooses the instructions.
//!
//! `cargo bench -p moeft-core --bench gemm`

mod common;

use std::hint::black_box;

use common::{values, CpuTime};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use moeft_core::gemm::{multiply, Floats, Matrix, Rows, Side, Values};
use moeft_core::isa::Isa;
use moeft_core::nf4::{self, Codebook, Layout, Scales};

/// Outputs and inputs of one gate_up matrix of Gemma-4 26B-A4B.
const SHAPE: (usize, usize) = (1408, 2816);

fn products(criterion: &mut Criterion<CpuTime>) {
    let isa = Isa::active().unwrap();
    let (rows, cols) = SHAPE;
    let dense = values(rows * cols);
    let layout = Layout { groups: 1, group_len: dense.len(), block_size: 64 };
    let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
    nf4::quantize(&dense, Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
    let (scales, codebook) = (Scales::Plain(&absmax), Codebook::Nf4);
    let weights = [
        ("NF4", Values::Nf4 { packed: &packed, scales, block_size: 64, codebook }),
        ("f32", Values::Dense(Floats::F32(&dense))),
    ];

    let mut group = criterion.benchmark_group("gemm");
    group.sample_size(10);
    for count in [1, 8, 32, 256] {
        let x = values(count * cols);
        let (mut loaded, mut out, mut scratch) = (Rows::default(), Rows::default(), Vec::new());
        loaded.load(isa, Floats::F32(&x), (count, cols), |i| i, &mut scratch);
        group.throughput(Throughput::Elements(2 * (count * rows * cols) as u64));
        for (name, values) in weights {
            let weight = Matrix { values, rows, cols };
            group.bench_function(BenchmarkId::new(format!("rows by {name}"), count), |b| {
                b.iter(|| multiply(isa, black_box(&loaded), &weight, Side::Columns, &mut out, false, &mut scratch));
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = products
}
criterion_main!(benches);
