//! Quantisation of one group that arrives in pieces, such as a tensor read from a file in bounded memory.

use super::layout::check_block_size;
use super::quantize::quantize_group_parallel;
use super::{Codebook, Element};
use crate::isa::Isa;
use crate::{Error, Result};

/// Quantises one group to NF4 from pieces of any length; equal to [`quantize`](super::quantize()) on the whole.
///
/// Holds at most one block; outputs are appended as blocks complete.
///
/// ```
/// use moeft_core::nf4::GroupQuantizer;
///
/// let (mut packed, mut absmax) = (Vec::new(), Vec::new());
/// let mut quantizer = GroupQuantizer::new(5, 64)?;
/// quantizer.push(&[1.0f32, -1.0, 0.5], &mut packed, &mut absmax)?;
/// quantizer.push(&[0.0f32, 0.25], &mut packed, &mut absmax)?;
/// quantizer.finish(&mut packed, &mut absmax)?;
/// assert_eq!((packed, absmax), (vec![0xf0, 0xc7, 0xa7], vec![1.0]));
/// # Ok::<(), moeft_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct GroupQuantizer {
    isa: Isa,
    group_len: usize,
    block_size: usize,
    /// Values taken so far, those in `carry` included.
    taken: usize,
    /// The block in progress, widened to f32 (exact); always shorter than `block_size`.
    carry: Vec<f32>,
}

impl GroupQuantizer {
    /// A quantiser for one group of `group_len` values.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the block size is not a power of two from 32 to 4096, or if `MOEFT_ISA` names no
    /// instruction set of this CPU.
    pub fn new(group_len: usize, block_size: usize) -> Result<Self> {
        check_block_size(block_size)?;
        Ok(Self { isa: Isa::active()?, group_len, block_size, taken: 0, carry: Vec::with_capacity(block_size) })
    }

    /// Takes the next values and appends the blocks they complete.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the group would get more than `group_len` values; nothing is taken then.
    pub fn push<T: Element>(
        &mut self,
        values: &[T],
        packed_out: &mut Vec<u8>,
        absmax_out: &mut Vec<f32>,
    ) -> Result<()> {
        let missing = self.group_len - self.taken;
        if values.len() > missing {
            let expected = format!("at most the {missing} missing of a group of {}", self.group_len);
            return Err(Error::invalid("values", format!("{} long", values.len()), expected));
        }
        self.taken += values.len();

        let mut rest = values;
        if !self.carry.is_empty() {
            let (head, tail) = values.split_at(values.len().min(self.block_size - self.carry.len()));
            self.carry.extend(head.iter().map(|v| v.to_f32()));
            rest = tail;
            if self.carry.len() == self.block_size {
                self.append(&self.carry, packed_out, absmax_out);
                self.carry.clear();
            }
        }
        let (blocks, tail) = rest.split_at(rest.len() - rest.len() % self.block_size);
        self.append(blocks, packed_out, absmax_out);
        self.carry.extend(tail.iter().map(|v| v.to_f32()));
        Ok(())
    }

    /// Appends the short last block, if there is one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the group got fewer than `group_len` values.
    pub fn finish(self, packed_out: &mut Vec<u8>, absmax_out: &mut Vec<f32>) -> Result<()> {
        if self.taken != self.group_len {
            return Err(Error::invalid("values", format!("{} in all", self.taken), self.group_len));
        }
        self.append(&self.carry, packed_out, absmax_out);
        Ok(())
    }

    /// Quantises whole blocks (the last may be the group's short one) onto the ends of the outputs.
    fn append<T: Element>(&self, values: &[T], packed_out: &mut Vec<u8>, absmax_out: &mut Vec<f32>) {
        let (packed_start, absmax_start) = (packed_out.len(), absmax_out.len());
        packed_out.resize(packed_start + values.len().div_ceil(2), 0);
        absmax_out.resize(absmax_start + values.len().div_ceil(self.block_size), 0.0);
        let (packed, absmax) = (&mut packed_out[packed_start..], &mut absmax_out[absmax_start..]);
        quantize_group_parallel(self.isa, Codebook::Nf4, values, self.block_size, packed, absmax);
    }
}
