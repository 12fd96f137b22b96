//! One expert's weight plus its low-rank delta, forward and backward.

use super::block::Lora;
use crate::gemm::{multiply, Lanes, Matrix, Rows, Side, Stack};
use crate::isa::Isa;

/// One expert of a stack, with its factors if it has an adapter.
pub(super) struct ExpertLinear<'a> {
    weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
    transposed: bool,
    factors: Option<Factors<'a>>,
}

struct Factors<'a> {
    /// `[r, in]`.
    a: Matrix<'a>,
    /// `[out, r]`.
    b: &'a [f32],
    scaling: f32,
}

impl<'a> ExpertLinear<'a> {
    /// Expert `expert` of `stack`; its B is gathered into `b_scratch`.
    pub(super) fn new(stack: &Stack<'a>, lora: Option<&Lora<'a>>, expert: usize, b_scratch: &'a mut Vec<f32>) -> Self {
        let factors = lora.map(|lora| {
            let len = lora.rank * stack.inputs();
            b_scratch.clear();
            b_scratch.extend(lora.b.iter().skip(expert).step_by(stack.num_experts));
            Factors {
                a: Matrix::f32(&lora.a[expert * len..][..len], lora.rank, stack.inputs()),
                b: b_scratch,
                scaling: lora.scaling,
            }
        });
        Self { weight: stack.expert(expert), bias: stack.expert_bias(expert), transposed: stack.transposed, factors }
    }

    fn b(&self, factors: &Factors<'a>) -> Matrix<'a> {
        Matrix::f32(factors.b, factors.b.len() / factors.a.rows.max(1), factors.a.rows)
    }

    /// `out = x W^T + bias + scaling (x A^T) B^T`; leaves `scaling x A^T` in `low_rank`.
    pub(super) fn forward(&self, isa: Isa, x: &Rows, out: &mut Rows, low_rank: &mut Rows, panel: &mut Vec<f32>) {
        let side = if self.transposed { Side::Rows } else { Side::Columns };
        if let Some(bias) = self.bias {
            out.reshape(x.count(), bias.len());
            out.fill(bias);
        }
        multiply(isa, x, &self.weight, side, out, self.bias.is_some(), panel);
        if let Some(factors) = &self.factors {
            self.project(isa, x, low_rank, panel);
            multiply(isa, low_rank, &self.b(factors), Side::Columns, out, true, panel);
        }
    }

    /// `low_rank = scaling x A^T`. Does nothing without an adapter.
    pub(super) fn project(&self, isa: Isa, x: &Rows, low_rank: &mut Rows, panel: &mut Vec<f32>) {
        if let Some(factors) = &self.factors {
            multiply(isa, x, &factors.a, Side::Columns, low_rank, false, panel);
            scale(low_rank, factors.scaling);
        }
    }

    /// `out = g W + scaling (g B) A`; leaves `scaling g B` in `low_rank`.
    pub(super) fn backward(&self, isa: Isa, g: &Rows, out: &mut Rows, low_rank: &mut Rows, panel: &mut Vec<f32>) {
        let side = if self.transposed { Side::Columns } else { Side::Rows };
        multiply(isa, g, &self.weight, side, out, false, panel);
        if let Some(factors) = &self.factors {
            self.project_back(isa, g, low_rank, panel);
            multiply(isa, low_rank, &factors.a, Side::Rows, out, true, panel);
        }
    }

    /// Products of each row of `g` with the bias, one lane per block; empty without a bias.
    pub(super) fn bias_products<'s>(&'s self, g: &'s Rows) -> impl Iterator<Item = Lanes> + 's {
        self.bias.into_iter().flat_map(|bias| {
            g.blocks().map(move |block| {
                let mut sums = Lanes::default();
                for (lanes, bias) in block.iter().zip(bias) {
                    for (sum, value) in sums.0.iter_mut().zip(lanes.0) {
                        *sum += value * bias;
                    }
                }
                sums
            })
        })
    }

    /// `low_rank = scaling g B`. Does nothing without an adapter.
    pub(super) fn project_back(&self, isa: Isa, g: &Rows, low_rank: &mut Rows, panel: &mut Vec<f32>) {
        if let Some(factors) = &self.factors {
            multiply(isa, g, &self.b(factors), Side::Rows, low_rank, false, panel);
            scale(low_rank, factors.scaling);
        }
    }
}

fn scale(rows: &mut Rows, factor: f32) {
    rows.lanes_mut().iter_mut().flat_map(|lanes| &mut lanes.0).for_each(|value| *value *= factor);
}

/// Multiplies each row by its own factor; `factors` has one lane per block.
pub(super) fn scale_rows(rows: &mut Rows, factors: &[Lanes]) {
    let width = rows.width().max(1);
    for (block, factors) in rows.lanes_mut().chunks_exact_mut(width).zip(factors) {
        for lanes in block {
            for (value, factor) in lanes.0.iter_mut().zip(factors.0) {
                *value *= factor;
            }
        }
    }
}
