//! The merge recipe: the one parser, for YAML and JSON.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::keys::{check_keys, field, one_of, RecipeError};
use super::methods::{BaseModel, Inputs, Method};
use super::setting::Setting;
use crate::checkpoint::Dtype;
use crate::Result;

/// How often a merged weight is rounded that was adapted through `target_parameters`; others are rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// Once, from the f32 sum.
    Single,
    /// As PEFT merges `target_parameters`: the delta to the type of the base, then the sum.
    Peft,
}

/// Parameters by name.
pub type Parameters = BTreeMap<String, Setting>;

/// One model of a recipe.
#[derive(Debug, Clone, Serialize)]
pub struct WeightedModel {
    /// What it is.
    pub source: ModelSource,
    /// Its own parameters; what is missing is looked up in those of the recipe.
    pub parameters: Parameters,
}

/// Where a model of a recipe lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// Folder of a whole checkpoint.
    Model(#[serde(serialize_with = "crate::path_text::serialize")] PathBuf),
    /// Folder of a LoRA adapter of the base.
    Adapter(#[serde(serialize_with = "crate::path_text::serialize")] PathBuf),
}

/// A recipe with every default filled in and every path resolved.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    /// How weights are combined.
    pub merge_method: Method,
    /// Folder of the base checkpoint. Without one, the first model gives names and layout.
    #[serde(serialize_with = "crate::path_text::serialize_option")]
    pub base_model: Option<PathBuf>,
    /// What is merged.
    pub models: Vec<WeightedModel>,
    /// Parameters of the method, and defaults of those of models.
    pub parameters: Parameters,
    /// Type of the output; `None` keeps the type of each tensor.
    pub out_dtype: Option<Dtype>,
    /// How often expert weights are rounded.
    pub rounding: Rounding,
    /// Seed of the methods that drop weights at random.
    pub seed: u64,
    /// Diagonal Fisher information, a safetensors file or folder with the names and shapes of the weights.
    pub fisher: Option<PathBuf>,
    /// Importance of layers, JSON.
    pub layer_importance: Option<PathBuf>,
    /// Importance, 0 to 1, of layers that this file does not name; `None` refuses such a file.
    pub missing_layers: Option<f64>,
}

/// Keys by place, for the check that names the nearest one.
const TOP: &[&str] = &[
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "rounding",
    "seed",
    "fisher",
    "layer_importance",
    "missing_layers",
];
const MODEL: &[&str] = &["model", "adapter", "parameters"];

impl Recipe {
    /// Parses a recipe; relative paths start at `folder`.
    ///
    /// # Errors
    /// [`RecipeError`].
    ///
    /// ```
    /// use moeft_core::merge::Recipe;
    /// let text = "merge_method: lora\nbase_model: base\nmodels: [{adapter: tuned}]\n";
    /// let recipe = Recipe::parse(text, "/data".as_ref())?;
    /// assert_eq!(recipe.base_model.unwrap().to_str(), Some("/data/base"));
    /// let error = Recipe::parse(&text.replace("models", "model"), "/data".as_ref()).unwrap_err();
    /// assert!(error.to_string().contains("did you mean \"models\""));
    /// # Ok::<(), moeft_core::Error>(())
    /// ```
    pub fn parse(text: &str, folder: &Path) -> Result<Self> {
        let tree = parse_tree(text)?;
        check_keys(&tree, "the top level", TOP)?;
        for (index, model) in tree.get("models").and_then(Value::as_array).into_iter().flatten().enumerate() {
            check_keys(model, &format!("models[{index}]"), MODEL)?;
        }
        let mut recipe = resolve(&tree, folder)?;
        recipe.take_out_base();
        check_models(&recipe)?;
        Ok(recipe)
    }

    /// Where the base is part of the formula, it is no model beside it: recipes of other tools list it among them.
    fn take_out_base(&mut self) {
        let spec = self.merge_method.spec();
        if self.base_model.is_none() && spec.base == BaseModel::First {
            let first = self.checkpoints().next().cloned();
            self.base_model = first;
        }
        let is_part = spec.base != BaseModel::Layout || spec.inputs == Inputs::DeltasFromBase;
        if let Some(base) = self.base_model.clone().filter(|_| is_part) {
            self.models.retain(|model| model.source != ModelSource::Model(base.clone()));
        }
    }

    /// Weight checkpoints in the order of the recipe.
    pub(super) fn checkpoints(&self) -> impl Iterator<Item = &PathBuf> {
        self.models.iter().filter_map(|model| match &model.source {
            ModelSource::Model(path) => Some(path),
            ModelSource::Adapter(_) => None,
        })
    }
}

