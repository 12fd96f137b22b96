//! Reads LoRA factors and turns them into the delta of some rows of a tensor, in bounded memory.

use std::collections::BTreeMap;

use super::adapters::{Delta, Patch};
use super::floats::{decode, first_non_finite};
use super::low_rank::{add_product, Panels};
use crate::adapter::{Adapter, AdapterError, Pair};
use crate::checkpoint::{unravel, Tensor, CHUNK_BYTES};
use crate::Result;

/// Decoded B factors kept for the tensors at hand: the experts of a layer on disk share two of them. 96 MiB; what does
/// not fit is read from the adapter where it is needed.
pub(super) const CACHE_VALUES: usize = 24 << 20;

/// B factors of experts, decoded, `[experts, out, rank]`: the rows of one expert lie together.
#[derive(Debug, Default)]
pub struct Factors {
    decoded: BTreeMap<Delta, Vec<f32>>,
}

impl Factors {
    /// Decodes the B factors that `patches` need, as long as there is room, and drops the others.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn load<'p>(&mut self, adapters: &[Adapter], patches: impl Iterator<Item = &'p Patch>) -> Result<()> {
        let stacks = patches.filter(|patch| patch.factor_experts > 1);
        let needed: BTreeMap<Delta, u64> =
            stacks.flat_map(|patch| patch.deltas.iter().map(|&delta| (delta, patch.factor_experts))).collect();
        self.decoded.retain(|delta, _| needed.contains_key(delta));
        let mut held: usize = self.decoded.values().map(Vec::len).sum();
        for (delta, experts) in needed {
            let adapter = &adapters[delta.adapter];
            let pair = &adapter.pairs[delta.pair];
            let tensor = adapter.tensor(&pair.b);
            let count = tensor.info.shape.iter().product::<u64>() as usize;
            if !self.decoded.contains_key(&delta) && held + count <= CACHE_VALUES {
                held += count;
                self.decoded.insert(delta, read_b(&tensor, pair.rank as usize, experts as usize)?);
            }
        }
        Ok(())
    }

    /// Rows of B of one expert, `[rows, rank]`.
    fn rows(
        &self,
        adapter: &Adapter,
        delta: Delta,
        [expert, experts]: [u64; 2],
        [first, rows]: [u64; 2],
        into: &mut Vec<f32>,
    ) -> Result<()> {
        let pair = &adapter.pairs[delta.pair];
        let (rank, cols) = (pair.rank as usize, (pair.rank * experts) as usize);
        let (first, rows) = (first as usize, rows as usize);
        into.clear();
        if let Some(decoded) = self.decoded.get(&delta) {
            let count = decoded.len() / experts as usize;
            into.extend_from_slice(&decoded[expert as usize * count + first * rank..][..rows * rank]);
            return Ok(());
        }
        let tensor = adapter.tensor(&pair.b);
        for start in (first..first + rows).step_by(rows_at_once(cols)) {
            let count = rows_at_once(cols).min(first + rows - start);
            let line = read(&tensor, start * cols, count * cols)?;
            into.extend(line.iter().skip(expert as usize).step_by(experts as usize));
        }
        Ok(())
    }
}

/// The factors of the matrix that a thread is at, kept from block to block.
#[derive(Debug, Default)]
pub struct Sides {
    /// Tensor and matrix.
    at: Option<(u64, u64)>,
    /// Per delta the factor that spans the columns: A `[rank, in]`, for a transposed matrix the transpose of B `[rank, out]`.
    right: Vec<Panels>,
    /// Per delta A `[rank, in]` of a transposed matrix.
    a: Vec<Vec<f32>>,
    /// Per delta the rows of the factor that spans the rows.
    left: Vec<Left>,
}

/// Rows `[rows, rank]` of a factor, from row `first` of the matrix on.
#[derive(Debug, Default)]
struct Left {
    first: u64,
    rows: u64,
    values: Vec<f32>,
}

impl Left {
    /// Rows `[first, count, ahead]`: `count` of them from `first` on. If they are not there, `read` gets `ahead` at once.
    fn rows(
        &mut self,
        [first, count, ahead]: [u64; 3],
        rank: usize,
        read: impl FnOnce(&mut Vec<f32>) -> Result<()>,
    ) -> Result<&[f32]> {
        if first < self.first || first + count > self.first + self.rows {
            self.rows = 0;
            read(&mut self.values)?;
            (self.first, self.rows) = (first, ahead);
        }
        Ok(&self.values[(first - self.first) as usize * rank..][..count as usize * rank])
    }
}

/// Memory of the factors of one matrix that a patch is for, and of `chunk` elements of it.
pub(super) fn side_bytes(adapters: &[Adapter], patch: &Patch, chunk: u64) -> usize {
    let rows = patch.rows.min(chunk.div_ceil(patch.cols.max(1)));
    let values = patch.cols + if patch.transposed { patch.rows } else { rows };
    let ranks = patch.deltas.iter().map(|delta| adapters[delta.adapter].pairs[delta.pair].rank);
    ranks.map(|rank| (4 * rank * values) as usize).sum()
}

