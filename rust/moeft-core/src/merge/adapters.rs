//! Which tensor of the base gets which deltas of the adapters.

use std::collections::BTreeMap;

use serde::Serialize;

use super::recipe::Rounding;
use crate::adapter::{Adapter, AdapterError, Pair, Target};
use crate::checkpoint::{CheckpointError, Tensor};
use crate::names::{DiskNames, Stack, StackOnDisk};
use crate::Result;

/// One adapter's pair of factors that acts on a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Delta {
    /// Index among the adapters.
    pub adapter: usize,
    /// Index into [`Adapter::pairs`].
    pub pair: usize,
}

/// What happens to one tensor on disk, seen as `experts` matrices of `[rows, cols]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Patch {
    /// First expert of the factors that the tensor holds.
    pub first_expert: u64,
    /// Number of matrices in the tensor.
    pub experts: u64,
    /// First row of the factors' B that the tensor holds: up is below gate.
    pub first_row: u64,
    /// Rows of one matrix.
    pub rows: u64,
    /// Columns of one matrix.
    pub cols: u64,
    /// Whether a matrix is `[in, out]`: the transpose of the delta is added.
    pub transposed: bool,
    /// Experts that the factors were made for; 1 for a Linear.
    pub factor_experts: u64,
    /// What is added, in the order of the recipe.
    pub deltas: Vec<Delta>,
    /// How often the result is rounded.
    pub rounding: Rounding,
}

/// What one adapter adds, by name of the tensor on disk.
///
/// # Errors
/// [`CheckpointError`], [`AdapterError`]: every pair of factors must have its tensor, of the right shape.
pub fn patches(
    names: &DiskNames<'_>,
    adapters: &[Adapter],
    adapter: usize,
    rounding: Rounding,
) -> Result<BTreeMap<String, Patch>> {
    let mut patches = BTreeMap::new();
    for (pair_index, pair) in adapters[adapter].pairs.iter().enumerate() {
        let delta = Delta { adapter, pair: pair_index };
        assign(&mut patches, names, &adapters[adapter], pair, delta, rounding)?;
    }
    Ok(patches)
}

fn assign(
    patches: &mut BTreeMap<String, Patch>,
    names: &DiskNames<'_>,
    adapter: &Adapter,
    pair: &Pair,
    delta: Delta,
    rounding: Rounding,
) -> Result<()> {
    let no_target =
        |name: String| AdapterError::NoTarget { path: adapter.path.clone(), module: pair.module.clone(), name };
    let mut add = |tensor: Tensor<'_>, patch: Patch| {
        patches.entry(tensor.info.name.clone()).or_insert(patch).deltas.push(delta);
    };
    match pair.target {
        Target::Linear | Target::Parameter => {
            let rounding = if pair.target == Target::Linear { Rounding::Single } else { rounding };
            let name = format!("{}.weight", pair.module);
            let tensor = names.weight(&pair.module).ok_or_else(|| no_target(name))?;
            let [rows, cols] = shape(&tensor, "[out, in]")?;
            check_factors(adapter, pair, &tensor, [1, rows, cols])?;
            add(
                tensor,
                Patch {
                    first_expert: 0,
                    experts: 1,
                    first_row: 0,
                    rows,
                    cols,
                    transposed: false,
                    factor_experts: 1,
                    deltas: vec![],
                    rounding,
                },
            );
        }
        Target::Experts(stack) => {
            let name = format!("{}.{}", pair.module, stack.parameter());
            match names.stack(&pair.module, stack)?.ok_or_else(|| no_target(name))? {
                StackOnDisk::Fused(tensor) => {
                    let transposed = names.family.layout.transposed;
                    let axes = if transposed { "[experts, in, out]" } else { "[experts, out, in]" };
                    let [experts, rows, cols] = shape(&tensor, axes)?;
                    let [outputs, inputs] = if transposed { [cols, rows] } else { [rows, cols] };
                    check_factors(adapter, pair, &tensor, [experts, outputs, inputs])?;
                    add(
                        tensor,
                        Patch {
                            first_expert: 0,
                            experts,
                            first_row: 0,
                            rows,
                            cols,
                            transposed,
                            factor_experts: experts,
                            deltas: vec![],
                            rounding,
                        },
                    );
                }
                StackOnDisk::PerExpert(tensors) => {
                    let experts = tensors.len() as u64;
                    for (expert, parts) in (0..).zip(tensors) {
                        let [rows, cols] = shape(&parts[0], "[out, in]")?;
                        let total = if stack == Stack::GateUp { 2 * rows } else { rows };
                        check_factors(adapter, pair, &parts[0], [experts, total, cols])?;
                        for (part, tensor) in (0..).zip(parts) {
                            let found: [u64; 2] = shape(&tensor, "[out, in]")?;
                            if found != [rows, cols] {
                                return Err(unexpected(&tensor, &format!("[{rows}, {cols}] as the gate")).into());
                            }
                            add(
                                tensor,
                                Patch {
                                    first_expert: expert,
                                    experts: 1,
                                    first_row: part * rows,
                                    rows,
                                    cols,
                                    transposed: false,
                                    factor_experts: experts,
                                    deltas: vec![],
                                    rounding,
                                },
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// The shape of a weight with N axes.
fn shape<const N: usize>(tensor: &Tensor<'_>, expected: &str) -> Result<[u64; N]> {
    let shape = <[u64; N]>::try_from(tensor.info.shape.as_slice()).ok().filter(|_| tensor.info.dtype.is_weight());
    shape.ok_or_else(|| unexpected(tensor, &format!("{expected} of F32, BF16 or F16")).into())
}

fn unexpected(tensor: &Tensor<'_>, expected: &str) -> CheckpointError {
    CheckpointError::UnexpectedTensor {
        name: tensor.info.name.clone(),
        actual: format!("{} {:?}", tensor.info.dtype, tensor.info.shape),
        expected: expected.to_string(),
        advice: "merge into the 16-bit base model",
    }
}

/// Checks both factors against a weight that maps `inputs` to `outputs`.
fn check_factors(
    adapter: &Adapter,
    pair: &Pair,
    tensor: &Tensor<'_>,
    [experts, outputs, inputs]: [u64; 3],
) -> Result<()> {
    let rank = pair.rank;
    let factor_rows = experts.saturating_mul(rank);
    for (key, expected) in [(&pair.a, [factor_rows, inputs]), (&pair.b, [outputs, factor_rows])] {
        let actual = &adapter.tensor(key).info.shape;
        if *actual != expected {
            return Err(AdapterError::Shape {
                path: adapter.path.clone(),
                key: key.clone(),
                actual: actual.clone(),
                expected: expected.to_vec(),
                tensor: tensor.info.name.clone(),
                shape: tensor.info.shape.clone(),
                rank,
            }
            .into());
        }
    }
    Ok(())
}
