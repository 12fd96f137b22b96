//! What becomes of every tensor of a checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Options;
use crate::checkpoint::{CheckpointError, Dtype, Tensor, TensorSpec};
use crate::names::{DiskNames, Stack, StackOnDisk};
use crate::nf4::NESTED_BLOCK_SIZE;
use crate::{Error, Result};

/// Part of a model, for the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// Expert stacks.
    Experts,
    /// Attention projections.
    Attention,
    /// Projections of the dense MLP.
    Mlp,
    /// Router projections.
    Router,
    /// Token embeddings and head.
    Embeddings,
    /// Norms, scalars, other towers.
    Other,
}

/// A weight or stack that is packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Packing {
    /// Name of the packed weight, such as `model.layers.0.experts.gate_up_nf4`.
    pub name: String,
    /// Number of experts; `None` for a Linear.
    pub experts: Option<u64>,
    /// Elements of one expert or of the Linear.
    pub group_len: u64,
    /// Names on disk, in the order of the elements.
    pub sources: Vec<String>,
}

/// What becomes of one tensor or of the tensors of one stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Job {
    /// Packed.
    Pack(Packing),
    /// Copied.
    Copy(TensorSpec),
}

/// Every job, with the component it belongs to, sorted by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Jobs in the order in which they are written.
    pub jobs: Vec<(Component, Job)>,
}

impl Packing {
    /// Number of groups whose blocks start anew.
    pub fn groups(&self) -> u64 {
        self.experts.unwrap_or(1)
    }

    /// The tensors that are written.
    pub fn outputs(&self, options: &Options) -> Vec<TensorSpec> {
        let blocks = self.group_len.div_ceil(options.block_size as u64);
        let shape = |count: u64| self.experts.into_iter().chain([count]).collect();
        let spec = |suffix: &str, dtype, shape| TensorSpec { name: format!("{}.{suffix}", self.name), dtype, shape };
        let packed = spec("packed", Dtype::U8, shape(self.group_len.div_ceil(2)));
        if !options.double_quant {
            return vec![packed, spec("absmax", Dtype::F32, shape(blocks))];
        }
        let nested = (self.groups() * blocks).div_ceil(NESTED_BLOCK_SIZE as u64);
        vec![
            packed,
            spec("absmax", Dtype::U8, shape(blocks)),
            spec("nested_absmax", Dtype::F32, vec![nested]),
            spec("nested_offset", Dtype::F32, vec![1]),
        ]
    }
}

impl Job {
    /// The tensors that are written.
    pub fn outputs(&self, options: &Options) -> Vec<TensorSpec> {
        match self {
            Self::Pack(packing) => packing.outputs(options),
            Self::Copy(spec) => vec![spec.clone()],
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Pack(packing) => &packing.name,
            Self::Copy(spec) => &spec.name,
        }
    }
}

impl Plan {
    /// Plans the quantisation of a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError`] for experts that are missing or differ, [`Error::InvalidArgument`] if `options` name nothing
    /// that the checkpoint has.
    pub fn new(names: &DiskNames<'_>, options: &Options) -> Result<Self> {
        let mut jobs = Vec::new();
        let mut components: BTreeMap<String, Component> = BTreeMap::new();
        let mut packed = BTreeSet::new();
        for layer in names.layers() {
            for stack in Stack::ALL {
                let Some(experts) = &names.family.modules.experts else { continue };
                let module = format!("{layer}{experts}");
                let Some(found) = names.stack(&module, stack)? else { continue };
                let packing = pack_stack(&module, stack, &found, names.num_experts)?;
                components.extend(packing.sources.iter().map(|name| (name.clone(), Component::Experts)));
                if options.experts {
                    packed.extend(packing.sources.clone());
                    jobs.push((Component::Experts, Job::Pack(packing)));
                }
            }
        }
        for tensor in names.checkpoint.tensors() {
            let name = &tensor.info.name;
            let component = components.get(name).copied().unwrap_or_else(|| component(names, name));
            let wanted = match component {
                Component::Attention => options.attention,
                Component::Mlp => options.mlp,
                _ => false,
            };
            match name.strip_suffix(".weight") {
                Some(module) if wanted && tensor.info.shape.len() == 2 => {
                    jobs.push((component, Job::Pack(pack_linear(module, &tensor)?)));
                }
                _ if packed.contains(name) => {}
                _ => jobs.push((component, Job::Copy(TensorSpec::from(tensor.info)))),
            }
        }
        check_found(&jobs, options)?;
        jobs.sort_by(|left, right| left.1.name().cmp(right.1.name()));
        Ok(Self { jobs })
    }
}

