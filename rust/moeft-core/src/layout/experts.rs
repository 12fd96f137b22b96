//! Finds the experts of every layer, fused or not, and says what does not fit.

use std::collections::BTreeMap;

use crate::checkpoint::{CheckpointError, Tensor};
use crate::families::Family;
use crate::names::{DiskNames, Stack};
use crate::Result;

/// A projection of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Gate,
    Up,
    Down,
}

/// What a tensor holds of its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Weight,
    Bias,
}

/// The experts of one decoder layer, as they were found.
#[derive(Debug, Default)]
pub struct Layer<'a> {
    /// Stacks.
    pub fused: BTreeMap<(Stack, Kind), Tensor<'a>>,
    /// Matrices, by projection and expert.
    pub per_expert: BTreeMap<(Part, Kind), BTreeMap<u64, Tensor<'a>>>,
}

impl Part {
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// The parts of a stack, in its order.
    pub fn of(stack: Stack) -> &'static [Self] {
        match stack {
            Stack::GateUp => &[Self::Gate, Self::Up],
            Stack::Down => &[Self::Down],
        }
    }

    /// Name below the layer, `{e}` for the expert.
    fn template(self, family: &Family) -> String {
        let disk = &family.disk;
        let (own, name) = match self {
            Self::Gate => (&disk.gate, "gate_proj"),
            Self::Up => (&disk.up, "up_proj"),
            Self::Down => (&disk.down, "down_proj"),
        };
        own.clone().unwrap_or_else(|| format!("{}.{{e}}.{name}.weight", module(family)))
    }

    /// Name of an expert's tensor below the layer.
    pub fn name(self, family: &Family, kind: Kind, expert: u64) -> String {
        kind.suffixed(&self.template(family)).replace("{e}", &expert.to_string())
    }
}

impl Kind {
    pub const ALL: [Self; 2] = [Self::Weight, Self::Bias];

    /// The name of a weight, or of the bias beside it.
    fn suffixed(self, weight: &str) -> String {
        match self {
            Self::Weight => weight.to_string(),
            Self::Bias => format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight)),
        }
    }
}

/// Path of the module of all experts below the layer. A dense family has none; nothing is found under this one then.
fn module(family: &Family) -> &str {
    family.modules.experts.as_deref().unwrap_or("experts")
}

/// Name of a stack below the layer, in memory.
fn stack_in_memory(family: &Family, stack: Stack, kind: Kind) -> String {
    let suffix = if kind == Kind::Bias { "_bias" } else { "" };
    format!("{}.{}{suffix}", module(family), stack.parameter())
}

/// Name of a stack below the layer, as it is written: a family whose checkpoints have stacks may name them otherwise.
pub fn stack_name(family: &Family, stack: Stack, kind: Kind) -> String {
    let name = stack_in_memory(family, stack, kind);
    let is_stored = family.disk.gate.is_none();
    let mut renames = family.disk.renames.iter().filter(|_| is_stored);
    let on_disk = |(disk, memory): &(String, String)| Some(format!("{disk}{}", name.strip_prefix(memory.as_str())?));
    renames.find_map(on_disk).unwrap_or(name)
}

/// The experts of every layer that has some, by the prefix of the layer on disk.
///
/// # Errors
/// [`CheckpointError::UnexpectedTensor`] for a tensor of the experts that is none of these: scales of packed weights, say.
pub fn find<'a>(names: &DiskNames<'a>) -> Result<BTreeMap<&'a str, Layer<'a>>> {
    let family = names.family;
    let inside = format!("{}.", module(family));
    let stacks = Stack::ALL.into_iter().flat_map(|stack| Kind::ALL.map(|kind| (stack, kind)));
    let stacks: Vec<_> = stacks.map(|key| (key, stack_in_memory(family, key.0, key.1))).collect();
    let parts = Part::ALL.into_iter().flat_map(|part| Kind::ALL.map(|kind| (part, kind)));
    let parts: Vec<_> = parts.map(|key| (key, key.1.suffixed(&key.0.template(family)))).collect();
    let mut layers: BTreeMap<&str, Layer<'_>> = BTreeMap::new();
    for tensor in names.checkpoint.tensors() {
        let Some((prefix, below)) = split(names, tensor) else { continue };
        let in_memory = names.below_in_memory(below);
        let stack = stacks.iter().find(|(_, name)| *name == in_memory);
        let expert = || parts.iter().find_map(|(key, template)| Some((*key, expert_of(template, below)?)));
        if let Some((key, _)) = stack {
            layers.entry(prefix).or_default().fused.insert(*key, tensor);
        } else if let Some((key, expert)) = expert() {
            layers.entry(prefix).or_default().per_expert.entry(key).or_default().insert(expert, tensor);
        } else if in_memory.starts_with(&inside) {
            return Err(CheckpointError::UnexpectedTensor {
                name: tensor.info.name.clone(),
                actual: "part of the experts".into(),
                expected: format!("gate, up or down of {}", family.name),
                advice: "only plain 16- and 32-bit experts can change their layout",
            }
            .into());
        }
    }
    Ok(layers)
}

/// As [`DiskNames::split_layer`], for as long as the checkpoint lives.
fn split<'a>(names: &DiskNames<'a>, tensor: Tensor<'a>) -> Option<(&'a str, &'a str)> {
    names.split_layer(&tensor.info.name)
}

/// The expert whose name `template` gives `below`.
fn expert_of(template: &str, below: &str) -> Option<u64> {
    let (head, tail) = template.split_once("{e}")?;
    let digits = below.strip_prefix(head)?.strip_suffix(tail)?;
    // 007 and +7 parse too, but name another tensor.
    digits.parse().ok().filter(|expert: &u64| expert.to_string() == digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_is_read_from_its_name_alone() {
        let template = "mlp.experts.{e}.gate_proj.weight";
        assert_eq!(expert_of(template, "mlp.experts.12.gate_proj.weight"), Some(12));
        for other in
            ["mlp.experts.012.gate_proj.weight", "mlp.experts.+1.gate_proj.weight", "mlp.experts.1.up_proj.weight"]
        {
            assert_eq!(expert_of(template, other), None);
        }
    }
}
