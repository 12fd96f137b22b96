//! A parameter of a recipe: one value, a ramp over the layers, or values by name of tensor.

use regex_lite::Regex;
use serde::Serialize;
use serde_json::Value;

use super::keys::{check_keys, RecipeError};

/// A parameter as the recipe gives it.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Setting {
    /// A number.
    Number(f64),
    /// `true` or `false`.
    Flag(bool),
    /// A word, such as the unit of slerp.
    Word(String),
    /// Numbers spread evenly over the layers, with straight lines between them.
    Ramp(Vec<f64>),
    /// The first entry whose filter is found in the name of the tensor.
    Filtered(Vec<Filtered>),
}

/// An entry of [`Setting::Filtered`].
#[derive(Debug, Clone, Serialize)]
pub struct Filtered {
    /// A regular expression; `None` fits every name.
    filter: Option<String>,
    value: Setting,
    #[serde(skip)]
    compiled: Option<Regex>,
}

/// A value for one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar<'a> {
    Number(f64),
    Flag(bool),
    Word(&'a str),
}

impl Setting {
    /// Reads a parameter.
    ///
    /// # Errors
    /// [`RecipeError::Value`] for what is none of the forms, a number that is not finite, or a bad regular expression.
    pub(super) fn parse(key: &str, value: &Value) -> Result<Self, RecipeError> {
        let expected = "a number, true or false, a word, a list of numbers, or a list of {filter, value}";
        let wrong = || RecipeError::value(key, value, expected);
        match value {
            Value::Number(number) => number.as_f64().filter(|n| n.is_finite()).map(Self::Number).ok_or_else(wrong),
            Value::Bool(flag) => Ok(Self::Flag(*flag)),
            Value::String(word) if word.parse::<f64>().is_ok() => {
                Err(RecipeError::value(key, value, "a finite number"))
            }
            Value::String(word) => Ok(Self::Word(word.clone())),
            Value::Array(items) if items.is_empty() => Err(RecipeError::value(key, "an empty list", expected)),
            Value::Array(items) if items.iter().all(Value::is_object) => {
                let entries = items.iter().map(|item| Filtered::parse(key, item));
                Ok(Self::Filtered(entries.collect::<Result<_, _>>()?))
            }
            Value::Array(items) => {
                let number = |item: &Value| item.as_f64().filter(|n| n.is_finite()).ok_or_else(wrong);
                Ok(Self::Ramp(items.iter().map(number).collect::<Result<_, _>>()?))
            }
            Value::Null | Value::Object(_) => Err(wrong()),
        }
    }

    /// The value for the tensor `name` at `depth`: 0 for the first layer, 1 for the last.
    pub(super) fn at(&self, name: &str, depth: f64) -> Option<Scalar<'_>> {
        match self {
            Self::Number(number) => Some(Scalar::Number(*number)),
            Self::Flag(flag) => Some(Scalar::Flag(*flag)),
            Self::Word(word) => Some(Scalar::Word(word)),
            Self::Ramp(points) => {
                let place = depth * (points.len() - 1) as f64;
                let before = place.floor() as usize;
                let (left, right) = (points[before], points[(before + 1).min(points.len() - 1)]);
                Some(Scalar::Number(left + (right - left) * (place - before as f64)))
            }
            Self::Filtered(entries) => entries.iter().find(|entry| entry.fits(name))?.value.at(name, depth),
        }
    }
}

impl Filtered {
    fn parse(key: &str, item: &Value) -> Result<Self, RecipeError> {
        check_keys(item, key, &["filter", "value"])?;
        let filter = match item.get("filter") {
            None | Some(Value::Null) => None,
            Some(Value::String(filter)) if filter == "*" => None,
            Some(Value::String(filter)) => Some(filter.clone()),
            Some(other) => return Err(RecipeError::value(format!("{key}.filter"), other, "a regular expression")),
        };
        let compile = |filter: &String| {
            Regex::new(filter).map_err(|error| {
                RecipeError::value(
                    format!("{key}.filter"),
                    format!("{filter:?}"),
                    format!("a regular expression ({error})"),
                )
            })
        };
        let compiled = filter.as_ref().map(compile).transpose()?;
        let value = item.get("value").ok_or_else(|| RecipeError::value(key, item, "a value beside each filter"))?;
        Ok(Self { filter, value: Setting::parse(key, value)?, compiled })
    }

    fn fits(&self, name: &str) -> bool {
        self.compiled.as_ref().is_none_or(|regex| regex.is_match(name))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn number(value: &Value, name: &str, depth: f64) -> Option<f64> {
        match Setting::parse("t", value).unwrap().at(name, depth)? {
            Scalar::Number(number) => Some(number),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_ramp_runs_in_straight_lines_over_the_layers() {
        let ramp = json!([0, 1, 0.5]);
        let found: Vec<_> = [0.0, 0.25, 0.5, 0.75, 1.0].map(|depth| number(&ramp, "x", depth).unwrap()).into();
        assert_eq!(found, [0.0, 0.5, 1.0, 0.75, 0.5]);
        assert_eq!(number(&json!([3]), "x", 0.7), Some(3.0));
    }

    #[test]
    fn the_first_filter_that_is_found_in_the_name_counts() {
        let setting = json!([{"filter": r"layers\.\d\.self_attn", "value": [0, 1]}, {"filter": "*", "value": 0.5}]);
        assert_eq!(number(&setting, "model.layers.3.self_attn.q_proj.weight", 0.25), Some(0.25));
        assert_eq!(number(&setting, "model.layers.3.mlp.up_proj.weight", 0.25), Some(0.5));
        assert_eq!(number(&json!([{"filter": "mlp", "value": 1}]), "norm", 0.0), None);
    }

    #[test]
    fn what_is_no_parameter_is_refused() {
        for (value, part) in [
            (json!([{"filter": "(", "value": 1}]), "regular expression"),
            (json!([{"filtre": "x", "value": 1}]), "did you mean \"filter\""),
            (json!([{"filter": "x"}]), "a value beside each filter"),
            (json!([1, "x"]), "list of numbers"),
            (json!([]), "empty list"),
            (json!("NaN"), "finite"),
            (json!(null), "a number"),
        ] {
            let error = Setting::parse("t", &value).unwrap_err().to_string();
            assert!(error.contains(part), "{value}: {error}");
        }
    }
}
