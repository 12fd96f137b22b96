//! How many values, bytes and scales a quantised weight has.

use crate::{Error, Result};

/// How the values of a weight are cut into groups and blocks.
///
/// Every group starts a new byte and a new block, so a group (an expert) can be addressed, streamed
/// and compared on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Number of groups: experts of a stack, or 1.
    pub groups: usize,
    /// Values per group.
    pub group_len: usize,
    /// Values per block: a power of two from 32 to 4096, as bitsandbytes accepts.
    pub block_size: usize,
}

impl Layout {
    /// Number of values: `groups * group_len`.
    pub fn values_len(&self) -> usize {
        // Saturating: no slice has usize::MAX elements, so an overflow fails the length checks.
        self.groups.saturating_mul(self.group_len)
    }

    /// Number of packed bytes: `groups * ceil(group_len / 2)`.
    pub fn packed_len(&self) -> usize {
        self.groups.saturating_mul(self.group_packed_len())
    }

    /// Number of scales: `groups * ceil(group_len / block_size)`.
    pub fn absmax_len(&self) -> usize {
        self.groups.saturating_mul(self.group_absmax_len())
    }

    /// Packed bytes of one group.
    pub fn group_packed_len(&self) -> usize {
        self.group_len.div_ceil(2)
    }

    /// Scales of one group.
    pub fn group_absmax_len(&self) -> usize {
        self.group_len.div_ceil(self.block_size.max(1))
    }

    /// Checks the block size, then the three buffers' lengths.
    pub(crate) fn check(&self, values: (&'static str, usize), packed: usize, absmax: usize) -> Result<()> {
        check_block_size(self.block_size)?;
        let expected = [
            (values.0, values.1, self.values_len(), "groups * group_len"),
            ("packed", packed, self.packed_len(), "groups * ceil(group_len / 2)"),
            ("absmax", absmax, self.absmax_len(), "groups * ceil(group_len / block_size)"),
        ];
        for (name, found, wanted, formula) in expected {
            if found != wanted {
                return Err(Error::invalid(
                    name,
                    format!("{found} long"),
                    format!("{formula} = {wanted} for {self:?}"),
                ));
            }
        }
        Ok(())
    }
}

/// Refuses block sizes that bitsandbytes does not have.
pub(super) fn check_block_size(block_size: usize) -> Result<()> {
    if block_size.is_power_of_two() && (32..=4096).contains(&block_size) {
        return Ok(());
    }
    Err(Error::invalid("block_size", block_size, "a power of two from 32 to 4096"))
}
