//! The scales of packed blocks as they are stored: one f32 each, or 8 bits with a second level.

use super::nested::{check_absmax2, NESTED_BLOCK_SIZE};
use super::DYNAMIC_MAP;
use crate::Result;

/// Most nested scales restored at once; see [`Scales::run`].
pub(super) const RUN: usize = 64;

/// Scales of one group or of a whole stack, as stored.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One f32 per block.
    Plain(&'a [f32]),
    /// One 8-bit code per block, see [`nest`](super::nest).
    Nested {
        /// Codes of these blocks.
        codes: &'a [u8],
        /// Second-level scales of the whole stack.
        absmax2: &'a [f32],
        /// Offset of the whole stack.
        offset: f32,
        /// Position of the first code in the whole stack.
        first: usize,
    },
}

impl Scales<'_> {
    /// Scale of block `block`.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested { codes, absmax2, offset, first } => {
                let scale = absmax2[(first + block) / NESTED_BLOCK_SIZE];
                DYNAMIC_MAP[usize::from(codes[block])] * scale + offset
            }
        }
    }

    /// Scales of `blocks` blocks from `block` on; of nested ones the first [`RUN`], restored into `buffer`.
    #[inline]
    pub(super) fn run<'b>(&'b self, block: usize, blocks: usize, buffer: &'b mut [f32; RUN]) -> &'b [f32] {
        match *self {
            Self::Plain(absmax) => &absmax[block..][..blocks],
            Self::Nested { codes, absmax2, offset, first } => {
                let buffer = &mut buffer[..blocks.min(RUN)];
                let places = first + block..;
                for ((scale, &code), place) in buffer.iter_mut().zip(&codes[block..]).zip(places) {
                    *scale = DYNAMIC_MAP[usize::from(code)] * absmax2[place / NESTED_BLOCK_SIZE] + offset;
                }
                buffer
            }
        }
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The scales from block `blocks` on.
    pub fn skip(self, blocks: usize) -> Self {
        match self {
            Self::Plain(absmax) => Self::Plain(&absmax[blocks..]),
            Self::Nested { codes, absmax2, offset, first } => {
                Self::Nested { codes: &codes[blocks..], absmax2, offset, first: first + blocks }
            }
        }
    }

    /// Checks that the second level covers all codes.
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            Self::Plain(_) => Ok(()),
            Self::Nested { codes, absmax2, first, .. } => check_absmax2(first + codes.len(), absmax2.len()),
        }
    }
}
