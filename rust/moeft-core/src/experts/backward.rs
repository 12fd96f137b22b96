//! Gradients of the tokens, the routing weights and the low-rank factors.

use super::block::{Block, Lora, Routing};
use super::forward::add;
use super::gate::Pairs;
use super::linear::{scale_rows, ExpertLinear};
use crate::gemm::{add_outer, check_len, tasks, Floats, FloatsMut, Lanes, Rows, Stack, Task, LANES};
use crate::isa::Isa;
use crate::{parallel, Result};

/// Gradients to compute. What is `None` is not needed.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Output, `[T, H]`.
    pub x: Option<FloatsMut<'a>>,
    /// Output, R by row.
    pub weights: &'a mut [f32],
    /// Outputs, A and B of gate_up, in their layout.
    pub gate_up_lora: Option<(&'a mut [f32], &'a mut [f32])>,
    /// Outputs, A and B of down, in their layout.
    pub down_lora: Option<(&'a mut [f32], &'a mut [f32])>,
}

/// Computes the gradients of an expert block.
///
/// With `g` the gradient of an output row before its weight and `a` its activation, the gradient of the weight is
/// `<g W, a> + <g, bias>`: the output rows are neither kept nor computed again.
///
/// # Arguments
/// * `x`, `h` - as given to and written by [`forward`](super::forward()).
/// * `grad` - `[T, H]` gradient of the output.
///
/// # Errors
/// As [`forward`](super::forward()); also if a gradient of an absent adapter is asked for.
pub fn backward(
    block: &Block<'_>,
    routing: &Routing<'_>,
    x: Floats<'_>,
    h: Floats<'_>,
    grad: Floats<'_>,
    gradients: Gradients<'_>,
) -> Result<()> {
    let isa = Isa::active()?;
    let (hidden, inner) = (block.hidden(), block.inner());
    routing.check(block, &[("x", x.len()), ("grad", grad.len())])?;
    check_len("h", h.len(), routing.permutation.len() * 2 * inner)?;
    let Gradients { x: grad_x, weights: grad_weights, gate_up_lora: mut up_grads, down_lora: mut down_grads } =
        gradients;
    if let Some(grad_x) = &grad_x {
        check_len("grad_x", grad_x.len(), x.len())?;
    }
    check_len("grad_weights", grad_weights.len(), routing.weights.len())?;
    check_factor_gradients(block.gate_up_lora.as_ref(), up_grads.as_mut())?;
    check_factor_gradients(block.down_lora.as_ref(), down_grads.as_mut())?;

    let tasks = tasks(routing.offsets);
    let pairs = Pairs { inner, interleaved: block.interleaved };
    let (needs_x, needs_up, needs_down) = (grad_x.is_some(), up_grads.is_some(), down_grads.is_some());

    let work = |index: usize, slot: &mut Slot| {
        let task = &tasks[index];
        let rows = task.rows.len();
        let token = |i: usize| routing.token(task.rows.start + i);
        routing.weight_lanes(task, &mut slot.weights);
        slot.h.load(isa, h, (rows, 2 * inner), |i| task.rows.start + i, &mut slot.rows);
        slot.g.load(isa, grad, (rows, hidden), token, &mut slot.rows);

        let down = ExpertLinear::new(&block.down, block.down_lora.as_ref(), task.group, &mut slot.b);
        down.backward(isa, &slot.g, &mut slot.grad_act, &mut slot.low_rank_g, &mut slot.panel);
        if needs_down {
            slot.act.reshape(rows, inner);
            for (h, act) in slot.h.blocks().zip(slot.act.lanes_mut().chunks_exact_mut(inner.max(1))) {
                block.gate.forward(isa, pairs, h, act);
            }
            down.project(isa, &slot.act, &mut slot.low_rank_x, &mut slot.panel);
            scale_rows(&mut slot.low_rank_x, &slot.weights);
            scale_rows(&mut slot.low_rank_g, &slot.weights);
            slot.down.outer(isa, &slot.g, &slot.low_rank_x, &slot.low_rank_g, &slot.act);
        }
        let blocks = slot.h.lanes_mut().chunks_exact_mut(2 * inner.max(1));
        slot.by_weight.clear();
        for ((h, grad_act), weights) in blocks.zip(slot.grad_act.blocks()).zip(&slot.weights) {
            slot.by_weight.push(block.gate.backward(isa, pairs, *weights, grad_act, h));
        }
        for (sums, products) in slot.by_weight.iter_mut().zip(down.bias_products(&slot.g)) {
            add(&mut sums.0, &products.0);
        }
        // `h` now holds its own gradient.
        let up = ExpertLinear::new(&block.gate_up, block.gate_up_lora.as_ref(), task.group, &mut slot.b);
        slot.result.clear();
        if needs_x {
            up.backward(isa, &slot.h, &mut slot.grad_x, &mut slot.low_rank_g, &mut slot.panel);
            slot.grad_x.unload(isa, &mut slot.rows, |_, row| slot.result.extend_from_slice(row));
        } else if needs_up {
            up.project_back(isa, &slot.h, &mut slot.low_rank_g, &mut slot.panel);
        }
        if needs_up {
            slot.x.load(isa, x, (rows, hidden), token, &mut slot.rows);
            up.project(isa, &slot.x, &mut slot.low_rank_x, &mut slot.panel);
            slot.up.outer(isa, &slot.h, &slot.low_rank_x, &slot.low_rank_g, &slot.x);
        }
    };

    for (a, b) in up_grads.iter_mut().chain(&mut down_grads) {
        a.fill(0.0);
        b.fill(0.0);
    }
    let commit = |sums: &mut [f32], task: &Task, slot: &mut Slot| {
        for (i, position) in task.rows.clone().enumerate() {
            grad_weights[routing.row(position)] = slot.by_weight[i / LANES].0[i % LANES];
        }
        for (position, row) in task.rows.clone().zip(slot.result.chunks_exact(hidden.max(1))) {
            add(&mut sums[routing.token(position) * hidden..][..hidden], row);
        }
        if let Some((a, b)) = &mut up_grads {
            slot.up.add_to(&block.gate_up, task.group, a, b);
        }
        if let Some((a, b)) = &mut down_grads {
            slot.down.add_to(&block.down, task.group, a, b);
        }
    };
    match grad_x {
        Some(grad_x) => grad_x.accumulate(|sums| run(&tasks, work, commit, sums)),
        None => run(&tasks, work, commit, &mut []),
    }
    Ok(())
}

