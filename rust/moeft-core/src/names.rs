//! Names between memory and disk: the module paths of `transformers` and the tensors of a checkpoint.

use std::collections::BTreeSet;

use crate::checkpoint::folder::Config;
use crate::checkpoint::{Checkpoint, CheckpointError, Tensor};
use crate::families::Family;
use crate::Result;

/// One of the two stacked parameters of an experts module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stack {
    /// `gate_up_proj` `[E, 2I, H]`: gate rows, then up rows, unless the family's layout says otherwise.
    GateUp,
    /// `down_proj` `[E, H, I]`, unless the family's layout says otherwise.
    Down,
}

impl Stack {
    /// Both, in the order in which the module declares them.
    pub const ALL: [Stack; 2] = [Stack::GateUp, Stack::Down];

    /// Name of the parameter in memory.
    pub fn parameter(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        }
    }
}

/// How a stack lies on disk.
#[derive(Debug)]
pub enum StackOnDisk<'a> {
    /// One tensor `[E, out, in]`, or `[E, in, out]` in a transposed layout.
    Fused(Tensor<'a>),
    /// For every expert its tensors in the order of the rows: gate and up, or down alone.
    PerExpert(Vec<Vec<Tensor<'a>>>),
}

/// Finds the tensors of a checkpoint by their names in memory.
#[derive(Debug)]
pub struct DiskNames<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Its family.
    pub family: &'a Family,
    /// Experts per layer, if the configuration or the family says so.
    pub num_experts: Option<u64>,
}

impl<'a> DiskNames<'a> {
    /// Names of `checkpoint`, whose configuration is `config`.
    pub fn new(checkpoint: &'a Checkpoint, family: &'a Family, config: &Config) -> Self {
        let spellings = family.config.num_experts.iter();
        let num_experts = spellings.filter_map(|name| config.text_field(name)).find_map(serde_json::Value::as_u64);
        Self { checkpoint, family, num_experts: num_experts.or(family.experts_counted) }
    }

