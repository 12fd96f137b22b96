//! A resolved merge: inputs open, every tensor of the output assigned its inputs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::adapters::{patches, Patch};
use super::assignment::Assignment;
use super::grid::Grid;
use super::importance::{check_fisher, LayerImportance};
use super::kernel::{Kernel, Settings};
use super::methods::Inputs;
use super::recipe::{ModelSource, Parameters, Recipe, Rounding};
use super::sources::{Finder, Source};
use crate::adapter::Adapter;
use crate::checkpoint::folder::Config;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Tensor};
use crate::families::Family;
use crate::names::DiskNames;
use crate::Result;

/// An input that is a whole checkpoint.
#[derive(Debug)]
pub struct Opened {
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Its configuration.
    pub config: Config,
}

/// What a model of the recipe is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Member {
    /// Index among the checkpoints; 0 is the base.
    Checkpoint(usize),
    /// Index among the adapters.
    Adapter(usize),
}

/// What a model has for one tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// The weights of the base.
    Base,
    /// Weights in the checkpoint of this index.
    Weights(usize, Source),
    /// What an adapter adds.
    Patch(Patch),
}

/// One model's part in a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Input {
    /// Index in the recipe.
    pub entry: usize,
    /// What it has.
    pub values: Values,
}

/// How a tensor of the output comes about.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// As in the base, in the type of the output.
    Copy,
    /// Computed.
    Merge(Merge),
}

/// The inputs of a tensor that is computed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merge {
    /// Models, in the order of the recipe; those that leave the tensor alone are not here.
    pub inputs: Vec<Input>,
    /// Fisher information.
    pub fisher: Option<Source>,
    /// Its smallest and largest value, if the file states them.
    pub fisher_range: Option<[f32; 2]>,
    /// Number of its layer.
    pub layer: Option<u64>,
    /// 0 in the first layer and outside of the layers, 1 in the last.
    pub depth: f64,
    /// Experts of a stack; 1 for any other tensor.
    pub experts: u64,
    /// How it is cut.
    pub grid: Grid,
}

/// One tensor of the output.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    /// Name, as in the base.
    pub name: String,
    /// Type of the output.
    pub out: Dtype,
    /// How it comes about.
    pub action: Action,
}

/// A resolved merge.
#[derive(Debug)]
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// Whole checkpoints; the first is the base, or stands for it.
    pub checkpoints: Vec<Opened>,
    /// Adapters, in the order of the recipe.
    pub adapters: Vec<Adapter>,
    /// The models of the recipe.
    pub members: Vec<Member>,
    /// Fisher information.
    pub fisher: Option<Checkpoint>,
    /// Importance of the layers.
    pub importance: Option<LayerImportance>,
    /// Every tensor of the output, in the order of the base's files.
    pub jobs: Vec<Job>,
}

impl Plan {
    /// Opens all inputs and assigns every tensor and every factor.
    ///
    /// # Errors
    /// [`CheckpointError`], [`crate::adapter::AdapterError`], [`super::RecipeError`], [`crate::Error::UnknownModelType`].
    pub fn resolve(recipe: Recipe) -> Result<Self> {
        let spec = recipe.merge_method.spec();
        let layout = recipe.base_model.as_ref().or_else(|| recipe.checkpoints().next());
        let layout = layout.expect("the recipe was checked for a base or a model").clone();
        let mut opened: Vec<(PathBuf, Opened)> = vec![open(&layout, spec.adapters_only)?];
        let mut members = Vec::with_capacity(recipe.models.len());
        let mut adapter_paths = Vec::new();
        for model in &recipe.models {
            members.push(match &model.source {
                ModelSource::Adapter(path) => {
                    adapter_paths.push(path);
                    Member::Adapter(adapter_paths.len() - 1)
                }
                ModelSource::Model(path) => {
                    let place = real(path);
                    let known = opened.iter().position(|(known, _)| *known == place);
                    Member::Checkpoint(match known {
                        Some(index) => index,
                        None => {
                            opened.push(open(path, false)?);
                            opened.len() - 1
                        }
                    })
                }
            });
        }
        let checkpoints: Vec<Opened> = opened.into_iter().map(|(_, opened)| opened).collect();
        let fisher = recipe.fisher.as_deref().map(Checkpoint::open).transpose()?;
        let Opened { checkpoint: base, config } = &checkpoints[0];
        let family = Family::of_checkpoint(config.model_type(&layout)?, base)?;
        let adapters = adapter_paths.iter().map(|path| Adapter::open(path, &family)).collect::<Result<Vec<_>>>()?;
        let names = DiskNames::new(base, &family, config);
        let layers = base.tensors().filter_map(|tensor| names.layer_number(&tensor.info.name)).max();
        let layers = layers.map_or(0, |last| last.saturating_add(1));
        let importance = recipe.layer_importance.as_deref();
        let importance =
            importance.map(|path| LayerImportance::read(path, layers, recipe.missing_layers)).transpose()?;
        let patches = (0..adapters.len()).map(|adapter| patches(&names, &adapters, adapter, recipe.rounding));
        let patches = patches.collect::<Result<Vec<_>>>()?;
        let finders = checkpoints.iter().map(|other| Finder::new(&names, &other.checkpoint, &family, &other.config));
        let mut assignment = Assignment {
            recipe: &recipe,
            names: &names,
            members: &members,
            patches,
            finders: finders.collect(),
            used: vec![BTreeSet::new(); checkpoints.len()],
            fisher: fisher.as_ref().map(|fisher| (fisher, Finder::new(&names, fisher, &family, config))),
            layers,
        };
        let tensors =
            base.shards.iter().flat_map(|shard| shard.header.tensors.iter().map(move |info| Tensor { shard, info }));
        let jobs = tensors.map(|tensor| assignment.job(tensor)).collect::<Result<Vec<_>>>()?;
        assignment.check_leftovers(&checkpoints)?;
        if let Some(fisher) = &fisher {
            check_fisher(fisher, &jobs)?;
        }
        let plan = Self { recipe, checkpoints, adapters, members, fisher, importance, jobs };
        // Every parameter of every tensor is looked at once, before anything is written.
        plan.jobs.iter().try_for_each(|job| plan.kernel(job).map(drop))?;
        Ok(plan)
    }

