//! Part of a group restored to f32, for kernels that work through packed weights panel by panel.

use std::ops::Range;

use super::CODE;
use crate::isa::Isa;

/// Scales of one group, as stored.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One f32 per block.
    Plain(&'a [f32]),
    /// One 8-bit code per block, see [`nest`](super::nest).
    Nested {
        /// Codes of this group's blocks.
        codes: &'a [u8],
        /// Second-level scales of the whole stack.
        absmax2: &'a [f32],
        /// Offset of the whole stack.
        offset: f32,
        /// Position of this group's first code in the whole stack.
        first: usize,
    },
}

impl<'a> Scales<'a> {
    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    /// Scales of the blocks in `range`.
    pub fn slice(&self, range: Range<usize>) -> Self {
        match *self {
            Self::Plain(absmax) => Self::Plain(&absmax[range]),
            Self::Nested { codes, absmax2, offset, first } => {
                Self::Nested { codes: &codes[range.clone()], absmax2, offset, first: first + range.start }
            }
        }
    }

    /// Scale of block `block` of the group.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested { codes, absmax2, offset, first } => {
                let scale = absmax2[(first + block) / super::NESTED_BLOCK_SIZE];
                super::DYNAMIC_MAP[usize::from(codes[block])] * scale + offset
            }
        }
    }
}

/// Restores values `start..start + out.len()` of a group, code times absmax, as [`dequantize`](super::dequantize)
/// does. `out` stays in the cache.
pub(crate) fn decode_run(
    _isa: Isa,
    packed: &[u8],
    scales: Scales<'_>,
    block_size: usize,
    start: usize,
    out: &mut [f32],
) {
    let mut at = start;
    let mut rest = out;
    while !rest.is_empty() {
        let block = at / block_size;
        let len = rest.len().min((block + 1) * block_size - at);
        let (head, tail) = rest.split_at_mut(len);
        let absmax = scales.get(block);
        let table = CODE.map(|code| code * absmax);
        for (i, value) in head.iter_mut().enumerate() {
            let byte = packed[(at + i) / 2];
            let index = if (at + i) & 1 == 0 { byte >> 4 } else { byte & 15 };
            *value = table[usize::from(index)];
        }
        at += len;
        rest = tail;
    }
}
