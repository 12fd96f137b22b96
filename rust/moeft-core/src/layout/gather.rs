//! Moves the elements of one expert from where they lie to where they go, in bounded memory.

use serde::Serialize;

use super::arrangement::{Sizes, Strides};
use crate::checkpoint::{Checkpoint, StagedFile, Tensor};
use crate::progress::Progress;
use crate::Result;

/// Bytes that are rearranged at once: enough that reads of a transposed stack are some KiB long.
const TILE_BYTES: u64 = 8 << 20;
/// Side of the squares in which a tile is transposed: both sides stay in the L1 cache.
const SQUARE: usize = 32;

/// Where one part is read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Name on disk.
    pub tensor: String,
    /// First element.
    pub first: u64,
    /// Elements from one output or input to the next.
    pub strides: Strides,
}

/// The matrices of one expert, next to be written to a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gather {
    pub sizes: Sizes,
    /// One per part.
    pub sources: Vec<Source>,
    /// Where an element is written, counted from the first of this expert.
    pub target: Strides,
}

/// A range of outputs and inputs.
#[derive(Debug, Clone, Copy)]
struct Tile {
    first: [u64; 2],
    count: [u64; 2],
}

impl Gather {
    /// Appends the matrices to tensor `name` of the file.
    ///
    /// # Errors
    /// [`crate::Error::Io`], and what `progress` returns.
    pub fn run(
        &self,
        checkpoint: &Checkpoint,
        element_bytes: u64,
        name: &str,
        writer: &mut StagedFile<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let tensor =
            |source: &Source| checkpoint.get(&source.tensor).expect("the plan names what the checkpoint holds");
        if self.is_concatenation() {
            let part_bytes = self.sizes.outputs * self.sizes.inputs * element_bytes;
            return self.sources.iter().try_for_each(|source| {
                tensor(source).for_each_chunk(source.first * element_bytes, part_bytes, |_, piece| {
                    writer.append(name, piece)?;
                    progress.advance(piece.len() as u64, name)
                })
            });
        }
        let (mut input, mut output) = (Vec::new(), Vec::new());
        for tile in self.tiles(element_bytes) {
            let elements = self.sizes.parts * tile.count[0] * tile.count[1];
            output.resize((elements * element_bytes) as usize, 0);
            for (part, source) in (0..).zip(&self.sources) {
                let strides = read_tile(tensor(source), source, tile, element_bytes, &mut input)?;
                let target = [self.target.output as usize, self.target.input as usize];
                let out = &mut output[(part * self.target.part * element_bytes) as usize..];
                let count = tile.count.map(|count| count as usize);
                match element_bytes {
                    2 => scatter::<2>(&input, strides, out, target, count),
                    4 => scatter::<4>(&input, strides, out, target, count),
                    other => unreachable!("weights have 2 or 4 bytes, not {other}"),
                }
            }
            writer.append(name, &output)?;
            progress.advance(output.len() as u64, name)?;
        }
        Ok(())
    }

    /// Whether the parts, read from end to end, are the output.
    fn is_concatenation(&self) -> bool {
        let matrix = self.sizes.matrix();
        let same = |strides: Strides| strides.output == matrix.output && strides.input == matrix.input;
        let in_order = self.sizes.parts == 1 || self.target.part == matrix.part;
        in_order && same(self.target) && self.sources.iter().all(|source| same(source.strides))
    }

    /// Ranges along the slowest axis of the output; what they write follows each other.
    fn tiles(&self, element_bytes: u64) -> impl Iterator<Item = Tile> {
        let axis = usize::from(self.target.input > self.target.output);
        let whole = [self.sizes.outputs, self.sizes.inputs];
        let row_bytes = self.sizes.elements() / whole[axis] * element_bytes;
        let step = (TILE_BYTES / row_bytes).max(1);
        (0..whole[axis]).step_by(step as usize).map(move |start| {
            let mut tile = Tile { first: [0, 0], count: whole };
            tile.first[axis] = start;
            tile.count[axis] = step.min(whole[axis] - start);
            tile
        })
    }
}

/// Reads what a tile needs and returns the strides with which it lies in `buffer`, in elements.
fn read_tile(
    tensor: Tensor<'_>,
    source: &Source,
    tile: Tile,
    element_bytes: u64,
    buffer: &mut Vec<u8>,
) -> Result<[usize; 2]> {
    let strides = [source.strides.output, source.strides.input];
    let first = source.first + tile.first[0] * strides[0] + tile.first[1] * strides[1];
    let slow = usize::from(strides[1] > strides[0]);
    let fast = 1 - slow;
    let run = (tile.count[fast] - 1) * strides[fast] + 1;
    // Runs that follow each other, but for what lies between two elements, are read at once.
    let is_dense = run + strides[fast] > strides[slow];
    let pitch = if is_dense { strides[slow] } else { run };
    let (reads, read) = match is_dense {
        true => (1, (tile.count[slow] - 1) * pitch + run),
        false => (tile.count[slow], run),
    };
    let read_bytes = (read * element_bytes) as usize;
    buffer.resize(reads as usize * read_bytes, 0);
    for (index, piece) in (0..).zip(buffer.chunks_exact_mut(read_bytes)) {
        tensor.read_at(piece, (first + index * strides[slow]) * element_bytes)?;
    }
    let mut found = [0; 2];
    found[slow] = pitch as usize;
    found[fast] = strides[fast] as usize;
    Ok(found)
}

/// `output[o * target[0] + i * target[1]] = input[o * source[0] + i * source[1]]` for all o and i below `count`.
fn scatter<const N: usize>(input: &[u8], source: [usize; 2], output: &mut [u8], target: [usize; 2], count: [usize; 2]) {
    let (input, output) = (input.as_chunks::<N>().0, output.as_chunks_mut::<N>().0);
    for o_start in (0..count[0]).step_by(SQUARE) {
        for i_start in (0..count[1]).step_by(SQUARE) {
            for o in o_start..count[0].min(o_start + SQUARE) {
                for i in i_start..count[1].min(i_start + SQUARE) {
                    output[o * target[0] + i * target[1]] = input[o * source[0] + i * source[1]];
                }
            }
        }
    }
}