    /// The tensor of a Linear module given by its path in memory.
    pub fn weight(&self, module: &str) -> Option<Tensor<'a>> {
        self.find(&format!("{module}.weight"))
    }

    /// The tensor that has in this checkpoint the part that `name` has in another one of the same family.
    pub fn counterpart(&self, other: &DiskNames<'_>, name: &str) -> Option<Tensor<'a>> {
        self.checkpoint.get(name).or_else(|| self.find(&other.in_memory(name)))
    }

    /// A name on disk as it is in memory, but for the prefix of a multimodal model.
    fn in_memory(&self, name: &str) -> String {
        match self.split_layer(name) {
            Some((layer, below)) => format!("{layer}{}", self.below_in_memory(below)),
            None => name.to_string(),
        }
    }

    /// Whether a tensor is a stack of experts.
    pub fn is_stack(&self, tensor: Tensor<'_>) -> bool {
        let Some(experts) = &self.family.modules.experts else { return false };
        let below = self.split_layer(&tensor.info.name).map(|(_, below)| self.below_in_memory(below));
        let parameter = below.as_deref().and_then(|below| below.strip_prefix(experts.as_str())?.strip_prefix('.'));
        tensor.info.shape.len() == 3 && Stack::ALL.iter().any(|stack| parameter == Some(stack.parameter()))
    }

    /// The number of a tensor's decoder layer.
    pub fn layer_number(&self, name: &str) -> Option<u64> {
        let (layer, _) = self.split_layer(name)?;
        layer.strip_suffix('.')?.rsplit('.').next()?.parse().ok()
    }

    /// What the names of the text model start with in a multimodal checkpoint; `None` in any other.
    pub fn text_prefix(&self) -> Option<&'a str> {
        let prefixes = [&self.family.disk.multimodal_prefix, &self.family.multimodal_prefix];
        let has = |prefix: &&str| self.checkpoint.tensors().any(|tensor| tensor.info.name.starts_with(prefix));
        prefixes.into_iter().flatten().map(String::as_str).find(has)
    }

    /// A stack of the experts module given by its path in memory; `None` if the checkpoint has none there.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`] if some experts of the layer are there and others are not.
    pub fn stack(&self, module: &str, stack: Stack) -> Result<Option<StackOnDisk<'a>>> {
        if let Some(tensor) = self.find(&format!("{module}.{}", stack.parameter())) {
            return Ok(Some(StackOnDisk::Fused(tensor)));
        }
        let disk = &self.family.disk;
        let templates = match stack {
            Stack::GateUp => vec![&disk.gate, &disk.up],
            Stack::Down => vec![&disk.down],
        };
        let (Some(templates), Some((layer, below))) =
            (templates.into_iter().map(Option::as_deref).collect::<Option<Vec<&str>>>(), self.split_layer(module))
        else {
            return Ok(None);
        };
        if Some(below) != self.family.modules.experts.as_deref() {
            return Ok(None);
        }
        for layer in self.prefixes(layer) {
            if let Some(experts) = self.per_expert(&layer, &templates)? {
                return Ok(Some(StackOnDisk::PerExpert(experts)));
            }
        }
        Ok(None)
    }

    fn per_expert(&self, layer: &str, templates: &[&str]) -> Result<Option<Vec<Vec<Tensor<'a>>>>> {
        let name = |template: &str, expert: u64| format!("{layer}{}", template.replace("{e}", &expert.to_string()));
        let found = |expert: u64| templates.iter().any(|template| self.checkpoint.contains(&name(template, expert)));
        let num_experts = self.num_experts.unwrap_or(0);
        // A config.json may claim any number; more experts than tensors are not there to be found.
        if !(0..=num_experts.min(self.checkpoint.len())).any(found) {
            return Ok(None);
        }
        if found(num_experts) {
            let name = format!("{layer}{}", templates[0].replace("{e}", &num_experts.to_string()));
            let expected = format!("absent, as config.json says {num_experts} experts");
            let (actual, advice) =
                ("present".to_string(), "config.json is of another model or lacks the number of experts");
            return Err(CheckpointError::UnexpectedTensor { name, actual, expected, advice }.into());
        }
        let tensor = |template: &str, expert: u64| {
            let name = name(template, expert);
            self.checkpoint.get(&name).ok_or_else(|| {
                let cause =
                    format!("config.json says {num_experts} experts per layer; download or copy the checkpoint again");
                CheckpointError::MissingTensor { name, cause }
            })
        };
        let expert = |expert| templates.iter().map(|template| tensor(template, expert)).collect();
        Ok(Some((0..num_experts).map(expert).collect::<Result<_, CheckpointError>>()?))
    }

    /// Prefixes `model.layers.3.` of the text model's layers as they are on disk.
    pub fn layers(&self) -> Vec<String> {
        let layers: BTreeSet<_> = self
            .checkpoint
            .tensors()
            .filter_map(|tensor| self.split_layer(&tensor.info.name))
            .map(|(layer, _)| layer)
            .collect();
        layers.into_iter().map(str::to_string).collect()
    }

    /// Splits a name into the prefix of its decoder layer, `model.layers.3.`, and the rest.
    pub fn split_layer<'n>(&self, name: &'n str) -> Option<(&'n str, &'n str)> {
        let layers = format!("{}.", self.family.layers);
        let start = self.prefixes(&layers).into_iter().find(|prefix| name.starts_with(prefix.as_str()))?.len();
        let digits = name[start..].bytes().take_while(u8::is_ascii_digit).count();
        let end = start + digits;
        (digits > 0 && name[end..].starts_with('.')).then(|| name.split_at(end + 1))
    }

    /// A name below a decoder layer, from disk to memory.
    pub fn below_in_memory(&self, below: &str) -> String {
        let renames = self.family.disk.renames.iter();
        let renamed =
            renames.filter_map(|(disk, memory)| Some(format!("{memory}{}", below.strip_prefix(disk.as_str())?)));
        renamed.into_iter().next().unwrap_or_else(|| below.to_string())
    }

    fn find(&self, name: &str) -> Option<Tensor<'a>> {
        self.spellings(name).iter().find_map(|name| self.checkpoint.get(name))
    }

    /// Every name that a name in memory may have on disk.
    fn spellings(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_string()];
        if let Some((layer, below)) = self.split_layer(name) {
            for (disk, memory) in &self.family.disk.renames {
                names.extend(below.strip_prefix(memory.as_str()).map(|rest| format!("{layer}{disk}{rest}")));
            }
        }
        names.iter().flat_map(|name| self.prefixes(name)).collect()
    }

    /// The name itself, and with every other prefix that the text model may have.
    fn prefixes(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_string()];
        let multimodal = [&self.family.disk.multimodal_prefix, &self.family.multimodal_prefix];
        let roots: Vec<&str> = multimodal.into_iter().flatten().map(String::as_str).chain(["model."]).collect();
        if let Some(rest) = roots.iter().find_map(|root| name.strip_prefix(root)) {
            for root in roots {
                let other = format!("{root}{rest}");
                if !names.contains(&other) {
                    names.push(other);
                }
            }
        }
        names
    }
}