    /// The base: names and layout of the output are its own.
    pub fn base(&self) -> &Checkpoint {
        &self.checkpoints[0].checkpoint
    }

    /// The tensor of the base that a job is named for.
    pub fn tensor(&self, job: &Job) -> Tensor<'_> {
        self.base().get(&job.name).expect("jobs are tensors of the base")
    }

    /// What the kernels get from each model.
    pub fn of_deltas(&self) -> bool {
        match self.recipe.merge_method.spec().inputs {
            Inputs::Weights => false,
            Inputs::Deltas => true,
            Inputs::DeltasFromBase => self.recipe.base_model.is_some(),
        }
    }

    /// The arithmetic of a job; `None` for a copy.
    ///
    /// # Errors
    /// [`super::RecipeError`] for a parameter that cannot be used.
    pub fn kernel(&self, job: &Job) -> Result<Option<Box<dyn Kernel>>> {
        let Action::Merge(merge) = &job.action else { return Ok(None) };
        let tensor = self.tensor(job);
        let spec = self.recipe.merge_method.spec();
        let models = || merge.inputs.iter().map(|input| &self.recipe.models[input.entry].parameters);
        let delta_dtype = merge.inputs.iter().find_map(|input| match &input.values {
            Values::Patch(patch) if patch.rounding == Rounding::Peft => Some(tensor.info.dtype),
            _ => None,
        });
        let mut settings = Settings {
            name: &job.name,
            block: merge.grid.block,
            experts: merge.experts,
            shape: &tensor.info.shape,
            dtype: tensor.info.dtype,
            depth: merge.depth,
            seed: self.recipe.seed,
            common: &self.recipe.parameters,
            models: models().collect(),
            entries: merge.inputs.iter().map(|input| input.entry).collect(),
            total_weight: 0.0,
            total_magnitude: 0.0,
            delta_dtype,
            layer_importance: self.importance.as_ref().map_or(0.0, |importance| importance.of(merge.layer)),
            fisher_range: merge.fisher_range,
            of_deltas: self.of_deltas(),
            has_fisher: merge.fisher.is_some(),
        };
        if spec.per_model.contains(&"weight") {
            let all: Vec<&Parameters> = self.recipe.models.iter().map(|model| &model.parameters).collect();
            let any = f64::NEG_INFINITY..=f64::INFINITY;
            for own in all {
                let weight = settings.number_of(own, "weight", Some(1.0), any.clone())?;
                settings.total_weight += weight;
                settings.total_magnitude += weight.abs();
            }
        }
        Ok(Some((spec.kernel)(&settings)?))
    }
}

/// Opens a checkpoint that is to be merged; a packed one is refused.
fn open(path: &Path, into: bool) -> Result<(PathBuf, Opened)> {
    let checkpoint = Checkpoint::open(path)?;
    let config = Config::read(path)?;
    if let Some(method) = config.quant_method() {
        let advice = match into {
            true => "merge into the 16-bit base that it was made from",
            false => "merge the 16-bit checkpoint that it was made from",
        };
        return Err(CheckpointError::AlreadyQuantized { path: path.into(), method, advice }.into());
    }
    Ok((real(path), Opened { checkpoint, config }))
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}
