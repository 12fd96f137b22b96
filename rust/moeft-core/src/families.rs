//! What is known about each model family: names and layouts. Data only, from `python/moeft/families/*.toml`.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::{Error, Result};

/// File stem and text of every family file, embedded by `build.rs`.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/families.rs"));

/// Names and layout of one model family.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// Name of the family: the stem of its file.
    #[serde(skip)]
    pub name: String,
    /// Values of `model_type` in config.json that belong to this family.
    pub model_types: Vec<String>,
    /// Module path of the list of decoder layers, as in memory.
    pub layers: String,
    /// What stands for `model.` on the disk of a multimodal checkpoint.
    pub multimodal_prefix: Option<String>,
    /// Class that holds the text part alone.
    pub text_class: Option<String>,
    /// Names of the config fields.
    pub config: ConfigFields,
    /// Module paths below a decoder layer.
    pub modules: Modules,
    /// How the stacks of experts lie in memory.
    #[serde(default)]
    pub layout: StackLayout,
    /// How the experts lie on disk.
    pub disk: DiskLayout,
}

/// Names of the fields of config.json. Each may have several spellings, the first that is there counts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFields {
    /// Experts per layer.
    pub num_experts: Vec<String>,
}

/// Module paths below a decoder layer, as in memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Modules {
    /// The module that holds `gate_up_proj` and `down_proj` of all experts.
    pub experts: String,
    /// Router projections.
    pub router: Vec<String>,
    /// Attention projections.
    pub attention: Vec<String>,
    /// Projections of the dense MLP.
    pub mlp: Vec<String>,
}

/// How the stacks of experts lie in memory. All false is `gate_up_proj` `[E, 2I, H]`, gate rows first, and `down_proj`
/// `[E, H, I]`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StackLayout {
    /// `[E, H, 2I]` and `[E, I, H]` instead.
    pub transposed: bool,
    /// Gate and up alternate along the axis of 2I.
    pub interleaved: bool,
    /// Each stack has a bias of its own.
    pub biased: bool,
}

/// Whether the experts of a layer are one tensor or one tensor each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertStorage {
    /// `gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]`.
    Fused,
    /// `gate` `[I, H]`, `up` `[I, H]` and `down` `[H, I]` of every expert.
    PerExpert,
}

/// How the experts lie on disk.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLayout {
    /// The layout that the hub's checkpoints of this family have.
    pub experts: ExpertStorage,
    /// Name of one expert's gate below the layer; `{e}` stands for the expert.
    pub gate: Option<String>,
    /// Name of one expert's up projection.
    pub up: Option<String>,
    /// Name of one expert's down projection.
    pub down: Option<String>,
    /// Pairs (disk, memory) of name prefixes below a decoder layer.
    #[serde(default)]
    pub renames: Vec<(String, String)>,
}

impl Family {
    /// Every family, in the order of the file names.
    pub fn all() -> &'static [Family] {
        static ALL: OnceLock<Vec<Family>> = OnceLock::new();
        ALL.get_or_init(|| {
            let parse = |(name, text): &(&str, &str)| {
                // A damaged family file is our own mistake, found by the first test that runs.
                let family: Family = toml::from_str(text).unwrap_or_else(|error| panic!("{name}.toml: {error}"));
                Family { name: (*name).to_string(), ..family }
            };
            FILES.iter().map(parse).collect()
        })
    }

    /// The family of a `model_type`.
    ///
    /// # Errors
    /// [`Error::UnknownModelType`] names the known ones.
    ///
    /// ```
    /// use moeft_core::families::Family;
    /// assert_eq!(Family::for_model_type("gemma4_text")?.modules.experts, "experts");
    /// assert!(Family::for_model_type("gemma5").unwrap_err().to_string().contains("mixtral"));
    /// # Ok::<(), moeft_core::Error>(())
    /// ```
    pub fn for_model_type(model_type: &str) -> Result<&'static Family> {
        Self::all().iter().find(|family| family.model_types.iter().any(|known| known == model_type)).ok_or_else(|| {
            let known = Self::all().iter().flat_map(|family| &family.model_types).cloned().collect::<Vec<_>>();
            Error::UnknownModelType { model_type: model_type.to_string(), known: known.join(", ") }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_per_expert_family_names_its_three_tensors() {
        assert!(Family::all().len() >= 4);
        for family in Family::all() {
            let names = [&family.disk.gate, &family.disk.up, &family.disk.down];
            let expected = family.disk.experts == ExpertStorage::PerExpert;
            for name in names {
                assert_eq!(name.as_ref().is_some_and(|name| name.contains("{e}")), expected, "{}", family.name);
            }
        }
    }
}
