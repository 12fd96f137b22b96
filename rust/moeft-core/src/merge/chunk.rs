//! What a thread does with one chunk of a tensor: read, decode, compute, encode.

use super::factors::{Factors, Sides};
use super::floats::{decode, encode, first_non_finite, subtract};
use super::kernel::{Block, Gathered, Kernel, Reads};
use super::measure::{largest_change, products};
use super::plan::{Job, Merge, Plan, Values};
use super::sources::Source;
use crate::adapter::AdapterError;
use crate::checkpoint::{unravel, Checkpoint, CheckpointError, Tensor, CHUNK_BYTES};
use crate::Result;

/// The memory of one chunk under way.
#[derive(Debug, Default)]
pub struct Slot {
    base: Vec<u8>,
    inputs: Vec<Vec<u8>>,
    fisher: Vec<u8>,
    sides: Vec<Sides>,
    block: Block,
    values: Vec<f32>,
    /// Bytes to be written.
    pub output: Vec<u8>,
    /// What a pass gathered, or, of the last one, what the report says.
    pub gathered: Gathered,
}

/// A tensor that is computed, and all that is needed for it.
pub struct Work<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Factors of the group.
    pub factors: &'a Factors,
    /// A number of the tensor, different from all others of the plan.
    pub number: u64,
    /// The tensor.
    pub job: &'a Job,
    /// Its inputs.
    pub merge: &'a Merge,
}

