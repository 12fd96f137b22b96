//! Goes through the tensors of the base and says what each is made of.

use std::collections::{BTreeMap, BTreeSet};

use super::adapters::Patch;
use super::grid::Grid;
use super::methods::{BaseModel, Inputs};
use super::plan::{Action, Input, Job, Member, Merge, Opened, Values};
use super::recipe::{ModelSource, Recipe};
use super::sources::{Finder, Source};
use crate::checkpoint::{Checkpoint, CheckpointError, Tensor};
use crate::names::DiskNames;
use crate::Result;

/// What is known of all inputs when the tensors are gone through.
pub struct Assignment<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Names of the base.
    pub names: &'a DiskNames<'a>,
    /// The models of the recipe.
    pub members: &'a [Member],
    /// What each adapter adds, by name of the tensor.
    pub patches: Vec<BTreeMap<String, Patch>>,
    /// By checkpoint.
    pub finders: Vec<Finder<'a>>,
    /// Names that were taken, by checkpoint.
    pub used: Vec<BTreeSet<String>>,
    /// Fisher information.
    pub fisher: Option<(&'a Checkpoint, Finder<'a>)>,
    /// Number of layers.
    pub layers: u64,
}

impl<'a> Assignment<'a> {
    /// What a tensor is made of.
    ///
    /// # Errors
    /// [`CheckpointError`] if an input does not fit.
    pub fn job(&mut self, tensor: Tensor<'a>) -> Result<Job> {
        let (name, dtype) = (tensor.info.name.clone(), tensor.info.dtype);
        let inputs = self.inputs(tensor)?;
        let out = if dtype.is_weight() { self.recipe.out_dtype.unwrap_or(dtype) } else { dtype };
        let changes = inputs.iter().any(|input| input.values != Values::Base);
        if changes && !dtype.is_weight() && !dtype.is_integer() {
            // A copy of the base in the place of the merge would be a silent loss; of integers there is no merge.
            return Err(CheckpointError::UnexpectedTensor {
                name,
                actual: format!("{dtype} {:?}", tensor.info.shape),
                expected: "F32, BF16 or F16, as all that is computed".into(),
                advice: "convert the models first",
            }
            .into());
        }
        if inputs.is_empty() || !dtype.is_weight() || tensor.info.bytes == 0 {
            return Ok(Job { name, out, action: Action::Copy });
        }
        let layer = self.names.layer_number(&name);
        // What lies outside of the layers takes the first value of a ramp, as mergekit has it.
        let depth = layer.map_or(0.0, |layer| layer as f64 / self.layers.saturating_sub(1).max(1) as f64);
        let (mut fisher, mut fisher_range) = (None, None);
        if let Some((checkpoint, finder)) = &mut self.fisher {
            fisher = finder.source(tensor)?;
            fisher_range = fisher.as_ref().and_then(|source| stated_range(checkpoint, source));
        }
        let experts = if self.names.is_stack(tensor) { tensor.info.shape[0].max(1) } else { 1 };
        let grid = Grid::new(&tensor.info.shape);
        let merge = Merge { inputs, fisher, fisher_range, layer, depth, experts, grid };
        Ok(Job { name, out, action: Action::Merge(merge) })
    }

    fn inputs(&mut self, tensor: Tensor<'a>) -> Result<Vec<Input>> {
        let spec = self.recipe.merge_method.spec();
        let of_deltas = match spec.inputs {
            Inputs::Weights => false,
            Inputs::Deltas => true,
            Inputs::DeltasFromBase => self.recipe.base_model.is_some(),
        };
        let outside = self
            .names
            .text_prefix()
            .is_some_and(|prefix| !tensor.info.name.starts_with(prefix) && !tensor.info.name.starts_with("lm_head."));
        let mut inputs = Vec::with_capacity(self.members.len());
        let mut is_everywhere = true;
        for (entry, member) in self.members.iter().enumerate() {
            let values = match *member {
                Member::Adapter(adapter) => self.patches[adapter].get(&tensor.info.name).cloned().map(Values::Patch),
                Member::Checkpoint(0) => None,
                Member::Checkpoint(index) => match self.finders[index].source(tensor)? {
                    Some(source) => {
                        self.used[index].extend(source.pieces.iter().map(|piece| piece.tensor.clone()));
                        Some(Values::Weights(index, source))
                    }
                    // A text model merged into a multimodal one leaves the rest of it alone.
                    None if outside => {
                        is_everywhere = false;
                        None
                    }
                    None => return Err(self.missing(tensor, index)),
                },
            };
            match values {
                Some(values) => inputs.push(Input { entry, values }),
                None if of_deltas => {}
                None => inputs.push(Input { entry, values: Values::Base }),
            }
        }
        let changes = inputs.iter().any(|input| input.values != Values::Base) || spec.base == BaseModel::Layout;
        Ok(if changes && (of_deltas || is_everywhere) { inputs } else { Vec::new() })
    }

    fn missing(&self, tensor: Tensor<'_>, index: usize) -> crate::Error {
        let entry = self.members.iter().position(|member| *member == Member::Checkpoint(index)).unwrap_or(0);
        let ModelSource::Model(path) = &self.recipe.models[entry].source else { unreachable!("it is a checkpoint") };
        let cause = format!(
            "{} does not hold it, the base does; only models of one architecture can be merged",
            path.display()
        );
        CheckpointError::MissingTensor { name: tensor.info.name.clone(), cause }.into()
    }

    /// Refuses tensors of a model that the base has no place for. A head that the base ties to its embeddings is none.
    ///
    /// # Errors
    /// [`CheckpointError::UnexpectedTensor`].
    pub fn check_leftovers(&self, checkpoints: &[Opened]) -> Result<()> {
        for (index, opened) in checkpoints.iter().enumerate().skip(1) {
            let prefix = self.finders[index].text_prefix();
            let is_text = |name: &str| prefix.is_none_or(|prefix| name.starts_with(prefix));
            let names = opened.checkpoint.tensors().map(|tensor| tensor.info);
            let mut leftovers = names.filter(|info| !self.used[index].contains(&info.name) && is_text(&info.name));
            if let Some(info) = leftovers.find(|info| info.name != "lm_head.weight") {
                return Err(CheckpointError::UnexpectedTensor {
                    name: format!("{} in {}", info.name, opened.checkpoint.path.display()),
                    actual: format!("{} {:?}", info.dtype, info.shape),
                    expected: "absent, as in the base".into(),
                    advice: "only models of one architecture can be merged",
                }
                .into());
            }
        }
        Ok(())
    }
}

/// Smallest and largest value, if the file states them under `min:<name>` and `max:<name>`.
fn stated_range(checkpoint: &Checkpoint, source: &Source) -> Option<[f32; 2]> {
    let [piece] = source.pieces.as_slice() else { return None };
    let tensor = checkpoint.get(&piece.tensor)?;
    if piece.count != tensor.info.shape.iter().product::<u64>() {
        return None;
    }
    let metadata = &tensor.shard.header.metadata;
    let stated = |key: &str| {
        let name = format!("{key}:{}", piece.tensor);
        metadata.iter().find(|(key, _)| *key == name)?.1.parse().ok().filter(|value: &f32| value.is_finite())
    };
    Some([stated("min")?, stated("max")?])
}
