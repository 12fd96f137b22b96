//! Which tensors of which file are made of which.

use std::collections::BTreeMap;

use serde::Serialize;

use super::arrangement::{Arrangement, Sizes};
use super::experts::{find, stack_name, Kind, Layer, Part};
use super::gather::{Gather, Source};
use super::Direction;
use crate::checkpoint::folder::Config;
use crate::checkpoint::{CheckpointError, Dtype, Tensor, TensorInfo, TensorSpec};
use crate::names::{DiskNames, Stack};
use crate::Result;

/// A tensor that is made of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Output {
    /// Name, type and shape.
    pub spec: TensorSpec,
    /// File that it goes into.
    pub file: String,
    /// What fills it, one after the other: every expert of a stack, or one matrix.
    pub(crate) gathers: Vec<Gather>,
}

/// Everything that changes; what is not named here is copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// What is done.
    pub direction: Direction,
    /// Tensors to make, sorted by layer.
    pub outputs: Vec<Output>,
    /// Names of the tensors that they are made of, with the layer each belongs to.
    pub consumed: BTreeMap<String, String>,
}

impl Plan {
    /// Plans the change for a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError`] if the checkpoint has no experts, has them in the new layout or in both, if one is missing, or
    /// if shapes or types do not agree.
    pub fn new(names: &DiskNames<'_>, config: &Config, direction: Direction) -> Result<Self> {
        let layers = find(names)?;
        check_direction(&layers, names, direction)?;
        let hidden = config.text_field("hidden_size").and_then(serde_json::Value::as_u64);
        let mut plan = Self { direction, outputs: Vec::new(), consumed: BTreeMap::new() };
        for (prefix, layer) in &layers {
            let context = Context { names, prefix, layer, hidden, arrangement: Arrangement::of(names.family) };
            match direction {
                Direction::Fuse => context.fuse(&mut plan)?,
                Direction::Unfuse => context.unfuse(&mut plan)?,
            }
        }
        Ok(plan)
    }
}

/// Every layer must have its experts in the old layout and only there.
fn check_direction(layers: &BTreeMap<&str, Layer<'_>>, names: &DiskNames<'_>, direction: Direction) -> Result<()> {
    let fused = layers.values().find_map(|layer| layer.fused.values().next());
    let single = layers.values().find_map(|layer| layer.per_expert.values().flat_map(BTreeMap::values).next());
    let (old, new, [old_word, new_word]) = match direction {
        Direction::Fuse => (single, fused, ["per expert", "fused"]),
        Direction::Unfuse => (fused, single, ["fused", "per expert"]),
    };
    let (name, actual, expected, advice) = match (old, new) {
        (Some(_), None) => return Ok(()),
        (Some(old), Some(new)) => (
            new.info.name.clone(),
            format!("{new_word} already"),
            format!("{old_word} as {}", old.info.name),
            "the layouts are mixed; download or copy the checkpoint again",
        ),
        (None, Some(new)) => {
            (new.info.name.clone(), format!("{new_word} already"), old_word.to_string(), "nothing is left to do")
        }
        (None, None) => {
            let family = names.family;
            let below = stack_name(family, Stack::GateUp, Kind::Weight);
            let name = format!("{}.0.{below} or {}", family.layers, Part::Gate.name(family, Kind::Weight, 0));
            let cause = "no layer has experts under the names of this family; is it a dense or a packed model?".into();
            return Err(CheckpointError::MissingTensor { name, cause }.into());
        }
    };
    Err(CheckpointError::UnexpectedTensor { name, actual, expected, advice }.into())
}

/// One layer and what is known about it.
struct Context<'c, 'a> {
    names: &'c DiskNames<'a>,
    prefix: &'c str,
    layer: &'c Layer<'a>,
    hidden: Option<u64>,
    arrangement: Arrangement,
}