impl Work<'_> {
    /// Looks at a chunk.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; a value that is not finite.
    pub fn gather(&self, kernel: &dyn Kernel, reads: Reads, chunk: usize, slot: &mut Slot) -> Result<()> {
        slot.gathered.clear();
        self.for_blocks(reads, chunk, slot, |_, block, gathered| {
            kernel.gather(block, gathered);
            Ok(())
        })
    }

    /// Computes a chunk into `slot.output`. `slot.gathered` gets `[w'.w', w.w, w'.w]` and the largest change and weight.
    ///
    /// # Errors
    /// As [`Self::gather`]; a result that is not finite.
    pub fn combine(&self, kernel: &dyn Kernel, chunk: usize, slot: &mut Slot) -> Result<()> {
        let (out, size) = (self.job.out, self.job.out.bits() as usize / 8);
        let (_, len) = self.merge.grid.chunk(chunk);
        let (mut values, mut output) = (std::mem::take(&mut slot.values), std::mem::take(&mut slot.output));
        output.resize(len as usize * size, 0);
        slot.gathered.clear();
        let result = self.for_blocks(Reads::Models, chunk, slot, |offset, block, gathered| {
            values.resize(block.base.len(), 0.0);
            kernel.combine(block, &mut values);
            let found = products(&values, &block.base);
            gathered.sums(3).iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
            let change = largest_change(&values, &block.base);
            // Both are magnitudes, so the range can hold them: the smallest is the change, negated.
            gathered.range = [gathered.range[0].min(-change), gathered.range[1].max(block.largest)];
            let bytes = &mut output[offset * size..][..values.len() * size];
            encode(out, &values, bytes);
            match first_non_finite(out, bytes) {
                None => Ok(()),
                Some((place, value)) => {
                    let name = self.job.name.clone();
                    let position = unravel(block.start + place as u64, &self.plan.tensor(self.job).info.shape);
                    Err(AdapterError::NonFinite { name, value, position }.into())
                }
            }
        });
        (slot.values, slot.output) = (values, output);
        result
    }

    /// Reads a chunk and hands it on block by block, with its offset in the chunk.
    fn for_blocks(
        &self,
        reads: Reads,
        chunk: usize,
        slot: &mut Slot,
        mut take: impl FnMut(usize, &mut Block, &mut Gathered) -> Result<()>,
    ) -> Result<()> {
        let merge = self.merge;
        let (first, len) = merge.grid.chunk(chunk);
        let tensor = self.plan.tensor(self.job);
        let with_models = reads == Reads::Models;
        if with_models {
            slot.base.resize(len as usize * tensor.info.dtype.bits() as usize / 8, 0);
            tensor.read_at(&mut slot.base, first * u64::from(tensor.info.dtype.bits()) / 8)?;
            slot.inputs.resize(merge.inputs.len(), Vec::new());
            slot.sides.resize_with(merge.inputs.len(), Sides::default);
            for (raw, input) in slot.inputs.iter_mut().zip(&merge.inputs) {
                if let Values::Weights(index, source) = &input.values {
                    read(&self.plan.checkpoints[*index].checkpoint, source, first, len, raw)?;
                }
            }
        }
        if let (Some(fisher), Some(source)) = (&self.plan.fisher, &merge.fisher) {
            read(fisher, source, first, len, &mut slot.fisher)?;
        }
        let of_deltas = self.plan.of_deltas();
        for offset in (0..len).step_by(merge.grid.block as usize) {
            let count = merge.grid.block.min(len - offset) as usize;
            let place = first + offset;
            let block = &mut slot.block;
            block.start = place;
            if let (Some(fisher), Some(source)) = (&self.plan.fisher, &merge.fisher) {
                self.decode(fisher, source, &slot.fisher, offset, place, count, &mut block.fisher)?;
            }
            if with_models {
                let size = tensor.info.dtype.bits() as usize / 8;
                block.base.resize(count, 0.0);
                let bytes = &slot.base[offset as usize * size..][..count * size];
                block.largest = decode(tensor.info.dtype, bytes, &mut block.base);
                if !block.largest.is_finite() {
                    return Err(non_finite(tensor, place, &block.base));
                }
                block.inputs.resize(merge.inputs.len(), Vec::new());
                for (index, input) in merge.inputs.iter().enumerate() {
                    let values = &mut block.inputs[index];
                    match &input.values {
                        Values::Base => values.clone_from(&block.base),
                        Values::Weights(number, source) => {
                            let checkpoint = &self.plan.checkpoints[*number].checkpoint;
                            self.decode(checkpoint, source, &slot.inputs[index], offset, place, count, values)?;
                            if of_deltas {
                                subtract(values, &block.base);
                            }
                        }
                        Values::Patch(patch) => {
                            values.resize(count, 0.0);
                            let rows = [place, first + len].map(|element| element / patch.cols.max(1));
                            let adapters = &self.plan.adapters;
                            slot.sides[index].delta(self.factors, adapters, patch, self.number, rows, values)?;
                            if !of_deltas {
                                super::methods::add_base(&block.base, values);
                            }
                        }
                    }
                }
            }
            take(offset as usize, block, &mut slot.gathered)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn decode(
        &self,
        checkpoint: &Checkpoint,
        source: &Source,
        raw: &[u8],
        offset: u64,
        place: u64,
        count: usize,
        values: &mut Vec<f32>,
    ) -> Result<()> {
        let size = source.dtype.bits() as usize / 8;
        values.resize(count, 0.0);
        let largest = decode(source.dtype, &raw[offset as usize * size..][..count * size], values);
        if largest.is_finite() {
            return Ok(());
        }
        let index = source.pieces.partition_point(|piece| piece.start + piece.count <= place);
        let piece = &source.pieces[index];
        let tensor = checkpoint.get(&piece.tensor).expect("the plan names what the checkpoint holds");
        Err(non_finite(tensor, piece.first + place - piece.start, values))
    }
}

/// A piece of a tensor that is not computed, in the type of the output, into `slot.output`. `start` is a byte.
///
/// # Errors
/// [`crate::Error::Io`]; a value that is not finite, or too large for the type.
pub fn copy(tensor: Tensor<'_>, job: &Job, start: u64, slot: &mut Slot) -> Result<()> {
    let dtype = tensor.info.dtype;
    let count = (CHUNK_BYTES as u64).min(tensor.info.bytes - start) as usize;
    let converts = job.out != dtype;
    let read = if converts { &mut slot.base } else { &mut slot.output };
    read.resize(count, 0);
    tensor.read_at(read, start)?;
    if !dtype.is_weight() {
        return Ok(());
    }
    let first = start * 8 / u64::from(dtype.bits());
    if let Some((place, value)) = first_non_finite(dtype, read) {
        return Err(non_finite(tensor, first + place as u64, &[value]));
    }
    if converts {
        let elements = count * 8 / dtype.bits() as usize;
        slot.values.resize(elements, 0.0);
        slot.output.resize(elements * job.out.bits() as usize / 8, 0);
        decode(dtype, &slot.base, &mut slot.values);
        encode(job.out, &slot.values, &mut slot.output);
        if let Some((place, value)) = first_non_finite(job.out, &slot.output) {
            let position = unravel(first + place as u64, &tensor.info.shape);
            return Err(AdapterError::NonFinite { name: job.name.clone(), value, position }.into());
        }
    }
    Ok(())
}

fn read(checkpoint: &Checkpoint, source: &Source, first: u64, len: u64, raw: &mut Vec<u8>) -> Result<()> {
    raw.resize(len as usize * source.dtype.bits() as usize / 8, 0);
    source.read_at(checkpoint, first, raw)
}

/// The error for values of a tensor, from element `start` on, of which one is not finite.
fn non_finite(tensor: Tensor<'_>, start: u64, values: &[f32]) -> crate::Error {
    let (index, value) = (0..).zip(values).find(|(_, value)| !value.is_finite()).expect("one is not finite");
    CheckpointError::NonFinite {
        name: format!("{} in {}", tensor.info.name, tensor.shard.path.display()),
        value: *value,
        position: unravel(start + index, &tensor.info.shape),
        advice: "the checkpoint is broken; download or train it again",
    }
    .into()
}
