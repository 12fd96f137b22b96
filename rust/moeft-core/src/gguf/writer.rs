//! Fills one file: slabs of rows are read, quantised in parallel, and written in order.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::finished::Finished;
use super::header::ALIGNMENT;
use super::imatrix::{matrices, Imatrix};
use super::quants;
use super::shards::Shard;
use super::source::Spec;
use super::weights::{Reader, Weights};
use super::{GgufError, TensorInfo};
use crate::checkpoint::start_writeback;
use crate::merge::Factors;
use crate::progress::Progress;
use crate::{parallel, Error, Result};

/// Values of a slab: 1 MiB in f32. A row that is longer is a slab of its own.
const SLAB_LEN: u64 = 1 << 18;
/// Slabs of a thread between two writes.
const SLABS_PER_THREAD: usize = 4;
/// How much may be dirty before the kernel is asked to start writing.
const WRITEBACK_BYTES: u64 = 64 << 20;
/// How much may be lost by a kill: after so many bytes they are synced and their tensors put down as finished.
const JOURNAL_BYTES: u64 = 512 << 20;

/// What tensors are made of.
pub(super) struct Inputs<'a> {
    /// The rows.
    pub weights: &'a Weights,
    /// What counts how much, where it was measured.
    pub imatrix: Option<&'a Imatrix>,
}

/// Rows of one tensor, and the memory to make their blocks in.
#[derive(Default)]
struct Slab {
    tensor: usize,
    first_row: u64,
    rows: u64,
    reader: Reader,
    values: Vec<f32>,
    blocks: Vec<u8>,
}

/// Writes and syncs the file under its partial name, but for the tensors that an earlier run had finished.
pub(super) fn write(
    inputs: &Inputs<'_>,
    shard: &Shard,
    specs: &[Spec],
    finished: &mut Finished,
    progress: &mut dyn Progress,
) -> Result<()> {
    let path = shard.partial();
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
    let file = file.map_err(Error::io("create", &path))?;
    file.write_all_at(&shard.header, 0).map_err(Error::io("write", &path))?;
    file.set_len(shard.file_bytes()).map_err(Error::io("write", &path))?;
    let mut todo = Vec::new();
    for (index, tensor) in shard.tensors.iter().enumerate() {
        if !is_finished(&file, shard, tensor, finished, progress)? {
            todo.push(index);
        }
    }
    let mut work = Work { inputs, specs, tensors: &shard.tensors, factors: Factors::default(), means: BTreeMap::new() };
    let mut slabs: Vec<Slab> = Vec::new();
    slabs.resize_with(parallel::threads() * SLABS_PER_THREAD, Slab::default);
    let mut cursor = Cursor { specs, todo: &todo, row: 0 };
    let (mut dirty, mut unrecorded, mut hash, mut done) = (0, 0, Xxh3::new(), Vec::new());
    loop {
        let mut count = 0;
        while count < slabs.len() && cursor.next(&mut slabs[count]) {
            count += 1;
        }
        if count == 0 {
            break;
        }
        let batch = &mut slabs[..count];
        work.enter(batch)?;
        parallel::install(|| batch.par_iter_mut().with_max_len(1).map(|slab| work.fill(slab)).collect::<Result<()>>())?;
        for slab in batch {
            let (tensor, spec) = (&shard.tensors[slab.tensor], &specs[slab.tensor]);
            let row_bytes = tensor.bytes / spec.rows();
            let place = shard.header.len() as u64 + tensor.offset + slab.first_row * row_bytes;
            file.write_all_at(&slab.blocks, place).map_err(Error::io("write", &path))?;
            dirty += slab.blocks.len() as u64;
            unrecorded += slab.blocks.len() as u64;
            hash.update(&slab.blocks);
            if slab.first_row + slab.rows == spec.rows() {
                done.push((tensor.name.clone(), text(&std::mem::take(&mut hash))));
            }
            progress.advance(slab.blocks.len() as u64, &tensor.name)?;
        }
        if unrecorded >= JOURNAL_BYTES {
            (unrecorded, dirty) = (0, 0);
            file.sync_data().map_err(Error::io("sync", &path))?;
            finished.add(std::mem::take(&mut done))?;
        } else if dirty >= WRITEBACK_BYTES {
            dirty = 0;
            start_writeback(&file);
        }
    }
    file.sync_all().map_err(Error::io("sync", &path))?;
    finished.add(done)
}

fn text(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}