/// Experts and attention that were asked for must have been found, or the model would stay in 16 bit unnoticed. Dense
/// feed-forward layers are pure extra: many families have none.
fn check_found(jobs: &[(Component, Job)], options: &Options) -> Result<()> {
    if !(options.experts || options.attention || options.mlp) {
        return Err(Error::invalid("experts, attention, mlp", "false", "at least one of them to be true"));
    }
    let asked =
        [("experts", options.experts, Component::Experts), ("attention", options.attention, Component::Attention)];
    for (name, asked, component) in asked {
        let found = jobs.iter().any(|(found, job)| *found == component && matches!(job, Job::Pack(_)));
        if asked && !found {
            return Err(Error::invalid(
                name,
                "true",
                format!("false, as this checkpoint has no {name} that moeft knows"),
            ));
        }
    }
    Ok(())
}

fn component(names: &DiskNames<'_>, name: &str) -> Component {
    let modules = &names.family.modules;
    if let Some((_, below)) = names.split_layer(name) {
        let below = names.below_in_memory(below);
        let in_module = |module: &String| below.strip_prefix(module.as_str()).is_some_and(|rest| rest.starts_with('.'));
        let known = [
            (&modules.attention, Component::Attention),
            (&modules.mlp, Component::Mlp),
            (&modules.router, Component::Router),
        ];
        return known
            .into_iter()
            .find(|(modules, _)| modules.iter().any(in_module))
            .map_or(Component::Other, |found| found.1);
    }
    let is_embedding = name.contains("embed_tokens") || name.starts_with("lm_head.");
    if is_embedding {
        Component::Embeddings
    } else {
        Component::Other
    }
}

fn pack_linear(module: &str, tensor: &Tensor<'_>) -> Result<Packing> {
    check_weight(tensor, &tensor.info.shape)?;
    Ok(Packing {
        name: format!("{module}.weight_nf4"),
        experts: None,
        group_len: tensor.info.shape.iter().product(),
        sources: vec![tensor.info.name.clone()],
    })
}

fn pack_stack(module: &str, stack: Stack, found: &StackOnDisk<'_>, num_experts: Option<u64>) -> Result<Packing> {
    let parameter = stack.parameter();
    let name = format!("{module}.{}_nf4", parameter.strip_suffix("_proj").unwrap_or(parameter));
    match found {
        StackOnDisk::Fused(tensor) => {
            let shape = &tensor.info.shape;
            let expected =
                [num_experts.unwrap_or(0), shape.get(1).copied().unwrap_or(0), shape.get(2).copied().unwrap_or(0)];
            check_weight(tensor, &expected)?;
            let group_len = expected[1] * expected[2];
            Ok(Packing { name, experts: num_experts, group_len, sources: vec![tensor.info.name.clone()] })
        }
        StackOnDisk::PerExpert(experts) => {
            let shape = &experts[0][0].info.shape;
            let tensors: Vec<&Tensor<'_>> = experts.iter().flatten().collect();
            for tensor in &tensors {
                check_weight(tensor, shape)?;
            }
            let group_len = shape.iter().product::<u64>() * experts[0].len() as u64;
            let sources = tensors.iter().map(|tensor| tensor.info.name.clone()).collect();
            Ok(Packing { name, experts: Some(experts.len() as u64), group_len, sources })
        }
    }
}

fn check_weight(tensor: &Tensor<'_>, shape: &[u64]) -> Result<()> {
    if tensor.info.dtype.is_weight() && tensor.info.shape == shape {
        return Ok(());
    }
    Err(CheckpointError::UnexpectedTensor {
        name: tensor.info.name.clone(),
        actual: format!("{} {:?}", tensor.info.dtype, tensor.info.shape),
        expected: format!("F32, BF16 or F16 of {shape:?} as config.json and the other experts say"),
        advice: "quantise the original 16-bit checkpoint with its own config.json",
    }
    .into())
}
