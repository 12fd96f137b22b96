//! LoRA adapters in the folder layout of PEFT.
//!
//! Keys are `base_model.model.<module>.lora_{A,B}.weight`. For a Linear, A is `[r, in]` and B is `[out, r]`. For a
//! stack of E experts, A is `[E*r, in]` with row `e*r + j` and B is `[out, r*E]` with column `j*E + e`. The name of the
//! stack is not in the key: the last targeted parameter of the experts module is the outer wrapper, and each earlier one
//! lies one `base_layer` deeper.

mod config;
mod error;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use config::AdapterConfig;
pub use error::AdapterError;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::families::Family;
use crate::names::Stack;
use crate::Result;

/// Metadata key under which an adapter carries the fingerprint of its base.
pub const BASE_FINGERPRINT: &str = "moeft.base_fingerprint";

/// Metadata key under which an adapter names the layout of its factors of experts, and the one that is read here.
const LAYOUT: &str = "moeft.layout";
const PEFT_LAYOUT: &str = "peft-0.19.1";

/// What a pair of factors adapts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The weight of a Linear, through `target_modules`.
    Linear,
    /// A parameter `weight` `[out, in]`, through `target_parameters`: a router, for example.
    Parameter,
    /// A stack of experts.
    Experts(Stack),
}

/// The two factors of one weight or stack.
#[derive(Debug, Clone)]
pub struct Pair {
    /// Path of the module in memory, such as `model.layers.0.self_attn.q_proj` or `model.layers.0.experts`.
    pub module: String,
    /// What is adapted.
    pub target: Target,
    /// Rank, per expert for a stack.
    pub rank: u64,
    /// `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub scaling: f32,
    /// Key of A.
    pub a: String,
    /// Key of B.
    pub b: String,
}

/// An adapter: its factors on disk and what they adapt.
#[derive(Debug)]
pub struct Adapter {
    /// The folder.
    pub path: PathBuf,
    /// The file of factors.
    pub weights: Checkpoint,
    /// Every pair of factors, sorted by module.
    pub pairs: Vec<Pair>,
    /// Fingerprint of the base it was trained on, if it carries one.
    pub base_fingerprint: Option<String>,
}

impl Adapter {
    /// What A and B of every module are multiplied by: with the files of factors, all that decides a delta.
    pub fn scalings(&self) -> Vec<(&str, f32)> {
        self.pairs.iter().map(|pair| (pair.a.as_str(), pair.scaling)).collect()
    }

    /// Opens an adapter folder; every key is understood or the adapter is refused.
    ///
    /// # Errors
    /// [`AdapterError`], and [`crate::checkpoint::CheckpointError`] for a damaged file.
    pub fn open(folder: &Path, family: &Family) -> Result<Self> {
        let config = AdapterConfig::read(folder)?;
        let file = folder.join("adapter_model.safetensors");
        if !file.is_file() {
            return Err(AdapterError::Missing { path: file }.into());
        }
        let weights = Checkpoint::open(&file)?;
        if let Some(tensor) = weights.tensors().find(|tensor| !tensor.info.dtype.is_weight()) {
            let (key, dtype) = (tensor.info.name.clone(), tensor.info.dtype.to_string());
            return Err(AdapterError::Dtype { path: file, key, dtype }.into());
        }
        let metadata = &weights.shards[0].header.metadata;
        let entry = |name: &str| metadata.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let layout = entry(LAYOUT);
        if let Some(layout) = layout.as_deref().filter(|layout| *layout != PEFT_LAYOUT) {
            let mark = format!("{LAYOUT} is {layout:?}");
            return Err(AdapterError::ForeignLayout { path: file, mark }.into());
        }
        let pairs = pairs(&file, &weights, &config, family, layout.is_some())?;
        let base_fingerprint = entry(BASE_FINGERPRINT);
        Ok(Self { path: folder.into(), weights, pairs, base_fingerprint })
    }

    /// The tensor of a key of [`Pair`].
    ///
    /// # Panics
    /// If the adapter has no such key: our own mistake.
    pub fn tensor(&self, key: &str) -> Tensor<'_> {
        self.weights.get(key).expect("pairs name only what the file holds")
    }
}

