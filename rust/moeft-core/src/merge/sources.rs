//! Where another checkpoint holds the values of a tensor of the base: under the same name or another, whole or in pieces.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::checkpoint::folder::Config;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Tensor};
use crate::families::Family;
use crate::layout::experts::{find, Layer, Part};
use crate::layout::Arrangement;
use crate::names::{DiskNames, Stack};
use crate::Result;

/// The values of a tensor of the output in one checkpoint: pieces that follow each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Type of all pieces.
    pub dtype: Dtype,
    /// From the first element to the last.
    pub pieces: Vec<Piece>,
}

/// Elements of one tensor on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Name on disk.
    pub tensor: String,
    /// First element, counted in that tensor.
    pub first: u64,
    /// First element, counted in the tensor of the output.
    pub start: u64,
    /// Elements.
    pub count: u64,
}

impl Source {
    /// A whole tensor.
    pub fn whole(tensor: Tensor<'_>) -> Self {
        let count = tensor.info.shape.iter().product();
        let piece = Piece { tensor: tensor.info.name.clone(), first: 0, start: 0, count };
        Self { dtype: tensor.info.dtype, pieces: vec![piece] }
    }

    /// Reads elements from `start` on, as many as fit into `buffer`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read_at(&self, checkpoint: &Checkpoint, start: u64, buffer: &mut [u8]) -> Result<()> {
        let size = u64::from(self.dtype.bits()) / 8;
        let mut rest = buffer;
        let mut place = start;
        let from = self.pieces.partition_point(|piece| piece.start + piece.count <= start);
        for piece in &self.pieces[from..] {
            if rest.is_empty() {
                break;
            }
            let count = (piece.start + piece.count - place).min(rest.len() as u64 / size);
            let (part, later) = rest.split_at_mut((count * size) as usize);
            let tensor = checkpoint.get(&piece.tensor).expect("the plan names what the checkpoint holds");
            tensor.read_at(part, (piece.first + place - piece.start) * size)?;
            place += count;
            rest = later;
        }
        Ok(())
    }
}

/// Finds the tensors of a base in another checkpoint of its family.
pub struct Finder<'a> {
    base: &'a DiskNames<'a>,
    other: DiskNames<'a>,
    arrangement: Arrangement,
    is_tied: bool,
    /// Experts by number of the layer, where a name was not found; `None` until then.
    experts: Option<[BTreeMap<u64, Layer<'a>>; 2]>,
}

impl<'a> Finder<'a> {
    /// Finds in `other`, whose configuration is `config`.
    pub fn new(base: &'a DiskNames<'a>, other: &'a Checkpoint, family: &'a Family, config: &Config) -> Self {
        let is_tied = config.text_field("tie_word_embeddings").and_then(serde_json::Value::as_bool).unwrap_or(false);
        let (other, arrangement) = (DiskNames::new(other, family, config), Arrangement::of(family));
        Self { base, other, arrangement, is_tied, experts: None }
    }

