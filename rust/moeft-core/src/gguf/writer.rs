//! Fills one file: slabs of rows are read, quantised in parallel, and written in order.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use super::header::ALIGNMENT;
use super::quants;
use super::shards::Shard;
use super::source::Spec;
use super::{GgufError, TensorInfo};
use crate::checkpoint::{start_writeback, Checkpoint};
use crate::progress::Progress;
use crate::{parallel, Error, Result};

/// Values of a slab: 1 MiB in f32. A row that is longer is a slab of its own.
const SLAB_LEN: u64 = 1 << 18;
/// Slabs of a thread between two writes.
const SLABS_PER_THREAD: usize = 4;
/// How much may be dirty before the kernel is asked to start writing.
const WRITEBACK_BYTES: u64 = 64 << 20;

/// Rows of one tensor, and the memory to make their blocks in.
#[derive(Default)]
struct Slab {
    tensor: usize,
    first_row: u64,
    rows: u64,
    input: Vec<u8>,
    values: Vec<f32>,
    blocks: Vec<u8>,
}

/// Writes and syncs the file under its partial name.
pub(super) fn write(source: &Checkpoint, shard: &Shard, specs: &[Spec], progress: &mut dyn Progress) -> Result<()> {
    let path = shard.partial();
    let file = File::create(&path).map_err(Error::io("create", &path))?;
    file.write_all_at(&shard.header, 0).map_err(Error::io("write", &path))?;
    file.set_len(shard.file_bytes()).map_err(Error::io("write", &path))?;
    let mut cursor = Cursor { specs, tensor: 0, row: 0 };
    let mut slabs: Vec<Slab> = Vec::new();
    slabs.resize_with(SLABS_PER_THREAD * parallel::threads(), Slab::default);
    let mut dirty = 0;
    loop {
        let mut count = 0;
        while count < slabs.len() && cursor.next(&mut slabs[count]) {
            count += 1;
        }
        if count == 0 {
            break;
        }
        let batch = &mut slabs[..count];
        parallel::install(|| {
            let fill = |slab: &mut Slab| slab.fill(source, &specs[slab.tensor], &shard.tensors[slab.tensor]);
            batch.par_iter_mut().with_max_len(1).map(fill).collect::<Result<()>>()
        })?;
        for slab in batch {
            let (tensor, spec) = (&shard.tensors[slab.tensor], &specs[slab.tensor]);
            let row_bytes = tensor.bytes / spec.rows();
            let place = shard.header.len() as u64 + tensor.offset + slab.first_row * row_bytes;
            file.write_all_at(&slab.blocks, place).map_err(Error::io("write", &path))?;
            dirty += slab.blocks.len() as u64;
            progress.advance(slab.blocks.len() as u64, &tensor.name)?;
        }
        if dirty >= WRITEBACK_BYTES {
            dirty = 0;
            start_writeback(&file);
        }
    }
    file.sync_all().map_err(Error::io("sync", &path))
}

/// The rows that are next.
struct Cursor<'a> {
    specs: &'a [Spec],
    tensor: usize,
    row: u64,
}

impl Cursor<'_> {
    /// Gives the next rows to a slab; false if none are left.
    fn next(&mut self, slab: &mut Slab) -> bool {
        let Some(spec) = self.specs.get(self.tensor) else { return false };
        let rows = (SLAB_LEN / spec.row_len()).max(1).min(spec.rows() - self.row);
        (slab.tensor, slab.first_row, slab.rows) = (self.tensor, self.row, rows);
        self.row += rows;
        if self.row == spec.rows() {
            (self.tensor, self.row) = (self.tensor + 1, 0);
        }
        true
    }
}

impl Slab {
    fn fill(&mut self, source: &Checkpoint, spec: &Spec, tensor: &TensorInfo) -> Result<()> {
        debug_assert!(tensor.offset.is_multiple_of(ALIGNMENT));
        let len = (self.rows * spec.row_len()) as usize;
        self.values.resize(len, 0.0);
        spec.read(source, self.first_row, &mut self.values, &mut self.input)?;
        self.blocks.resize(tensor.kind.bytes(len as u64).expect("types fit their rows") as usize, 0);
        let row_len = spec.row_len() as usize;
        quants::quantize(tensor.kind, &self.values, row_len, None, &mut self.blocks).map_err(|error| match error {
            Error::InvalidArgument { value, expected, .. } => {
                GgufError::Tensor { name: spec.name.clone(), cause: format!("has values {value}, expected {expected}") }
                    .into()
            }
            other => other,
        })
    }
}
