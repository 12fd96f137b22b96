//! What `--help` teaches beside the options.

use moeft_core::merge::Method;

/// Below the short help.
pub const SHORT: &str = "--help shows recipes of every kind and the exit codes.";

const EXIT_CODES: &str = "\
Exit codes:
  0    merged, or planned
  1    the inputs cannot be merged: what does not fit is named
  2    wrong arguments, or a recipe that cannot be used
  3    a file cannot be read or written, or the disk is too small
  130  interrupted; start the same command again to go on";

const RECIPES: &str = "\
Recipes (all keys: docs/merging.md):

  # One or more LoRA adapters into their base, any mix of ranks; normalize: true averages them.
  merge_method: lora
  base_model: ./base
  models:
    - adapter: ./sft
      parameters: {weight: 0.7}
    - adapter: ./dpo

  # Weighted average of models.
  merge_method: linear
  models:
    - {model: ./a, parameters: {weight: 0.6}}
    - {model: ./b, parameters: {weight: 0.4}}

  # Along the arc between two models; t by layer and by name of the tensor.
  merge_method: slerp
  base_model: ./a
  models: [{model: ./b}]
  parameters:
    t:
      - {filter: self_attn, value: [0, 0.5, 1]}
      - {value: 0.5}

  # Differences to a base, thinned out. dare_ties, della and breadcrumbs take the same keys.
  merge_method: ties
  base_model: ./base
  models:
    - {model: ./math, parameters: {weight: 0.5, density: 0.3}}
    - {adapter: ./code, parameters: {weight: 0.5, density: 0.5}}
  out_dtype: bfloat16

  # The average difference, held back where the base must not change.
  merge_method: fisher_damped
  base_model: ./base
  fisher: ./fisher.safetensors
  layer_importance: ./layer_importance.json
  models: [{adapter: ./sft}, {adapter: ./dpo}]";

/// Below the long help.
pub fn long() -> String {
    let line = |method: Method| {
        let spec = method.spec();
        let parameters: Vec<_> = spec.common.iter().chain(spec.per_model).copied().collect();
        let parameters = if parameters.is_empty() { String::new() } else { format!(" [{}]", parameters.join(", ")) };
        format!("  {:<17}{}{parameters}", spec.name, spec.summary)
    };
    let methods: Vec<String> = Method::ALL.into_iter().map(line).collect();
    format!("Methods [parameters]:\n{}\n\n{RECIPES}\n\n{EXIT_CODES}", methods.join("\n"))
}