    /// What the names of the text model start with, if the checkpoint is multimodal.
    pub fn text_prefix(&self) -> Option<&'a str> {
        self.other.text_prefix()
    }

    /// The values of a tensor of the base; `None` if the checkpoint has none.
    ///
    /// # Errors
    /// [`CheckpointError::UnexpectedTensor`] if they have another shape or are no weights.
    pub fn source(&mut self, tensor: Tensor<'a>) -> Result<Option<Source>> {
        let name = &tensor.info.name;
        let mut found = self.other.counterpart(self.base, name);
        if found.is_none() && self.is_tied && name == "lm_head.weight" {
            found = self.other.weight("model.embed_tokens");
        }
        if let Some(found) = found {
            let is_same_kind = found.info.dtype == tensor.info.dtype
                || (found.info.dtype.is_weight() && tensor.info.dtype.is_weight());
            if found.info.shape != tensor.info.shape || !is_same_kind {
                return Err(self.mismatch(found, tensor));
            }
            return Ok(Some(Source::whole(found)));
        }
        self.through_experts(tensor)
    }

    /// Puts a stack together of experts, or takes an expert out of a stack.
    fn through_experts(&mut self, tensor: Tensor<'a>) -> Result<Option<Source>> {
        let Some(number) = self.base.layer_number(&tensor.info.name) else { return Ok(None) };
        if self.experts.is_none() {
            self.experts = Some([layers(self.base)?, layers(&self.other)?]);
        }
        let [base, other] = self.experts.as_ref().expect("just filled");
        let (Some(base), Some(other)) = (base.get(&number), other.get(&number)) else { return Ok(None) };
        let is_this = |found: &Tensor<'_>| found.info.name == tensor.info.name;
        if let Some((&(stack, kind), _)) = base.fused.iter().find(|(_, found)| is_this(found)) {
            let parts = Part::of(stack).iter().map(|&part| other.per_expert.get(&(part, kind)));
            let Some(parts) = parts.collect::<Option<Vec<_>>>() else { return Ok(None) };
            let mut pieces = Vec::new();
            let count = tensor.info.shape.iter().product::<u64>() / (parts.len() as u64 * parts[0].len() as u64).max(1);
            for expert in 0..parts[0].len() as u64 {
                for part in &parts {
                    let Some(found) = part.get(&expert) else { return Ok(None) };
                    pieces.push((*found, 0, count));
                }
            }
            return self.joined(tensor, &pieces).map(Some);
        }
        let by_part = base.per_expert.iter().find_map(|(&key, experts)| {
            experts.iter().find(|(_, found)| is_this(found)).map(|(&expert, _)| (key, expert))
        });
        let Some(((part, kind), expert)) = by_part else { return Ok(None) };
        let stack = if part == Part::Down { Stack::Down } else { Stack::GateUp };
        let Some(&found) = other.fused.get(&(stack, kind)) else { return Ok(None) };
        let (count, parts) = (tensor.info.shape.iter().product::<u64>(), Part::of(stack));
        let index = parts.iter().position(|&other| other == part).expect("a stack has the part") as u64;
        let experts = base.per_expert[&(part, kind)].len() as u64;
        if found.info.shape.iter().product::<u64>() != count * parts.len() as u64 * experts {
            return Err(self.mismatch(found, tensor));
        }
        self.joined(tensor, &[(found, (expert * parts.len() as u64 + index) * count, count)]).map(Some)
    }

    /// Pieces that follow each other, if the family lays its stacks out so.
    fn joined(&self, tensor: Tensor<'_>, parts: &[(Tensor<'_>, u64, u64)]) -> Result<Source> {
        if self.arrangement != Arrangement::default() {
            let name = parts[0].0.info.name.clone();
            let expected =
                format!("as {} in the base: this family transposes or interleaves its stacks", tensor.info.name);
            let (actual, advice) =
                ("in the other layout of experts".into(), "bring it into the base's layout with `moeft layout`");
            return Err(CheckpointError::UnexpectedTensor { name, actual, expected, advice }.into());
        }
        let dtype = parts[0].0.info.dtype;
        let mut pieces = Vec::with_capacity(parts.len());
        for (index, &(part, first, count)) in (0..).zip(parts) {
            let held = part.info.shape.iter().product::<u64>();
            if part.info.dtype != dtype
                || !dtype.is_weight()
                || first + count > held
                || (parts.len() > 1 && held != count)
            {
                return Err(self.mismatch(part, tensor));
            }
            pieces.push(Piece { tensor: part.info.name.clone(), first, start: index * count, count });
        }
        Ok(Source { dtype, pieces })
    }

    fn mismatch(&self, found: Tensor<'_>, tensor: Tensor<'_>) -> crate::Error {
        CheckpointError::UnexpectedTensor {
            name: format!("{} in {}", found.info.name, display(&self.other.checkpoint.path)),
            actual: format!("{} {:?}", found.info.dtype, found.info.shape),
            expected: format!("weights that fit {} {:?} of {}", tensor.info.dtype, tensor.info.shape, tensor.info.name),
            advice: "only models of one architecture and size can be merged",
        }
        .into()
    }
}

fn display(path: &Path) -> String {
    path.display().to_string()
}

/// Experts by number of the layer.
fn layers<'a>(names: &DiskNames<'a>) -> Result<BTreeMap<u64, Layer<'a>>> {
    let found = find(names)?.into_iter();
    let number = |prefix: &str| prefix.trim_end_matches('.').rsplit('.').next()?.parse::<u64>().ok();
    Ok(found.filter_map(|(prefix, layer)| Some((number(prefix)?, layer))).collect())
}