fn resolve(tree: &Value, folder: &Path) -> Result<Recipe, RecipeError> {
    let word = |key: &str, expected: &str| field::<String>(tree, key, expected);
    let file =
        |tree: &Value, key: &str| field::<PathBuf>(tree, key, "a path").map(|path| path.map(|path| folder.join(path)));
    one_of("dtype", word("dtype", "float32")?.as_deref().unwrap_or("float32"), &[("float32", ())])?;
    let method = word("merge_method", "the name of a method")?;
    let missing = || RecipeError::value("merge_method", "missing", "the name of a method, such as lora");
    let merge_method = Method::parse(&method.ok_or_else(missing)?)?;
    let known = merge_method.spec().parameters();
    let model = |(index, model): (usize, &Value)| {
        let place = format!("models[{index}]");
        let source = match (file(model, "model")?, file(model, "adapter")?) {
            (Some(path), None) => ModelSource::Model(path),
            (None, Some(path)) => ModelSource::Adapter(path),
            _ => return Err(RecipeError::value(place, "without one of model and adapter", "one of them, a folder")),
        };
        let parameters = parameters(model, &format!("{place}.parameters"), merge_method.spec().per_model)?;
        Ok(WeightedModel { source, parameters })
    };
    let models: Vec<Value> =
        field(tree, "models", "a list of {model: folder} or {adapter: folder}")?.unwrap_or_default();
    let dtypes = [("bfloat16", Dtype::BF16), ("float16", Dtype::F16), ("float32", Dtype::F32)];
    let roundings = [("single", Rounding::Single), ("peft", Rounding::Peft)];
    let out_dtype = word("out_dtype", "bfloat16 or float16 or float32")?;
    let rounding = word("rounding", "single or peft")?;
    Ok(Recipe {
        merge_method,
        base_model: file(tree, "base_model")?,
        models: models.iter().enumerate().map(model).collect::<Result<_, RecipeError>>()?,
        parameters: parameters(tree, "parameters", &known)?,
        out_dtype: out_dtype.map(|name| one_of("out_dtype", &name, &dtypes)).transpose()?,
        rounding: one_of("rounding", rounding.as_deref().unwrap_or("single"), &roundings)?,
        seed: field(tree, "seed", "a whole number from 0 on")?.unwrap_or_default(),
        fisher: file(tree, "fisher")?,
        layer_importance: file(tree, "layer_importance")?,
        missing_layers: field(tree, "missing_layers", "a number from 0 to 1")?,
    })
}

/// Checks the number and the kind of models against the method.
fn check_models(recipe: &Recipe) -> Result<(), RecipeError> {
    let spec = recipe.merge_method.spec();
    let (found, [least, most]) = (recipe.models.len(), spec.models);
    if !(least..=most).contains(&found) {
        let value = if found == 0 { "empty".to_string() } else { format!("{found} entries") };
        let expected = match (least, most) {
            (1, usize::MAX) => "at least one {model: folder} or {adapter: folder}".to_string(),
            (least, usize::MAX) => format!("at least {least} for {}, beside the base", spec.name),
            (_, most) => format!("{most} for {}, beside the base", spec.name),
        };
        return Err(RecipeError::value("models", value, expected));
    }
    let has_layout = recipe.base_model.is_some() || recipe.checkpoints().next().is_some();
    let needs_base = spec.base == BaseModel::Required || !has_layout;
    if recipe.base_model.is_none() && needs_base {
        return Err(RecipeError::value("base_model", "missing", "the folder of the checkpoint that is merged into"));
    }
    if spec.adapters_only && recipe.checkpoints().next().is_some() {
        let expected = format!("{{adapter: folder}} for {}; task_arithmetic takes models and adapters", spec.name);
        return Err(RecipeError::value("models", "a whole model", expected));
    }
    match recipe.missing_layers {
        Some(_) if recipe.layer_importance.is_none() => {
            return Err(RecipeError::value(
                "missing_layers",
                "set",
                "layer_importance beside it, the file of the others",
            ));
        }
        Some(value) if !(0.0..=1.0).contains(&value) => {
            return Err(RecipeError::value("missing_layers", value, "a number from 0 to 1"));
        }
        _ => {}
    }
    let files = [("fisher", &recipe.fisher), ("layer_importance", &recipe.layer_importance)];
    match files.into_iter().find(|(_, file)| file.is_some() && !spec.importance) {
        Some((key, _)) => Err(RecipeError::value(key, "set", format!("merge_method fisher_damped, not {}", spec.name))),
        None => Ok(()),
    }
}

/// Parameters of the recipe or of one model. `lambda`, as other tools call it, is `scale`.
fn parameters(tree: &Value, place: &str, known: &[&str]) -> Result<Parameters, RecipeError> {
    let found: BTreeMap<String, Value> = field(tree, "parameters", "a map of parameters")?.unwrap_or_default();
    let rename = |key: String| if key == "lambda" { "scale".to_string() } else { key };
    let found: serde_json::Map<_, _> = found.into_iter().map(|(key, value)| (rename(key), value)).collect();
    let tree = Value::Object(found);
    check_keys(&tree, place, known)?;
    let object = tree.as_object().into_iter().flatten();
    object.map(|(key, value)| Ok((key.clone(), Setting::parse(&format!("{place}.{key}"), value)?))).collect()
}

fn parse_tree(text: &str) -> Result<Value, RecipeError> {
    // JSON first: it is YAML too, but its errors are clearer from a JSON parser.
    let parsed = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|error| error.to_string())
    } else {
        serde_saphyr::from_str(text).map_err(|error| error.to_string())
    };
    parsed.map_err(|cause| RecipeError::Syntax { cause })
}
