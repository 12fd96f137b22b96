//! How a tensor is cut: blocks that are computed at once, chunks of blocks that are read and written at once.

use serde::Serialize;

/// Elements that a block aims at: base, inputs and output stay in the L2 cache.
const BLOCK: u64 = 16 << 10;
/// Elements that a chunk aims at: 512 KiB of 16-bit weights.
const CHUNK: u64 = 256 << 10;
/// The longest vector that is one row.
const LONGEST_VECTOR: u64 = 64 << 10;

/// The cuts of one tensor. They depend on its shape alone, so that sums over chunks have the same bits everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Grid {
    /// Elements of the tensor.
    pub elements: u64,
    /// Elements of a block: whole rows, but for a long vector.
    pub block: u64,
    /// Elements of a chunk: whole blocks.
    pub chunk: u64,
}

impl Grid {
    /// Cuts a tensor that has elements.
    pub fn new(shape: &[u64]) -> Self {
        let elements: u64 = shape.iter().product();
        let cols = shape.last().copied().unwrap_or(1).max(1);
        let block = if shape.len() < 2 && elements > LONGEST_VECTOR {
            BLOCK
        } else {
            // Products of factors are computed four rows at a time.
            let rows = (BLOCK / cols).max(1);
            cols * if rows > 4 { rows / 4 * 4 } else { rows }
        };
        Self { elements, block, chunk: block * (CHUNK / block).max(1) }
    }

    /// Number of chunks.
    pub fn chunks(self) -> usize {
        self.elements.div_ceil(self.chunk) as usize
    }

    /// First element and length of a chunk.
    pub fn chunk(self, index: usize) -> (u64, u64) {
        let start = index as u64 * self.chunk;
        (start, self.chunk.min(self.elements - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_rows_and_chunks_whole_blocks() {
        for shape in [&[7][..], &[3, 5], &[8, 768, 2048], &[262_144, 2816], &[10, 300_000], &[1 << 20], &[2, 3, 5, 7]] {
            let grid = Grid::new(shape);
            assert_eq!(grid.chunk % grid.block, 0);
            assert!(shape.len() < 2 || grid.block.is_multiple_of(shape[shape.len() - 1]));
            let covered: u64 = (0..grid.chunks()).map(|index| grid.chunk(index).1).sum();
            assert_eq!(covered, grid.elements);
        }
    }
}
