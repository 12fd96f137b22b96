//! Reading of a checkpoint from the page cache, beside reading the same file at once; opening one of many tensors.
//!
//! `cargo bench -p moeft-core --bench checkpoint`

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::path::Path;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use moeft_core::checkpoint::{Checkpoint, Dtype, Header, ShardWriter, TensorSpec, CHUNK_BYTES, SINGLE};

fn save(folder: &Path, tensors: usize, elements: u64) {
    fs::create_dir_all(folder).unwrap();
    let spec =
        |index| TensorSpec { name: format!("model.layers.{index}.w"), dtype: Dtype::BF16, shape: vec![elements] };
    let path = folder.join(SINGLE);
    let header = Header::layout(&path, (0..tensors).map(spec).collect(), &[]).unwrap();
    let names: Vec<String> = header.tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let mut writer = ShardWriter::create(&path, header).unwrap();
    let data = vec![0x3c; 2 * elements as usize];
    names.iter().for_each(|name| writer.append(name, &data).unwrap());
    writer.finish().unwrap();
}

fn benches(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let (large, many) = (folder.path().join("large"), folder.path().join("many"));
    save(&large, 4, 32 << 20);
    save(&many, 18_867, 16);

    let mut group = criterion.benchmark_group("checkpoint");
    group.sample_size(10);
    let checkpoint = Checkpoint::open(&large).unwrap();
    group.throughput(Throughput::BytesDecimal(checkpoint.bytes()));
    group.bench_function("read in chunks", |bench| {
        bench.iter(|| {
            let mut sum = 0;
            for tensor in checkpoint.tensors() {
                let add = |_, piece: &[u8]| {
                    sum += u64::from(piece[0]);
                    Ok(())
                };
                tensor.for_each_chunk(0, tensor.info.bytes, add).unwrap();
            }
            black_box(sum)
        });
    });
    group.bench_function("plain reads of the file", |bench| {
        let mut buffer = vec![0; CHUNK_BYTES];
        bench.iter(|| {
            let mut file = File::open(large.join(SINGLE)).unwrap();
            while file.read(&mut buffer).unwrap() > 0 {
                black_box(buffer[0]);
            }
        });
    });
    group.throughput(Throughput::Elements(18_867));
    group.bench_function("open 18,867 tensors", |bench| bench.iter(|| Checkpoint::open(&many).unwrap().len()));
}

criterion_group!(checkpoint, benches);
criterion_main!(checkpoint);