impl Sides {
    /// Writes what a patch adds to rows `first..` of its tensor, counted through all its matrices, to `out`.
    ///
    /// # Arguments
    /// * `until`: the row up to which more will be asked for; factors are read up to there at once.
    /// * `tensor`: a number for the tensor, so that factors are kept while it is the same.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn delta(
        &mut self,
        factors: &Factors,
        adapters: &[Adapter],
        patch: &Patch,
        tensor: u64,
        [first, until]: [u64; 2],
        out: &mut [f32],
    ) -> Result<()> {
        let cols = patch.cols as usize;
        let (mut row, end) = (first, first + (out.len() / cols.max(1)) as u64);
        let mut rest = out;
        while row < end {
            let (matrix, inside) = (row / patch.rows, row % patch.rows);
            let rows = (patch.rows - inside).min(end - row);
            let (part, later) = rest.split_at_mut(rows as usize * cols);
            self.enter(factors, adapters, patch, (tensor, matrix))?;
            for (index, &delta) in patch.deltas.iter().enumerate() {
                let adapter = &adapters[delta.adapter];
                let pair = &adapter.pairs[delta.pair];
                let rank = pair.rank as usize;
                let ahead = (patch.rows - inside).min(until - row);
                let a = &self.a[index];
                let b = self.left[index].rows([inside, rows, ahead], rank, |into| {
                    if patch.transposed {
                        let column = |row: u64| (0..rank).map(move |j| a[j * patch.rows as usize + row as usize]);
                        into.clear();
                        into.extend((inside..inside + ahead).flat_map(column));
                        return Ok(());
                    }
                    let experts = [patch.first_expert + matrix, patch.factor_experts];
                    factors.rows(adapter, delta, experts, [patch.first_row + inside, ahead], into)
                })?;
                add_product(&self.right[index], b, pair.scaling, index == 0, part);
            }
            row += rows;
            rest = later;
        }
        Ok(())
    }

    /// Reads the factors of a matrix, unless they are there.
    fn enter(&mut self, factors: &Factors, adapters: &[Adapter], patch: &Patch, at: (u64, u64)) -> Result<()> {
        if self.at == Some(at) {
            return Ok(());
        }
        self.at = None;
        let expert = patch.first_expert + at.1;
        self.a.resize(patch.deltas.len(), Vec::new());
        self.right.resize_with(patch.deltas.len(), Panels::default);
        self.left.clear();
        self.left.resize_with(patch.deltas.len(), Left::default);
        for (index, &delta) in patch.deltas.iter().enumerate() {
            let adapter = &adapters[delta.adapter];
            let pair = &adapter.pairs[delta.pair];
            let inputs = if patch.transposed { patch.rows } else { patch.cols };
            let (rank, a) = (pair.rank as usize, read_a(adapter, pair, expert, inputs)?);
            if patch.transposed {
                let experts = [expert, patch.factor_experts];
                let mut b = Vec::new();
                factors.rows(adapter, delta, experts, [patch.first_row, patch.cols], &mut b)?;
                self.right[index] = Panels::new(&transpose(&b, rank), rank);
                self.a[index] = a;
            } else {
                self.right[index] = Panels::new(&a, rank);
            }
        }
        self.at = Some(at);
        Ok(())
    }
}

/// A of one expert, `[rank, inputs]`.
fn read_a(adapter: &Adapter, pair: &Pair, expert: u64, inputs: u64) -> Result<Vec<f32>> {
    let count = pair.rank * inputs;
    read(&adapter.tensor(&pair.a), (expert * count) as usize, count as usize)
}

/// Values of a factor from element `start` on. What is not finite would vanish where a method drops values.
fn read(tensor: &Tensor<'_>, start: usize, count: usize) -> Result<Vec<f32>> {
    let size = tensor.info.dtype.bits() as usize / 8;
    let (mut bytes, mut values) = (vec![0; count * size], vec![0.0; count]);
    tensor.read_at(&mut bytes, (start * size) as u64)?;
    decode(tensor.info.dtype, &bytes, &mut values);
    if let Some((place, value)) = first_non_finite(tensor.info.dtype, &bytes) {
        let (path, key) = (tensor.shard.path.clone(), tensor.info.name.clone());
        let position = unravel((start + place) as u64, &tensor.info.shape);
        return Err(AdapterError::BrokenFactor { path, key, value, position }.into());
    }
    Ok(values)
}

/// A matrix of rows of `cols` values, the other way round.
fn transpose(matrix: &[f32], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; matrix.len()];
    let rows = matrix.len() / cols.max(1);
    for (row, values) in matrix.chunks_exact(cols.max(1)).enumerate() {
        for (col, &value) in values.iter().enumerate() {
            out[col * rows + row] = value;
        }
    }
    out
}

fn rows_at_once(cols: usize) -> usize {
    (CHUNK_BYTES / 4 / cols.max(1)).max(1)
}

/// B from `[out, rank * experts]` with the expert fastest to `[experts, out, rank]`, a few rows at a time.
fn read_b(tensor: &Tensor<'_>, rank: usize, experts: usize) -> Result<Vec<f32>> {
    let (out, cols) = (tensor.info.shape[0] as usize, rank * experts);
    let mut values = vec![0.0; out * cols];
    for first in (0..out).step_by(rows_at_once(cols)) {
        let decoded = read(tensor, first * cols, rows_at_once(cols).min(out - first) * cols)?;
        for (row, line) in (first..).zip(decoded.chunks_exact(cols)) {
            for (j, experts_of_j) in line.chunks_exact(experts).enumerate() {
                for (expert, &value) in experts_of_j.iter().enumerate() {
                    values[(expert * out + row) * rank + j] = value;
                }
            }
        }
    }
    Ok(values)
}
