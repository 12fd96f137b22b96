//! `moeft_merge.json`: what an output was made of, beside its weights.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{json, Value};

use super::plan::{Member, Plan};
use super::recipe::ModelSource;
use super::report::TensorReport;
use crate::checkpoint::folder::write_json;
use crate::checkpoint::{fingerprint, Checkpoint};
use crate::Result;

/// Name of the file.
pub const MANIFEST: &str = "moeft_merge.json";

/// An input of the merge. Folders go by their own name: where they lay is of no use elsewhere.
#[derive(Serialize)]
struct Origin {
    name: String,
    role: &'static str,
    fingerprint: String,
    #[serde(skip_serializing_if = "Value::is_null")]
    parameters: Value,
}

/// Writes the manifest. The same merge writes the same bytes.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn write(
    plan: &Plan,
    folder: &Path,
    base_fingerprint: &str,
    checksums: &BTreeMap<String, String>,
    tensors: &BTreeMap<String, TensorReport>,
) -> Result<()> {
    let recipe = &plan.recipe;
    let (name, fingerprint) = (name(&plan.base().path), base_fingerprint.to_string());
    let mut inputs = vec![Origin { name, role: "base", fingerprint, parameters: Value::Null }];
    for (model, member) in recipe.models.iter().zip(&plan.members) {
        let role = if matches!(model.source, ModelSource::Adapter(_)) { "adapter" } else { "model" };
        let checkpoint = match *member {
            Member::Checkpoint(index) => &plan.checkpoints[index].checkpoint,
            Member::Adapter(index) => &plan.adapters[index].weights,
        };
        inputs.push(origin(checkpoint, role, json!(model.parameters))?);
    }
    if let Some(fisher) = &plan.fisher {
        inputs.push(origin(fisher, "fisher", Value::Null)?);
    }
    let manifest = json!({
        "format": "moeft-merge-v1",
        "moeft": env!("CARGO_PKG_VERSION"),
        "merge_method": recipe.merge_method,
        "parameters": recipe.parameters,
        "seed": recipe.seed,
        "rounding": recipe.rounding,
        "out_dtype": recipe.out_dtype,
        "inputs": inputs,
        "outputs": checksums,
        "tensors": tensors,
    });
    write_json(&folder.join(MANIFEST), &manifest)
}

fn origin(checkpoint: &Checkpoint, role: &'static str, parameters: Value) -> Result<Origin> {
    // An adapter is opened as a file; its folder has the name.
    let path =
        if checkpoint.path.is_file() { checkpoint.path.parent().unwrap_or(&checkpoint.path) } else { &checkpoint.path };
    Ok(Origin { name: name(path), role, fingerprint: fingerprint(checkpoint)?, parameters })
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
