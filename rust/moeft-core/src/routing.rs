//! Stable counting sort of (token, expert) rows by expert, and how evenly the experts are loaded.

mod load;

pub use load::LoadStatistics;

use crate::{Error, Result};

mod sealed {
    pub trait Sealed {}
}

/// An integer type of expert indices: `i32` or `i64`. Sealed.
pub trait ExpertIndex: Copy + std::fmt::Display + sealed::Sealed {
    /// The index as a position, or `None` if it is negative or not below `num_experts`.
    fn position(self, num_experts: usize) -> Option<usize>;
}

macro_rules! impl_top_k_index {
    ($($int:ty),*) => {$(
        impl sealed::Sealed for $int {}
        impl ExpertIndex for $int {
            #[inline]
            fn position(self, num_experts: usize) -> Option<usize> {
                usize::try_from(self).ok().filter(|&position| position < num_experts)
            }
        }
    )*};
}
impl_top_k_index!(i32, i64);

/// Sorts rows by expert; rows of one expert keep their order.
///
/// # Arguments
/// * `top_k_index` - expert of each of R rows, in `0..num_experts`; row = token * k + choice.
/// * `permutation` - output, R: row at each sorted position.
/// * `inverse` - output, R: sorted position of each row.
/// * `offsets` - output, `num_experts + 1`: sorted position where each expert starts, then R.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, R exceeds `i32::MAX`, or an index is out of
/// range; the outputs then hold nothing useful.
///
/// ```
/// let (mut permutation, mut inverse, mut offsets) = ([0; 4], [0; 4], [0; 4]);
/// moeft_core::routing::bucket(&[2i64, 0, 2, 0], 3, &mut permutation, &mut inverse, &mut offsets)?;
/// assert_eq!(permutation, [1, 3, 0, 2]);
/// assert_eq!(inverse, [2, 0, 3, 1]);
/// assert_eq!(offsets, [0, 2, 2, 4]);
/// # Ok::<(), moeft_core::Error>(())
/// ```
pub fn bucket<I: ExpertIndex>(
    top_k_index: &[I],
    num_experts: usize,
    permutation: &mut [i64],
    inverse: &mut [i64],
    offsets: &mut [i32],
) -> Result<()> {
    let rows = top_k_index.len();
    check_lengths(rows, num_experts, permutation.len(), inverse.len(), offsets.len())?;

    offsets.fill(0);
    for (row, &index) in top_k_index.iter().enumerate() {
        let Some(expert) = index.position(num_experts) else {
            let expected = format!("an expert in 0..{num_experts}");
            return Err(Error::invalid("top_k_index", format!("{index} at row {row}"), expected));
        };
        offsets[expert + 1] += 1;
    }
    for expert in 0..num_experts {
        offsets[expert + 1] += offsets[expert];
    }

    // While rows are placed, offsets[e] is the next free position of expert e; in the end that is
    // the start of e + 1, so one shift restores the starts without a second array.
    for (row, &index) in top_k_index.iter().enumerate() {
        let expert = index.position(num_experts).expect("checked in the first pass");
        let position = offsets[expert];
        offsets[expert] += 1;
        permutation[position as usize] = row as i64;
        inverse[row] = i64::from(position);
    }
    offsets.copy_within(..num_experts, 1);
    offsets[0] = 0;
    Ok(())
}

fn check_lengths(rows: usize, num_experts: usize, permutation: usize, inverse: usize, offsets: usize) -> Result<()> {
    if i32::try_from(rows).is_err() {
        return Err(Error::invalid("top_k_index", format!("{rows} long"), format!("at most {} rows", i32::MAX)));
    }
    let expected = [
        ("permutation", permutation, rows),
        ("inverse", inverse, rows),
        ("offsets", offsets, num_experts.saturating_add(1)),
    ];
    for (name, found, wanted) in expected {
        if found != wanted {
            return Err(Error::invalid(name, format!("{found} long"), wanted));
        }
    }
    Ok(())
}