fn run(
    tasks: &[Task],
    work: impl Fn(usize, &mut Slot) + Sync,
    mut commit: impl FnMut(&mut [f32], &Task, &mut Slot) + Send,
    sums: &mut [f32],
) {
    parallel::ordered(tasks.len(), work, |index, slot: &mut Slot| commit(sums, &tasks[index], slot));
}

fn check_factor_gradients(lora: Option<&Lora<'_>>, gradients: Option<&mut (&mut [f32], &mut [f32])>) -> Result<()> {
    if let Some((a, b)) = gradients {
        check_len("gradient of lora a", a.len(), lora.map_or(0, |lora| lora.a.len()))?;
        check_len("gradient of lora b", b.len(), lora.map_or(0, |lora| lora.b.len()))?;
    }
    Ok(())
}

/// Memory of a task.
#[derive(Default)]
struct Slot {
    x: Rows,
    h: Rows,
    g: Rows,
    act: Rows,
    grad_act: Rows,
    grad_x: Rows,
    low_rank_x: Rows,
    low_rank_g: Rows,
    weights: Vec<Lanes>,
    by_weight: Vec<Lanes>,
    up: FactorGradients,
    down: FactorGradients,
    /// Gradients of the gathered tokens, row after row.
    result: Vec<f32>,
    b: Vec<f32>,
    panel: Vec<f32>,
    rows: Vec<f32>,
}

/// Gradients of one expert's factors: A `[r, in]`, B `[out, r]`.
#[derive(Default)]
struct FactorGradients {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl FactorGradients {
    /// With `low_rank_x = scaling x A^T` and `low_rank_g = scaling g B`: dB is `g^T low_rank_x`, dA is `low_rank_g^T x`.
    fn outer(&mut self, isa: Isa, g: &Rows, low_rank_x: &Rows, low_rank_g: &Rows, x: &Rows) {
        let (rank, width) = (low_rank_x.width(), x.width());
        self.a.resize(rank * width, 0.0);
        self.b.resize(g.width() * rank, 0.0);
        let (a, b) = (&mut self.a, &mut self.b);
        add_outer(isa, x, low_rank_g, 1.0, |i, j, value| a[j * width + i] = value);
        add_outer(isa, g, low_rank_x, 1.0, |i, j, value| b[i * rank + j] = value);
    }

    /// Adds them to those of the stack, in PEFT's layout.
    fn add_to(&self, stack: &Stack<'_>, expert: usize, a: &mut [f32], b: &mut [f32]) {
        add(&mut a[expert * self.a.len()..][..self.a.len()], &self.a);
        for (sum, value) in b.iter_mut().skip(expert).step_by(stack.num_experts).zip(&self.b) {
            *sum += value;
        }
    }
}
