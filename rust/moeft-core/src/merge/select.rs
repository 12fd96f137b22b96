//! The k largest magnitudes of a tensor that is read in blocks: exact, in fixed memory.
//!
//! A radix selection on the 31 bits of |x| as f32: one pass counts the upper 16, one the lower 15 of those that share the
//! upper ones with the threshold, and one more counts where the values equal to it lie, if only some of them belong to the
//! k largest: those of the lowest indices do.

use super::kernel::{Block, Gathered, Reads, Settings};
use super::simd::vectorised;

/// Bits of the second pass.
const LOW_BITS: u32 = 15;
const HIGH: usize = 1 << 16;
const LOW: usize = 1 << LOW_BITS;

/// Which values are among the `target` largest.
#[derive(Debug, Clone)]
struct Cut {
    /// How many are sought; after each pass, how many are still sought among those that share the known bits.
    target: u64,
    /// Upper bits of the threshold, later all of them.
    bits: u32,
    /// Values equal to the threshold.
    ties: u64,
    /// Values equal to it before each block.
    before: Vec<u64>,
}

/// What the next pass counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    High,
    Low,
    Ties,
    Done,
}

/// Cuts through the magnitudes of the inputs of a kernel.
#[derive(Debug)]
pub struct Largest {
    /// By input.
    cuts: Vec<Vec<Cut>>,
    step: Step,
    block: u64,
    elements: u64,
}

impl Largest {
    /// Cuts at the `targets` largest, per input.
    pub fn new(targets: Vec<Vec<u64>>, settings: &Settings<'_>) -> Self {
        let cut = |target| Cut { target, bits: 0, ties: 0, before: Vec::new() };
        let cuts: Vec<Vec<_>> = targets.into_iter().map(|targets| targets.into_iter().map(cut).collect()).collect();
        let elements = settings.elements();
        let trivial = cuts.iter().flatten().all(|cut| cut.is_trivial(elements));
        Self { cuts, step: if trivial { Step::Done } else { Step::High }, block: settings.block, elements }
    }

    /// As [`super::kernel::Kernel::pass`].
    pub fn pass(&self) -> Option<Reads> {
        (self.step != Step::Done).then_some(Reads::Models)
    }

    /// As [`super::kernel::Kernel::gather`].
    pub fn gather(&self, block: &Block, into: &mut Gathered) {
        let cuts: usize = self.cuts.iter().map(Vec::len).sum();
        match self.step {
            Step::High => {
                let counts = into.counts(self.cuts.len() * HIGH);
                for (values, counts) in block.inputs.iter().zip(counts.chunks_exact_mut(HIGH)) {
                    values.iter().for_each(|&value| counts[(magnitude(value) >> LOW_BITS) as usize] += 1);
                }
            }
            Step::Low => {
                let mut counts = into.counts(cuts * LOW).chunks_exact_mut(LOW);
                for (values, cuts) in block.inputs.iter().zip(&self.cuts) {
                    for (cut, counts) in cuts.iter().zip(&mut counts) {
                        let same = values.iter().map(|&value| magnitude(value)).filter(|m| m >> LOW_BITS == cut.bits);
                        same.for_each(|m| counts[m as usize % LOW] += 1);
                    }
                }
            }
            Step::Ties => {
                for (values, cuts) in block.inputs.iter().zip(&self.cuts) {
                    let ties = |cut: &Cut| values.iter().filter(|&&value| magnitude(value) == cut.bits).count() as u32;
                    into.series.extend(cuts.iter().map(ties));
                }
            }
            Step::Done => unreachable!("no pass was asked for"),
        }
    }

    /// As [`super::kernel::Kernel::learn`].
    pub fn learn(&mut self, all: &Gathered) {
        let elements = self.elements;
        self.step = match self.step {
            Step::High => {
                for (cuts, counts) in self.cuts.iter_mut().zip(all.counts.chunks_exact(HIGH)) {
                    cuts.iter_mut().filter(|cut| !cut.is_trivial(elements)).for_each(|cut| cut.descend(counts));
                }
                Step::Low
            }
            Step::Low => {
                for (cut, counts) in self.cuts.iter_mut().flatten().zip(all.counts.chunks_exact(LOW)) {
                    if !cut.is_trivial(elements) {
                        cut.descend(counts);
                    }
                }
                match self.cuts.iter().flatten().all(|cut| cut.is_trivial(elements) || cut.target == cut.ties) {
                    true => Step::Done,
                    false => Step::Ties,
                }
            }
            Step::Ties => {
                let cuts = self.cuts.iter().map(Vec::len).sum();
                for (index, cut) in self.cuts.iter_mut().flatten().enumerate() {
                    let mut seen = 0;
                    let ties = all.series.iter().skip(index).step_by(cuts);
                    cut.before = ties.map(|&ties| (seen, seen += u64::from(ties)).0).collect();
                }
                Step::Done
            }
            Step::Done => unreachable!("no pass was asked for"),
        };
    }

    /// Sets values of a block to zero: those that are not among the largest, or with `others` those that are. A wider cut
    /// may have been through the block before: what it dropped comes behind all that this one takes.
    pub fn keep(&self, input: usize, cut: usize, start: u64, others: bool, values: &mut [f32]) {
        let cut = &self.cuts[input][cut];
        if cut.is_trivial(self.elements) {
            if others == (cut.target > 0) {
                values.fill(0.0);
            }
            return;
        }
        let block = (start / self.block) as usize;
        let seen = cut.before.get(block).copied().unwrap_or(0);
        let next = cut.before.get(block + 1).copied().unwrap_or(cut.ties);
        // Values equal to the threshold belong to the largest up to a place, which lies in one block at most.
        let left = cut.target.saturating_sub(seen);
        let (taken, rest) = if left >= next - seen {
            (values, [].as_mut_slice())
        } else {
            let is_tie = |value: &f32| magnitude(*value) == cut.bits;
            let ties = (0..).zip(&*values).filter(|(_, value)| is_tie(value));
            let end = ties.map(|(index, _)| index).nth(left as usize);
            values.split_at_mut(end.unwrap_or(values.len()))
        };
        keep_by_magnitude(taken, cut.bits, others);
        keep_by_magnitude(rest, cut.bits + 1, others);
    }
}

vectorised! {
    /// Sets values whose magnitude has bits below `least` to zero, or with `others` those from `least` on.
    fn keep_by_magnitude(values: &mut [f32], least: u32, others: bool) {
        for value in values {
            *value = if (magnitude(*value) >= least) != others { *value } else { 0.0 };
        }
    }
}

impl Cut {
    /// Whether it takes nothing or everything, which no pass has to find out.
    fn is_trivial(&self, elements: u64) -> bool {
        // After a pass the target only falls, and below the number of elements it stays.
        self.bits == 0 && self.ties == 0 && (self.target == 0 || self.target == elements)
    }

    /// Adds the next lower bits of the threshold, whose counts are known.
    fn descend(&mut self, counts: &[u64]) {
        let mut above = 0;
        for (digit, &count) in counts.iter().enumerate().rev() {
            if above + count >= self.target {
                self.target -= above;
                self.ties = count;
                let digits = counts.len().trailing_zeros();
                // The upper bits come first, into an empty threshold.
                self.bits = if digits == LOW_BITS { self.bits << LOW_BITS | digit as u32 } else { digit as u32 };
                return;
            }
            above += count;
        }
        unreachable!("a target is not above the number of elements");
    }
}

/// The bits of |x|, which are ordered as the magnitudes are.
#[inline(always)]
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

#[cfg(test)]
mod tests;
