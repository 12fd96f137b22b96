//! Tokens through their experts.

use std::sync::Mutex;

use super::block::{Block, Routing};
use super::gate::Pairs;
use super::linear::{scale_rows, ExpertLinear};
use crate::gemm::{check_len, tasks, Floats, FloatsMut, Lanes, Rows};
use crate::isa::Isa;
use crate::{parallel, Result};

/// Sends every token through its experts and adds up the weighted results, in order of the experts.
///
/// # Arguments
/// * `x` - `[T, H]` tokens.
/// * `h` - output, `[R, 2I]` inputs of the activation by sorted position, which [`backward`](super::backward()) needs;
///   `None` if there is none. What the activation gets is rounded to its type, so that backward sees the same.
/// * `out` - output, `[T, H]`.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if a length does not fit, the routing is none, or
/// [`Isa::active`] has none to offer.
pub fn forward(
    block: &Block<'_>,
    routing: &Routing<'_>,
    x: Floats<'_>,
    h: Option<FloatsMut<'_>>,
    out: FloatsMut<'_>,
) -> Result<()> {
    let isa = Isa::active()?;
    let (hidden, inner) = (block.hidden(), block.inner());
    routing.check(block, &[("x", x.len()), ("out", out.len())])?;
    if let Some(h) = &h {
        check_len("h", h.len(), routing.permutation.len() * 2 * inner)?;
    }
    let tasks = tasks(routing.offsets);
    let precision = h.as_ref().map_or(out.precision(), FloatsMut::precision);
    let h_parts: Option<Vec<_>> =
        h.map(|h| h.split(tasks.iter().map(|task| task.rows.len() * 2 * inner)).into_iter().map(Mutex::new).collect());
    let pairs = Pairs { inner, interleaved: block.interleaved };

    let work = |index: usize, slot: &mut Slot| {
        let task = &tasks[index];
        let source = |i: usize| routing.token(task.rows.start + i);
        slot.x.load(isa, x, (task.rows.len(), hidden), source, &mut slot.rows);
        let up = ExpertLinear::new(&block.gate_up, block.gate_up_lora.as_ref(), task.group, &mut slot.b);
        up.forward(isa, &slot.x, &mut slot.h, &mut slot.low_rank, &mut slot.panel);
        slot.h.round(precision);
        if let Some(parts) = &h_parts {
            let mut part = parts[index].lock().expect("one worker per task");
            slot.h.unload(isa, &mut slot.rows, |i, row| part.write(i * row.len(), row));
        }
        slot.act.reshape(task.rows.len(), inner);
        let blocks = slot.act.lanes_mut().chunks_exact_mut(inner.max(1));
        for (h, act) in slot.h.blocks().zip(blocks) {
            block.gate.forward(isa, pairs, h, act);
        }
        let down = ExpertLinear::new(&block.down, block.down_lora.as_ref(), task.group, &mut slot.b);
        down.forward(isa, &slot.act, &mut slot.y, &mut slot.low_rank, &mut slot.panel);
        routing.weight_lanes(task, &mut slot.weights);
        scale_rows(&mut slot.y, &slot.weights);
        slot.result.clear();
        slot.y.unload(isa, &mut slot.rows, |_, row| slot.result.extend_from_slice(row));
    };
    out.accumulate(|sums| {
        parallel::ordered(tasks.len(), work, |index, slot: &mut Slot| {
            for (position, row) in tasks[index].rows.clone().zip(slot.result.chunks_exact(hidden)) {
                add(&mut sums[routing.token(position) * hidden..][..hidden], row);
            }
        });
    });
    Ok(())
}

/// Memory of a task.
#[derive(Default)]
struct Slot {
    x: Rows,
    h: Rows,
    act: Rows,
    y: Rows,
    low_rank: Rows,
    weights: Vec<Lanes>,
    /// Weighted results, row after row.
    result: Vec<f32>,
    b: Vec<f32>,
    panel: Vec<f32>,
    rows: Vec<f32>,
}

/// Adds `row` to `sum`.
pub(super) fn add(sum: &mut [f32], row: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += value;
    }
}