impl<'a> Context<'_, 'a> {
    fn unfuse(&self, plan: &mut Plan) -> Result<()> {
        let weight = self.stack(Stack::GateUp, Kind::Weight)?;
        let &[experts, rows, inputs] = weight.info.shape.as_slice() else {
            return Err(mismatch(weight, "[experts, 2 * intermediate, hidden]".into()));
        };
        let (rows, inputs) = if self.arrangement.transposed { (inputs, rows) } else { (rows, inputs) };
        let experts = self.experts(experts, weight)?;
        let gate = Sizes { parts: 2, outputs: rows / 2, inputs: self.inputs(inputs, weight)? };
        for (stack, kind) in self.present() {
            let (tensor, sizes) = (self.stack(stack, kind)?, sizes_of(gate, stack, kind));
            check(tensor, weight.info.dtype, &self.arrangement.shape(experts, sizes, kind == Kind::Bias))?;
            plan.consumed.insert(tensor.info.name.clone(), self.prefix.to_string());
            let strides = self.arrangement.strides(sizes);
            for expert in 0..experts {
                for (index, part) in (0..).zip(Part::of(stack)) {
                    let name = format!("{}{}", self.prefix, part.name(self.names.family, kind, expert));
                    let first = expert * sizes.elements() + index * strides.part;
                    let sizes = Sizes { parts: 1, ..sizes };
                    let source = Source { tensor: tensor.info.name.clone(), first, strides };
                    plan.outputs.push(Output {
                        spec: TensorSpec { name, dtype: tensor.info.dtype, shape: matrix_shape(sizes, kind) },
                        file: tensor.shard.name.clone(),
                        gathers: vec![Gather { sizes, sources: vec![source], target: sizes.matrix() }],
                    });
                }
            }
        }
        Ok(())
    }

    fn fuse(&self, plan: &mut Plan) -> Result<()> {
        let gates = self.layer.per_expert.get(&(Part::Gate, Kind::Weight));
        let last =
            self.layer.per_expert.values().filter_map(|experts| experts.last_key_value()).max_by_key(|last| last.0);
        let (&last, found) = last.expect("a layer is listed for its tensors");
        let experts = self.experts(last.saturating_add(1), *found)?;
        let weight = *gates.and_then(|gates| gates.get(&0)).ok_or_else(|| self.missing(Part::Gate, Kind::Weight, 0))?;
        let &[outputs, inputs] = weight.info.shape.as_slice() else {
            return Err(mismatch(weight, "[intermediate, hidden]".into()));
        };
        let gate = Sizes { parts: 2, outputs, inputs: self.inputs(inputs, weight)? };
        for (stack, kind) in self.present() {
            let sizes = sizes_of(gate, stack, kind);
            let target = self.arrangement.strides(sizes);
            let mut gathers = Vec::new();
            let mut file = None;
            for expert in 0..experts {
                let mut sources = Vec::with_capacity(Part::of(stack).len());
                for &part in Part::of(stack) {
                    let found = self.layer.per_expert.get(&(part, kind)).and_then(|experts| experts.get(&expert));
                    let tensor = *found.ok_or_else(|| self.missing(part, kind, expert))?;
                    check(tensor, weight.info.dtype, &matrix_shape(sizes, kind))?;
                    plan.consumed.insert(tensor.info.name.clone(), self.prefix.to_string());
                    file.get_or_insert_with(|| tensor.shard.name.clone());
                    sources.push(Source { tensor: tensor.info.name.clone(), first: 0, strides: sizes.matrix() });
                }
                gathers.push(Gather { sizes, sources, target });
            }
            let shape = self.arrangement.shape(experts, sizes, kind == Kind::Bias);
            let name = format!("{}{}", self.prefix, stack_name(self.names.family, stack, kind));
            let spec = TensorSpec { name, dtype: weight.info.dtype, shape };
            plan.outputs.push(Output { spec, file: file.expect("at least one expert"), gathers });
        }
        Ok(())
    }

    /// The stacks that the layer must have: both weights, and both biases if it or the family has any.
    fn present(&self) -> impl Iterator<Item = (Stack, Kind)> {
        let fused = self.layer.fused.keys().map(|key| key.1);
        let mut found = fused.chain(self.layer.per_expert.keys().map(|key| key.1));
        let has_bias = self.names.family.layout.biased || found.any(|kind| kind == Kind::Bias);
        let kinds = Kind::ALL.into_iter().filter(move |&kind| kind == Kind::Weight || has_bias);
        kinds.flat_map(|kind| Stack::ALL.map(|stack| (stack, kind)))
    }

    fn stack(&self, stack: Stack, kind: Kind) -> Result<Tensor<'a>> {
        self.layer.fused.get(&(stack, kind)).copied().ok_or_else(|| {
            let name = format!("{}{}", self.prefix, stack_name(self.names.family, stack, kind));
            let cause = "the layer has other stacks of experts; download or copy the checkpoint again".into();
            CheckpointError::MissingTensor { name, cause }.into()
        })
    }

    fn missing(&self, part: Part, kind: Kind, expert: u64) -> CheckpointError {
        let name = format!("{}{}", self.prefix, part.name(self.names.family, kind, expert));
        let cause = "the layer has other experts or projections; download or copy the checkpoint again".into();
        CheckpointError::MissingTensor { name, cause }
    }

    /// The number of experts, which config.json must confirm where it has it.
    fn experts(&self, found: u64, tensor: Tensor<'_>) -> Result<u64> {
        match self.names.num_experts {
            Some(expected) if expected != found => Err(CheckpointError::UnexpectedTensor {
                name: tensor.info.name.clone(),
                actual: format!("of {found} experts"),
                expected: format!("{expected} as config.json says"),
                advice: "config.json and weights are of different checkpoints",
            }
            .into()),
            _ => Ok(found),
        }
    }

    /// The hidden size, which config.json must confirm where it has it: it tells a transposed stack from a plain one.
    fn inputs(&self, found: u64, tensor: Tensor<'_>) -> Result<u64> {
        match self.hidden {
            Some(expected) if expected != found => {
                Err(mismatch(tensor, format!("hidden_size {expected}, not {found}")))
            }
            _ => Ok(found),
        }
    }
}

