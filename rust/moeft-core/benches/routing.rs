//! Counting sort of routing decisions, 8 of 128 experts, one thread, beside sorts of the standard library.
//!
//! `cargo bench -p moeft-core --bench routing`

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use moeft_core::routing::{bucket, LoadStatistics};

const EXPERTS: usize = 128;
const TOP_K: usize = 8;

/// Experts as a router without preferences chooses them.
fn top_k_index(tokens: usize) -> Vec<i64> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 57) as i64
    };
    (0..tokens * TOP_K).map(|_| next()).collect()
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("routing");
    group.sample_size(20);
    for tokens in [512, 4096, 65536] {
        let index = top_k_index(tokens);
        let rows = index.len();
        let (mut permutation, mut inverse, mut offsets) = (vec![0; rows], vec![0; rows], vec![0; EXPERTS + 1]);
        bucket(&index, EXPERTS, &mut permutation, &mut inverse, &mut offsets).unwrap();
        let mut sorted: Vec<i64> = (0..rows as i64).collect();
        sorted.sort_by_key(|&row| index[row as usize]);
        assert_eq!(sorted, permutation);
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::new("bucket", tokens), |bench| {
            bench.iter(|| bucket(black_box(&index), EXPERTS, &mut permutation, &mut inverse, &mut offsets));
        });
        group.bench_function(BenchmarkId::new("bucket and load statistics", tokens), |bench| {
            bench.iter(|| {
                bucket(black_box(&index), EXPERTS, &mut permutation, &mut inverse, &mut offsets).unwrap();
                LoadStatistics::from_offsets(&offsets)
            });
        });
        group.bench_function(BenchmarkId::new("stable sort, permutation alone", tokens), |bench| {
            bench.iter(|| {
                let mut sorted: Vec<i64> = (0..rows as i64).collect();
                sorted.sort_by_key(|&row| index[row as usize]);
                sorted
            });
        });
    }
}

criterion_group!(routing, benches);
criterion_main!(routing);