/// Whether the bytes of a tensor are those that an earlier run wrote.
fn is_finished(
    file: &File,
    shard: &Shard,
    tensor: &TensorInfo,
    finished: &Finished,
    progress: &mut dyn Progress,
) -> Result<bool> {
    let Some(expected) = finished.hash(&tensor.name) else { return Ok(false) };
    let (mut hash, mut buffer) = (Xxh3::new(), vec![0; (1 << 20).min(tensor.bytes as usize)]);
    let mut start = 0;
    while start < tensor.bytes {
        let piece = &mut buffer[..(1 << 20).min((tensor.bytes - start) as usize)];
        let place = shard.header.len() as u64 + tensor.offset + start;
        file.read_exact_at(piece, place).map_err(Error::io("read", shard.partial()))?;
        hash.update(piece);
        start += piece.len() as u64;
    }
    let is_same = text(&hash) == expected;
    if is_same {
        progress.advance(tensor.bytes, &tensor.name)?;
    }
    Ok(is_same)
}

/// The rows that are next.
struct Cursor<'a> {
    specs: &'a [Spec],
    todo: &'a [usize],
    row: u64,
}

impl Cursor<'_> {
    /// Gives the next rows to a slab; false if none are left.
    fn next(&mut self, slab: &mut Slab) -> bool {
        let Some((&tensor, later)) = self.todo.split_first() else { return false };
        let spec = &self.specs[tensor];
        let rows = (SLAB_LEN / spec.row_len()).max(1).min(spec.rows() - self.row);
        (slab.tensor, slab.first_row, slab.rows) = (tensor, self.row, rows);
        self.row += rows;
        if self.row == spec.rows() {
            (self.todo, self.row) = (later, 0);
        }
        true
    }
}

/// What all threads share, for the tensors at hand.
struct Work<'a> {
    inputs: &'a Inputs<'a>,
    specs: &'a [Spec],
    tensors: &'a [TensorInfo],
    factors: Factors,
    means: BTreeMap<usize, Option<Vec<f32>>>,
}

impl Work<'_> {
    /// Reads what the tensors of a batch need, and drops the rest.
    fn enter(&mut self, batch: &[Slab]) -> Result<()> {
        let pieces = batch.iter().flat_map(|slab| &self.specs[slab.tensor].pieces);
        self.inputs.weights.prepare(pieces.map(|piece| piece.tensor.as_str()), &mut self.factors)?;
        let Some(imatrix) = self.inputs.imatrix else { return Ok(()) };
        self.means.retain(|tensor, _| batch.iter().any(|slab| slab.tensor == *tensor));
        for slab in batch {
            if !self.means.contains_key(&slab.tensor) {
                self.means.insert(slab.tensor, imatrix.means(&self.specs[slab.tensor].name)?);
            }
        }
        Ok(())
    }

    fn fill(&self, slab: &mut Slab) -> Result<()> {
        let (spec, tensor) = (&self.specs[slab.tensor], &self.tensors[slab.tensor]);
        debug_assert!(tensor.offset.is_multiple_of(ALIGNMENT));
        let (row_len, kind) = (spec.row_len() as usize, tensor.kind);
        slab.values.resize(slab.rows as usize * row_len, 0.0);
        spec.read(self.inputs.weights, &self.factors, slab.first_row, &mut slab.values, &mut slab.reader)?;
        let bytes = |rows: u64| kind.bytes(rows * row_len as u64).expect("types fit their rows") as usize;
        slab.blocks.resize(bytes(slab.rows), 0);
        let per_matrix = (spec.rows() / matrices(&spec.shape)).max(1);
        let means = self.means.get(&slab.tensor).and_then(Option::as_deref);
        let (mut row, end) = (slab.first_row, slab.first_row + slab.rows);
        let (mut values, mut blocks) = (slab.values.as_slice(), slab.blocks.as_mut_slice());
        while row < end {
            // Every matrix has columns that count differently.
            let rows = if means.is_some() { (per_matrix - row % per_matrix).min(end - row) } else { end - row };
            let (these, later) = values.split_at(rows as usize * row_len);
            let (into, rest) = blocks.split_at_mut(bytes(rows));
            let importance = means.map(|means| &means[(row / per_matrix) as usize * row_len..][..row_len]);
            quants::quantize(kind, these, row_len, importance, into).map_err(|error| too_large(spec, error))?;
            (row, values, blocks) = (row + rows, later, rest);
        }
        Ok(())
    }
}

/// Names the tensor in an error about its values.
fn too_large(spec: &Spec, error: Error) -> Error {
    match error {
        Error::InvalidArgument { value, expected, .. } => {
            GgufError::Tensor { name: spec.name.clone(), cause: format!("has values {value}, expected {expected}") }
                .into()
        }
        other => other,
    }
}
