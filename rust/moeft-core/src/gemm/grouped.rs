//! Linear layers of many experts, over rows sorted by expert.

use std::ops::Range;
use std::sync::Mutex;

use super::floats::{Floats, FloatsMut};
use super::multiply::{multiply, Side};
use super::rows::Rows;
use super::stack::{check_len, Stack};
use crate::isa::Isa;
use crate::{parallel, Error, Result};

/// Rows of a task: enough that restoring a weight costs little beside multiplying by it.
pub(crate) const TASK_ROWS: usize = 256;

/// Multiplies each expert's block of rows by that expert's weight.
///
/// # Arguments
/// * `x` - rows sorted by expert, as wide as the side of the weights that they come in on.
/// * `offsets` - start of each expert's block, then the number of rows.
/// * `stack` - the weights, as stored: `transposed` and `bias` play no part.
/// * `out` - output, as many rows.
///
/// # Errors
/// [`Error::InvalidArgument`] if a length does not fit, the offsets do not ascend, or
/// [`Isa::active`] has none to offer.
pub fn grouped_linear(x: Floats<'_>, offsets: &[i32], stack: &Stack<'_>, side: Side, out: FloatsMut<'_>) -> Result<()> {
    let isa = Isa::active()?;
    stack.check("weight")?;
    check_len("offsets", offsets.len(), stack.num_experts.saturating_add(1))?;
    let rows = check_offsets(offsets)?;
    let (inputs, outputs) = if side == Side::Columns { (stack.cols, stack.rows) } else { (stack.rows, stack.cols) };
    check_len("x", x.len(), rows.saturating_mul(inputs))?;
    check_len("out", out.len(), rows.saturating_mul(outputs))?;
    let tasks = tasks(offsets);
    let parts = out.split(tasks.iter().map(|task| task.rows.len() * outputs));
    let parts: Vec<_> = parts.into_iter().map(Mutex::new).collect();
    let work = |index: usize, slot: &mut Slot| {
        let Task { group, rows } = &tasks[index];
        slot.x.load(isa, x, (rows.len(), inputs), |i| rows.start + i, &mut slot.rows);
        multiply(isa, &slot.x, &stack.expert(*group), side, &mut slot.y, false, &mut slot.panel);
        let mut part = parts[index].lock().expect("one worker per task");
        slot.y.unload(isa, &mut slot.rows, |i, row| part.write(i * outputs, row));
    };
    parallel::ordered(tasks.len(), work, |_, _| {});
    Ok(())
}

/// Memory of a task.
#[derive(Default)]
struct Slot {
    x: Rows,
    y: Rows,
    panel: Vec<f32>,
    rows: Vec<f32>,
}

/// Rows of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    /// The group: an expert.
    pub group: usize,
    /// Positions of the rows; never empty.
    pub rows: Range<usize>,
}

/// The rows of all groups in pieces of at most [`TASK_ROWS`]. They do not depend on the number of threads.
pub(crate) fn tasks(offsets: &[i32]) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (group, bounds) in offsets.windows(2).enumerate() {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        for start in (start..end).step_by(TASK_ROWS) {
            tasks.push(Task { group, rows: start..end.min(start + TASK_ROWS) });
        }
    }
    tasks
}

/// Number of rows, if `offsets` start at 0 and ascend.
pub(crate) fn check_offsets(offsets: &[i32]) -> Result<usize> {
    let ascending = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    match (offsets.first(), offsets.last()) {
        (Some(0), Some(&rows)) if ascending => Ok(rows as usize),
        _ => Err(Error::invalid("offsets", format!("{offsets:?}"), "0, then ascending ends of the groups")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_row_once_and_stay_within_a_group() {
        let found: Vec<_> = tasks(&[0, 0, 3, 600, 600]).into_iter().map(|t| (t.group, t.rows)).collect();
        assert_eq!(found, [(1, 0..3), (2, 3..259), (2, 259..515), (2, 515..600)]);
    }

    #[test]
    fn offsets_that_descend_are_refused() {
        assert!(check_offsets(&[0, 2, 1]).is_err() && check_offsets(&[]).is_err() && check_offsets(&[1, 2]).is_err());
        assert_eq!(check_offsets(&[0, 0, 7]).ok(), Some(7));
    }
}