/// A and B of one wrapper, by its depth below the outermost one.
type Wrappers = BTreeMap<usize, [Option<String>; 2]>;

/// Groups the keys of an adapter into pairs.
fn pairs(
    file: &Path,
    weights: &Checkpoint,
    config: &AdapterConfig,
    family: &Family,
    stamped: bool,
) -> Result<Vec<Pair>> {
    let mut modules: BTreeMap<&str, Wrappers> = BTreeMap::new();
    let mut leftover = Vec::new();
    for tensor in weights.tensors() {
        let key = tensor.info.name.as_str();
        match split_key(key) {
            Some((module, depth, factor)) => {
                modules.entry(module).or_default().entry(depth).or_default()[factor] = Some(key.to_string());
            }
            None => leftover.push(key.to_string()),
        }
    }
    let mut pairs = Vec::new();
    for (module, wrappers) in modules {
        let levels = wrappers.len();
        let targets = match is_experts(module, family) {
            true => stacks(file, module, levels, config, stamped)?,
            false if is_targeted(config, module, "weight") => vec![Target::Parameter],
            false => vec![Target::Linear],
        };
        for (depth, [a, b]) in wrappers {
            match (a, b, targets.get(depth)) {
                (Some(a), Some(b), Some(&target)) => {
                    let key = match target {
                        Target::Linear => module.to_string(),
                        Target::Parameter => format!("{module}.weight"),
                        Target::Experts(stack) => format!("{module}.{}", stack.parameter()),
                    };
                    let (rank, scaling) = config.rank_and_scaling(&key)?;
                    pairs.push(Pair { module: module.into(), target, rank, scaling, a, b });
                }
                (a, b, _) => leftover.extend(a.into_iter().chain(b)),
            }
        }
    }
    if !leftover.is_empty() {
        let count = leftover.len();
        let more = if count > 5 { ", ..." } else { "" };
        let keys = leftover[..count.min(5)].join(", ") + more;
        return Err(AdapterError::Leftover { path: file.into(), count, keys }.into());
    }
    Ok(pairs)
}

/// Splits a key into module, depth of `base_layer`, and 0 for A or 1 for B.
fn split_key(key: &str) -> Option<(&str, usize, usize)> {
    let key = key.strip_prefix("base_model.model.")?;
    let (mut module, factor) = match (key.strip_suffix(".lora_A.weight"), key.strip_suffix(".lora_B.weight")) {
        (Some(module), _) => (module, 0),
        (_, Some(module)) => (module, 1),
        _ => return None,
    };
    let mut depth = 0;
    while let Some(outer) = module.strip_suffix(".base_layer") {
        (module, depth) = (outer, depth + 1);
    }
    Some((module, depth, factor))
}

/// Whether a module holds the stacks of all experts. Short targets such as `down_proj` do not tell: they fit any module.
fn is_experts(module: &str, family: &Family) -> bool {
    let experts = family.modules.experts.as_deref();
    experts.is_some_and(|experts| module.strip_suffix(experts).is_some_and(|layer| layer.ends_with('.')))
}

/// Whether `target_parameters` name a parameter.
fn is_targeted(config: &AdapterConfig, module: &str, parameter: &str) -> bool {
    let name = format!("{module}.{parameter}");
    config.target_parameters.iter().any(|target| name == *target || name.ends_with(&format!(".{target}")))
}

/// What the wrappers of an experts module adapt, outermost first.
///
/// PEFT walks the parameters of a module in the order of their declaration and wraps the module once for each that is
/// targeted (`BaseTuner._inject_parameters`), so the last one is outermost.
fn stacks(file: &Path, module: &str, levels: usize, config: &AdapterConfig, stamped: bool) -> Result<Vec<Target>> {
    let stacks = Stack::ALL.into_iter().filter(|stack| is_targeted(config, module, stack.parameter()));
    let targets: Vec<Target> = stacks.rev().map(Target::Experts).collect();
    config.check_expert_layout(stamped)?;
    if targets.len() != levels {
        let (path, module, expected) = (file.to_path_buf(), module.to_string(), targets.len());
        let targets = config.target_parameters.clone();
        return Err(AdapterError::Nesting { path, module, levels, targets, expected }.into());
    }
    Ok(targets)
}
