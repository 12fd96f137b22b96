//! Rows times a weight, panel by panel.

use super::dispatch;
use super::few::{multiply_few, MOST_ROWS};
use super::matrix::Matrix;
use super::rows::{Lanes, Rows};
use super::vector::Panel;
use crate::isa::Isa;

/// Which side of the weight the rows come in on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `x W^T`, as `nn.Linear` applies a weight: rows of `cols` values become rows of `rows` values.
    Columns,
    /// `g W`, the gradient of the rows: rows of `rows` values become rows of `cols` values.
    Rows,
}

/// Outputs and products per output of a panel: 128 KiB of f32, which stays in the L2 cache while all rows pass
/// by, and whose slice of the rows (256 lanes of 64 bytes) stays in the L1 cache while all outputs pass by.
const PANEL_OUTPUTS: usize = 128;
const PANEL_STEPS: usize = 256;

/// Multiplies rows by a weight.
///
/// # Arguments
/// * `x` - rows, as wide as the side of `weight` that they come in on.
/// * `out` - output; with `accumulate` it has the right shape and is added to, else it is reshaped.
/// * `scratch` - memory for one panel, kept for reuse.
///
/// # Panics
/// If widths do not fit: our own mistake.
pub fn multiply(
    isa: Isa,
    x: &Rows,
    weight: &Matrix<'_>,
    side: Side,
    out: &mut Rows,
    accumulate: bool,
    scratch: &mut Vec<f32>,
) {
    let (steps, outputs) = match side {
        Side::Columns => (weight.cols, weight.rows),
        Side::Rows => (weight.rows, weight.cols),
    };
    assert_eq!(x.width(), steps);
    if accumulate {
        assert_eq!((out.count(), out.width()), (x.count(), outputs));
    } else {
        out.reshape(x.count(), outputs);
    }
    let few = (1..=MOST_ROWS).contains(&x.count());
    if !accumulate && (few || steps == 0) {
        out.lanes_mut().fill(Lanes::default());
    }
    if few {
        return multiply_few(isa, x, weight, side, out, scratch);
    }
    scratch.resize(PANEL_OUTPUTS * PANEL_STEPS, 0.0);
    for first_output in (0..outputs).step_by(PANEL_OUTPUTS) {
        let output_range = first_output..outputs.min(first_output + PANEL_OUTPUTS);
        for first_step in (0..steps).step_by(PANEL_STEPS) {
            let step_range = first_step..steps.min(first_step + PANEL_STEPS);
            let (rows, cols) = match side {
                Side::Columns => (output_range.clone(), step_range.clone()),
                Side::Rows => (step_range.clone(), output_range.clone()),
            };
            let (values, distance) = weight.panel(isa, rows, cols, scratch);
            let panel = Panel { values, distance, steps: step_range, outputs: output_range.clone(), side };
            dispatch!(isa, multiply_panel(x, &panel, out, accumulate || first_step > 0));
        }
    }
}
