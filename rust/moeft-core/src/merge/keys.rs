//! Names in a recipe: unknown ones are refused with the nearest known one.

use serde::de::DeserializeOwned;
use serde_json::Value;

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

impl RecipeError {
    /// A value that cannot be used, from anything printable.
    pub(super) fn value(key: impl ToString, value: impl ToString, expected: impl ToString) -> Self {
        Self::Value { key: key.to_string(), value: value.to_string(), expected: expected.to_string() }
    }
}

/// Refuses what is not an object, and keys that are not known.
pub(super) fn check_keys(tree: &Value, place: &str, known: &[&str]) -> Result<(), RecipeError> {
    let Some(object) = tree.as_object() else {
        return Err(RecipeError::value(place, tree, format!("keys: {}", known.join(", "))));
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

/// What stands under a key; `None` if nothing does.
pub(super) fn field<T: DeserializeOwned>(tree: &Value, key: &str, expected: &str) -> Result<Option<T>, RecipeError> {
    match tree.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => T::deserialize(value).map(Some).map_err(|_| RecipeError::value(key, value, expected)),
    }
}

/// The meaning of a word.
pub(super) fn one_of<T: Copy>(key: &str, value: &str, known: &[(&str, T)]) -> Result<T, RecipeError> {
    known.iter().find(|(name, _)| *name == value).map(|&(_, meaning)| meaning).ok_or_else(|| {
        let names = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
        RecipeError::value(key, format!("{value:?}"), names)
    })
}

/// The known name that is closest to `name`, if any is close.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let scored = known.map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let (score, best) = scored.max_by(|left, right| left.0.total_cmp(&right.0))?;
    (score > 0.75).then(|| best.to_string())
}
