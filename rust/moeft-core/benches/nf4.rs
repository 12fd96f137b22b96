//! 4-bit kernels on one thread, beside what the memory allows. `MOEFT_ISA` chooses the instructions.
//!
//! `cargo bench -p moeft-core --bench nf4`

mod common;

use std::hint::black_box;
use std::num::NonZeroUsize;

use common::CpuTime;
use criterion::{criterion_group, criterion_main, BenchmarkGroup, Criterion, Throughput};
use half::{bf16, f16};
use moeft_core::nf4::{self, Codebook, Element, Layout, Scales};
use moeft_core::parallel::with_threads;

/// Experts of a usual size, 64 MiB in bf16: past every cache.
const LARGE: Layout = Layout { groups: 16, group_len: 1024 * 2048, block_size: 64 };
/// 64 KiB in f32: a panel that stays in the second-level cache.
const PANEL: Layout = Layout { groups: 1, group_len: 16 * 1024, block_size: 64 };

fn values<T: Element>(layout: Layout) -> Vec<T> {
    (0..layout.values_len() as u32)
        .map(|i| T::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 2f32.powi(29) - 0.016))
        .collect()
}

type Group<'a> = BenchmarkGroup<'a, CpuTime>;

fn quantise<T: Element>(group: &mut Group<'_>, name: &str, layout: Layout) {
    let values = values::<T>(layout);
    let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
    group.throughput(Throughput::Elements(values.len() as u64));
    group.bench_function(name, |b| {
        b.iter(|| nf4::quantize(black_box(&values), Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap())
    });
}

fn dequantise<T: Element>(group: &mut Group<'_>, name: &str, layout: Layout, is_nested: bool) {
    let (mut packed, mut absmax) = (vec![0; layout.packed_len()], vec![0.0; layout.absmax_len()]);
    nf4::quantize(&values::<T>(layout), Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
    let (mut codes, mut absmax2) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(nf4::NESTED_BLOCK_SIZE)]);
    let offset = nf4::nest(&absmax, None, &mut codes, &mut absmax2).unwrap();
    let nested = Scales::Nested { codes: &codes, absmax2: &absmax2, offset, first: 0 };
    let scales = if is_nested { nested } else { Scales::Plain(&absmax) };
    let mut memory = vec![T::default(); layout.values_len() + 64];
    // As torch aligns its tensors; elsewhere the cache is not bypassed.
    let aligned = memory.as_ptr().align_offset(64);
    let out = &mut memory[aligned..][..layout.values_len()];
    group.throughput(Throughput::Elements(out.len() as u64));
    group.bench_function(name, |b| {
        b.iter(|| nf4::dequantize(black_box(&packed), scales, Codebook::Nf4, layout, out).unwrap())
    });
}

fn kernels(criterion: &mut Criterion<CpuTime>) {
    let mut group = criterion.benchmark_group("nf4");
    group.sample_size(20);
    quantise::<f32>(&mut group, "quantise f32", LARGE);
    quantise::<bf16>(&mut group, "quantise bf16", LARGE);
    quantise::<f16>(&mut group, "quantise f16", LARGE);
    quantise::<f32>(&mut group, "quantise f32 panel", PANEL);
    quantise::<bf16>(&mut group, "quantise bf16 panel", PANEL);
    dequantise::<f32>(&mut group, "dequantise f32", LARGE, false);
    dequantise::<bf16>(&mut group, "dequantise bf16", LARGE, false);
    dequantise::<bf16>(&mut group, "dequantise bf16 nested", LARGE, true);
    dequantise::<f16>(&mut group, "dequantise f16", LARGE, false);
    dequantise::<f32>(&mut group, "dequantise f32 panel", PANEL, false);
    dequantise::<bf16>(&mut group, "dequantise bf16 panel", PANEL, false);
    let values = values::<bf16>(LARGE);
    group.throughput(Throughput::Elements(values.len() as u64));
    group.bench_function("first non-finite bf16", |b| b.iter(|| nf4::first_non_finite(black_box(&values))));
}

/// What memory allows: bytes read, and bytes written past the cache or through it.
fn memory(criterion: &mut Criterion<CpuTime>) {
    let mut group = criterion.benchmark_group("memory");
    group.sample_size(20);
    let mut bytes = vec![1u64; 8 << 20];
    group.throughput(Throughput::Bytes(size_of_val(&bytes[..]) as u64));
    group.bench_function("read", |b| b.iter(|| black_box(&bytes).iter().fold(0, |all, &word| all | word)));
    group.bench_function("write", |b| b.iter(|| black_box(&mut bytes).fill(black_box(2))));
    #[cfg(target_arch = "x86_64")]
    group.bench_function("write past the cache", |b| b.iter(|| fill_past_the_cache(black_box(&mut bytes), 3)));
}

#[cfg(target_arch = "x86_64")]
fn fill_past_the_cache(words: &mut [u64], value: u64) {
    use std::arch::x86_64::{_mm_set1_epi64x, _mm_sfence, _mm_stream_si128};
    // SAFETY: SSE2 is in every x86-64; `align_to_mut` gives whole, aligned vectors within the slice.
    unsafe {
        for vector in words.align_to_mut().1 {
            _mm_stream_si128(vector, _mm_set1_epi64x(value as i64));
        }
        _mm_sfence();
    }
}

fn one_thread(criterion: &mut Criterion<CpuTime>) {
    with_threads(NonZeroUsize::MIN, || {
        memory(criterion);
        kernels(criterion);
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = one_thread
}
criterion_main!(benches);
