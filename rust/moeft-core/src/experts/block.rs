//! What an expert block computes with, and the checks that it fits together.

use super::gate::Gate;
use crate::gemm::{check_len, check_offsets, Lanes, Stack, Task, LANES};
use crate::{Error, Result};

/// Low-rank factors of a stack, in PEFT's layout.
#[derive(Debug, Clone, Copy)]
pub struct Lora<'a> {
    /// `[E * r, in]`, row `e * r + j`.
    pub a: &'a [f32],
    /// `[out, r * E]`, column `j * E + e`.
    pub b: &'a [f32],
    /// r.
    pub rank: usize,
    /// The delta of an expert is `scaling * B A`.
    pub scaling: f32,
}

impl Lora<'_> {
    fn check(&self, stack: &Stack<'_>) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::invalid("lora rank", 0, "at least 1"));
        }
        let factors = self.rank.saturating_mul(stack.num_experts);
        check_len("lora a", self.a.len(), factors.saturating_mul(stack.inputs()))?;
        check_len("lora b", self.b.len(), factors.saturating_mul(stack.outputs()))
    }
}

/// Frozen weights, adapters and activation of an expert block.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    /// Outputs 2I, inputs H.
    pub gate_up: Stack<'a>,
    /// Outputs H, inputs I.
    pub down: Stack<'a>,
    /// Activation.
    pub gate: Gate,
    /// Whether gate and up outputs alternate, instead of all gates first.
    pub interleaved: bool,
    /// Added to gate_up.
    pub gate_up_lora: Option<Lora<'a>>,
    /// Added to down.
    pub down_lora: Option<Lora<'a>>,
}

impl Block<'_> {
    /// H.
    pub fn hidden(&self) -> usize {
        self.gate_up.inputs()
    }

    /// I.
    pub fn inner(&self) -> usize {
        self.down.inputs()
    }

    fn check(&self) -> Result<()> {
        self.gate_up.check("gate_up")?;
        self.down.check("down")?;
        let found = (self.gate_up.num_experts, self.gate_up.outputs(), self.gate_up.inputs());
        let wanted = (self.down.num_experts, self.inner().saturating_mul(2), self.down.outputs());
        if found != wanted {
            let expected = format!("{wanted:?} to go with down");
            return Err(Error::invalid("gate_up (experts, outputs, inputs)", format!("{found:?}"), expected));
        }
        self.gate_up_lora.map_or(Ok(()), |lora| lora.check(&self.gate_up))?;
        self.down_lora.map_or(Ok(()), |lora| lora.check(&self.down))
    }
}

/// Which token goes to which expert, as [`routing::bucket`](crate::routing::bucket) sorts it.
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a> {
    /// Row `token * k + choice` at each sorted position, R.
    pub permutation: &'a [i64],
    /// Sorted position where each expert starts, then R.
    pub offsets: &'a [i32],
    /// Weight of each row, R, by row.
    pub weights: &'a [f32],
    /// k.
    pub top_k: usize,
}

impl Routing<'_> {
    /// Row at a sorted position.
    pub(super) fn row(&self, position: usize) -> usize {
        self.permutation[position] as usize
    }

    /// Token at a sorted position.
    pub(super) fn token(&self, position: usize) -> usize {
        self.row(position) / self.top_k
    }

    /// Routing weights of a task's rows, one lane per block; zero beyond the last row.
    pub(super) fn weight_lanes(&self, task: &Task, lanes: &mut Vec<Lanes>) {
        lanes.clear();
        lanes.resize(task.rows.len().div_ceil(LANES), Lanes::default());
        for (i, position) in task.rows.clone().enumerate() {
            lanes[i / LANES].0[i % LANES] = self.weights[self.row(position)];
        }
    }

    /// Checks the routing, the block, and `rows_of_tokens`, named lengths that must be `[T, H]`; what passes cannot
    /// index out of bounds.
    pub(super) fn check(&self, block: &Block<'_>, rows_of_tokens: &[(&'static str, usize)]) -> Result<()> {
        block.check()?;
        let tokens = self.weights.len() / self.top_k.max(1);
        for &(name, len) in rows_of_tokens {
            check_len(name, len, tokens.saturating_mul(block.hidden()))?;
        }
        let rows = tokens.saturating_mul(self.top_k);
        check_len("permutation", self.permutation.len(), rows)?;
        check_len("weights", self.weights.len(), rows)?;
        check_len("offsets", self.offsets.len(), block.gate_up.num_experts.saturating_add(1))?;
        check_len("rows of offsets", check_offsets(self.offsets)?, rows)?;
        match self.permutation.iter().find(|&&row| row < 0 || row as usize >= rows) {
            Some(row) => Err(Error::invalid("permutation", row, format!("rows in 0..{rows}"))),
            None => Ok(()),
        }
    }
}
