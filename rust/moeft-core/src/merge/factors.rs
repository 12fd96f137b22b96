//! Reads the factors of one tensor at a time, laid out for the merge.

use std::collections::VecDeque;

use super::plan::{Delta, Patch};
use crate::adapter::{Adapter, Pair};
use crate::checkpoint::{Tensor, CHUNK_BYTES};
use crate::float::decode;
use crate::Result;

/// Decoded B factors kept for the next tensors: the experts of a layer on disk share two of them. 96 MiB.
const CACHE_VALUES: usize = 24 << 20;

/// B of a pair, `[experts, out, rank]`: the rows of one expert lie together.
#[derive(Debug)]
struct Decoded {
    delta: Delta,
    values: Vec<f32>,
}

/// The most recently used B factors, newest first.
#[derive(Debug, Default)]
pub struct Factors {
    recent: VecDeque<Decoded>,
}

impl Factors {
    /// Decodes every B that `patch` needs; others stay while they fit.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn load(&mut self, adapters: &[Adapter], patch: &Patch) -> Result<()> {
        for &delta in &patch.deltas {
            let entry = match self.recent.iter().position(|entry| entry.delta == delta) {
                Some(place) => self.recent.remove(place).expect("just found"),
                None => {
                    let adapter = &adapters[delta.adapter];
                    let pair = &adapter.pairs[delta.pair];
                    let tensor = adapter.tensor(&pair.b);
                    self.make_room(tensor.info.shape.iter().product::<u64>() as usize, &patch.deltas);
                    let values = read_b(&tensor, pair.rank as usize, patch.factor_experts as usize)?;
                    Decoded { delta, values }
                }
            };
            self.recent.push_front(entry);
        }
        Ok(())
    }

    /// Drops the oldest factors that are not in `needed` until `values` more fit.
    fn make_room(&mut self, values: usize, needed: &[Delta]) {
        while values + self.recent.iter().map(|entry| entry.values.len()).sum::<usize>() > CACHE_VALUES {
            match self.recent.iter().rposition(|entry| !needed.contains(&entry.delta)) {
                Some(place) => drop(self.recent.remove(place)),
                None => return,
            }
        }
    }

    /// B of one expert, `[out, rank]`.
    ///
    /// # Panics
    /// If it was not loaded: our own mistake.
    pub fn b(&self, delta: Delta, expert: u64, experts: u64) -> &[f32] {
        let entry = self.recent.iter().find(|entry| entry.delta == delta).expect("factors are loaded before use");
        let count = entry.values.len() / experts as usize;
        &entry.values[expert as usize * count..][..count]
    }
}

/// A of one expert, `[rank, inputs]`.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn read_a(adapter: &Adapter, pair: &Pair, expert: u64, inputs: u64, values: &mut Vec<f32>) -> Result<()> {
    let tensor = adapter.tensor(&pair.a);
    let count = pair.rank * inputs;
    let size = u64::from(tensor.info.dtype.bits()) / 8;
    let mut bytes = vec![0; (count * size) as usize];
    tensor.read_at(&mut bytes, expert * count * size)?;
    values.resize(count as usize, 0.0);
    decode(tensor.info.dtype, &bytes, values);
    Ok(())
}

/// A matrix of rows of `cols` values, the other way round.
pub fn transpose(matrix: &[f32], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; matrix.len()];
    let rows = matrix.len() / cols.max(1);
    for (row, values) in matrix.chunks_exact(cols.max(1)).enumerate() {
        for (col, &value) in values.iter().enumerate() {
            out[col * rows + row] = value;
        }
    }
    out
}

/// B from `[out, rank * experts]` with the expert fastest to `[experts, out, rank]`, a few rows at a time.
fn read_b(tensor: &Tensor<'_>, rank: usize, experts: usize) -> Result<Vec<f32>> {
    let (out, cols) = (tensor.info.shape[0] as usize, rank * experts);
    let size = tensor.info.dtype.bits() as usize / 8;
    let rows = (CHUNK_BYTES / (cols * size)).max(1);
    let mut values = vec![0.0; out * cols];
    let (mut bytes, mut decoded) = (vec![0; rows * cols * size], vec![0.0; rows * cols]);
    for first in (0..out).step_by(rows) {
        let count = rows.min(out - first);
        let (bytes, decoded) = (&mut bytes[..count * cols * size], &mut decoded[..count * cols]);
        tensor.read_at(bytes, (first * cols * size) as u64)?;
        decode(tensor.info.dtype, bytes, decoded);
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
