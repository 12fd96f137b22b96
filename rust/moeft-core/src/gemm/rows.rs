//! Rows in blocks of sixteen.

use half::f16;

use super::dispatch;
use super::floats::{Floats, Precision};
use crate::isa::Isa;

/// Rows of a block.
pub const LANES: usize = 16;

/// One column of a block: the same column of sixteen rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; LANES]);

/// `count` rows of `width` f32, as `ceil(count / 16)` blocks of `[width][16]`.
///
/// Rows beyond `count` in the last block are zero when loaded, and whatever a product makes of zero after it.
#[derive(Debug, Default)]
pub struct Rows {
    lanes: Vec<Lanes>,
    count: usize,
    width: usize,
}

impl Rows {
    /// Changes the shape. Values are then unspecified, but initialised; memory is kept for reuse.
    pub fn reshape(&mut self, count: usize, width: usize) {
        self.lanes.resize(count.div_ceil(LANES) * width, Lanes::default());
        (self.count, self.width) = (count, width);
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Columns of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All blocks, one after the other.
    pub fn lanes(&self) -> &[Lanes] {
        &self.lanes
    }

    /// All blocks, to be changed.
    pub fn lanes_mut(&mut self) -> &mut [Lanes] {
        &mut self.lanes
    }

    /// The blocks, each of `width` lanes.
    pub fn blocks(&self) -> impl Iterator<Item = &[Lanes]> {
        self.lanes.chunks_exact(self.width.max(1))
    }

    /// Fills each row with the same values.
    pub fn fill(&mut self, row: &[f32]) {
        for block in self.lanes.chunks_exact_mut(self.width.max(1)) {
            for (lanes, &value) in block.iter_mut().zip(row) {
                lanes.0.fill(value);
            }
        }
    }

    /// Takes row `source(i)` of `from`, a matrix of rows of `width`, for every `i` below `count`.
    ///
    /// # Panics
    /// If a source row lies outside of `from`: our own mistake.
    pub fn load(
        &mut self,
        isa: Isa,
        from: Floats<'_>,
        (count, width): (usize, usize),
        source: impl Fn(usize) -> usize,
        scratch: &mut Vec<f32>,
    ) {
        self.reshape(count, width);
        scratch.resize(LANES * width, 0.0);
        for (index, block) in self.lanes.chunks_exact_mut(width.max(1)).enumerate() {
            let first = index * LANES;
            for (lane, row) in scratch.chunks_exact_mut(width).enumerate() {
                if first + lane < count {
                    from.widen(source(first + lane) * width, row);
                } else {
                    row.fill(0.0);
                }
            }
            dispatch!(isa, from_rows(scratch, block));
        }
    }

    /// Hands every row, in order, to `take` with its index.
    pub fn unload(&self, isa: Isa, scratch: &mut Vec<f32>, mut take: impl FnMut(usize, &[f32])) {
        scratch.resize(LANES * self.width, 0.0);
        for (index, block) in self.blocks().enumerate() {
            dispatch!(isa, to_rows(block, scratch));
            for (lane, row) in scratch.chunks_exact(self.width).enumerate().take(self.count - index * LANES) {
                take(index * LANES + lane, row);
            }
        }
    }

    /// Rounds every value to 16 bits and back.
    pub fn round(&mut self, to: Precision) {
        let lanes = self.lanes.iter_mut().flat_map(|lanes| &mut lanes.0);
        match to {
            Precision::F32 => {}
            Precision::Bf16 => lanes.for_each(|value| *value = crate::float::round_trip_bf16(*value)),
            Precision::F16 => lanes.for_each(|value| *value = f16::from_f32(*value).to_f32()),
        }
    }
}