/// Sizes of a stack's matrices, from those of gate and up.
fn sizes_of(gate: Sizes, stack: Stack, kind: Kind) -> Sizes {
    let sizes = match stack {
        Stack::GateUp => gate,
        Stack::Down => Sizes { parts: 1, outputs: gate.inputs, inputs: gate.outputs },
    };
    Sizes { inputs: if kind == Kind::Bias { 1 } else { sizes.inputs }, ..sizes }
}

fn matrix_shape(sizes: Sizes, kind: Kind) -> Vec<u64> {
    match kind {
        Kind::Weight => vec![sizes.outputs, sizes.inputs],
        Kind::Bias => vec![sizes.outputs],
    }
}

fn check(tensor: Tensor<'_>, dtype: Dtype, shape: &[u64]) -> Result<()> {
    let TensorInfo { dtype: found, shape: found_shape, .. } = tensor.info;
    if dtype.is_weight() && *found == dtype && found_shape == shape && !shape.contains(&0) {
        return Ok(());
    }
    let dtype = if dtype.is_weight() { dtype.to_string() } else { "F32, BF16 or F16".into() };
    Err(mismatch(tensor, format!("{dtype} {shape:?} without empty axes, as the layer's first gate says")))
}

fn mismatch(tensor: Tensor<'_>, expected: String) -> crate::Error {
    CheckpointError::UnexpectedTensor {
        name: tensor.info.name.clone(),
        actual: format!("{} {:?}", tensor.info.dtype, tensor.info.shape),
        expected,
        advice: "is config.json that of these weights?",
    }
    .into()
}
