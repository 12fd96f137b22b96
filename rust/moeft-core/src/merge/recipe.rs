//! The merge recipe: the one parser, for YAML and JSON.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Dtype;
use crate::Result;

/// A recipe has an unknown key, a missing key, or a value that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The message of each variant says what it is.
pub enum RecipeError {
    #[error("the recipe is neither YAML nor JSON: {cause}")]
    Syntax { cause: String },
    #[error("unknown key {key:?} in {place} of the recipe{}; known are: {known}", nearest.as_ref().map(|name| format!(", did you mean {name:?}?")).unwrap_or_default())]
    UnknownKey { key: String, place: String, nearest: Option<String>, known: String },
    #[error("{key} is {value}, expected {expected}")]
    Value { key: String, value: String, expected: String },
}

/// How weights are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Adds the scaled deltas of LoRA adapters to the base.
    Lora,
}

/// Names of [`Method`] in a recipe.
const METHODS: &[(&str, Method)] = &[("lora", Method::Lora)];

/// How often a merged weight is rounded that was adapted through `target_parameters`; others are rounded once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// Once, from the f32 sum.
    Single,
    /// As PEFT merges `target_parameters`: the delta to the type of the base, then the sum.
    Peft,
}

/// One adapter of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightedAdapter {
    /// Its folder.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub adapter: PathBuf,
    /// Its factor.
    pub weight: f64,
}

/// A recipe with every default filled in and every path resolved.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// How weights are combined.
    pub merge_method: Method,
    /// Folder of the base checkpoint.
    #[serde(serialize_with = "crate::path_text::serialize")]
    pub base_model: PathBuf,
    /// What is merged into it.
    pub models: Vec<WeightedAdapter>,
    /// Factor of the whole sum of deltas.
    pub scale: f64,
    /// Type of the output; `None` keeps the type of each tensor.
    pub out_dtype: Option<Dtype>,
    /// How often expert weights are rounded.
    pub rounding: Rounding,
}

/// Keys by place, for the check that names the nearest one.
const TOP: &[&str] = &["merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "rounding"];
const MODEL: &[&str] = &["adapter", "parameters"];

#[derive(Deserialize)]
struct Text {
    merge_method: String,
    base_model: PathBuf,
    models: Vec<ModelText>,
    #[serde(default)]
    parameters: Parameters,
    dtype: Option<String>,
    out_dtype: Option<String>,
    rounding: Option<String>,
}

#[derive(Deserialize)]
struct ModelText {
    adapter: PathBuf,
    #[serde(default)]
    parameters: ModelParameters,
}

#[derive(Deserialize, Default)]
struct Parameters {
    scale: Option<f64>,
}

#[derive(Deserialize, Default)]
struct ModelParameters {
    weight: Option<f64>,
}

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
    /// assert_eq!(recipe.base_model.to_str(), Some("/data/base"));
    /// let error = Recipe::parse(&text.replace("models", "model"), "/data".as_ref()).unwrap_err();
    /// assert!(error.to_string().contains("did you mean \"models\""));
    /// # Ok::<(), moeft_core::Error>(())
    /// ```
    pub fn parse(text: &str, folder: &Path) -> Result<Self> {
        let tree = parse_tree(text)?;
        check_keys(&tree, "the top level", TOP)?;
        if let Some(parameters) = tree.get("parameters") {
            check_keys(parameters, "parameters", &["scale"])?;
        }
        for (index, model) in tree.get("models").and_then(Value::as_array).into_iter().flatten().enumerate() {
            check_keys(model, &format!("models[{index}]"), MODEL)?;
            if let Some(parameters) = model.get("parameters") {
                check_keys(parameters, &format!("models[{index}].parameters"), &["weight"])?;
            }
        }
        let text: Text =
            serde_json::from_value(tree).map_err(|error| RecipeError::Syntax { cause: error.to_string() })?;
        Ok(resolve(text, folder)?)
    }
}

fn resolve(text: Text, folder: &Path) -> Result<Recipe, RecipeError> {
    one_of("dtype", text.dtype.as_deref().unwrap_or("float32"), &[("float32", ())])?;
    let finite = |key: String, value: f64| {
        let expected = "a finite number".to_string();
        if value.is_finite() {
            Ok(value)
        } else {
            Err(RecipeError::Value { key, value: value.to_string(), expected })
        }
    };
    let adapter = |(index, model): (usize, ModelText)| {
        let weight = finite(format!("models[{index}].parameters.weight"), model.parameters.weight.unwrap_or(1.0))?;
        Ok(WeightedAdapter { adapter: folder.join(model.adapter), weight })
    };
    if text.models.is_empty() {
        let (key, value, expected) = ("models".into(), "empty".into(), "at least one {adapter: folder}".into());
        return Err(RecipeError::Value { key, value, expected });
    }
    let dtypes = [("bfloat16", Dtype::BF16), ("float16", Dtype::F16), ("float32", Dtype::F32)];
    let roundings = [("single", Rounding::Single), ("peft", Rounding::Peft)];
    Ok(Recipe {
        merge_method: one_of("merge_method", &text.merge_method, METHODS)?,
        base_model: folder.join(text.base_model),
        models: text.models.into_iter().enumerate().map(adapter).collect::<Result<_, RecipeError>>()?,
        scale: finite("parameters.scale".into(), text.parameters.scale.unwrap_or(1.0))?,
        out_dtype: text.out_dtype.map(|name| one_of("out_dtype", &name, &dtypes)).transpose()?,
        rounding: one_of("rounding", text.rounding.as_deref().unwrap_or("single"), &roundings)?,
    })
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

fn check_keys(tree: &Value, place: &str, known: &[&str]) -> Result<(), RecipeError> {
    let Some(object) = tree.as_object() else {
        let (key, value, expected) = (place.to_string(), tree.to_string(), format!("keys: {}", known.join(", ")));
        return Err(RecipeError::Value { key, value, expected });
    };
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let nearest = nearest(key, known.iter().copied());
            let (key, place, known) = (key.clone(), place.to_string(), known.join(", "));
            Err(RecipeError::UnknownKey { key, place, nearest, known })
        }
    }
}

fn one_of<T: Copy>(key: &str, value: &str, known: &[(&str, T)]) -> Result<T, RecipeError> {
    known.iter().find(|(name, _)| *name == value).map(|&(_, meaning)| meaning).ok_or_else(|| RecipeError::Value {
        key: key.to_string(),
        value: format!("{value:?}"),
        expected: known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or "),
    })
}

/// The known name that is closest to `name`, if any is close.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let scored = known.map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let (score, best) = scored.max_by(|left, right| left.0.total_cmp(&right.0))?;
    (score > 0.75).then(|| best.to_string())
}
