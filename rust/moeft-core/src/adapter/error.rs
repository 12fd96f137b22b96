//! Every way an adapter can be unusable.

use std::path::PathBuf;

/// An adapter does not fit its base, or its layout cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The message of each variant says what it is.
pub enum AdapterError {
    #[error("{}: {cause}", path.display())]
    Config { path: PathBuf, cause: String },
    #[error("{} does not exist; an adapter folder holds adapter_config.json and adapter_model.safetensors", path.display())]
    Missing { path: PathBuf },
    #[error("{}: peft_type is {peft_type:?}, expected \"LORA\"; only LoRA adapters can be merged", path.display())]
    NotLora { path: PathBuf, peft_type: String },
    #[error("{}: {setting} is {value}: {reason}", path.display())]
    Unsupported { path: PathBuf, setting: &'static str, value: String, reason: &'static str },
    #[error("{}: peft_version is {version}, and adapters of expert stacks written before peft 0.19.1 have inputs and outputs swapped; write it in the layout of today with `moeft adapter convert --to peft`", path.display())]
    OldExpertLayout { path: PathBuf, version: String },
    #[error("{}: {mark}, so its factors of experts may lie in another order; see `moeft adapter verify`, and write it in the layout of PEFT with `moeft adapter convert --to peft`", path.display())]
    ForeignLayout { path: PathBuf, mark: String },
    #[error("{}: {module} has {levels} nested adapters but target_parameters {targets:?} name {expected} of its parameters; the adapter and its adapter_config.json do not belong together", path.display())]
    Nesting { path: PathBuf, module: String, levels: usize, targets: Vec<String>, expected: usize },
    #[error("{}: {count} keys cannot be used: {keys}; the adapter was not trained by LoRA on the modules of this family", path.display())]
    Leftover { path: PathBuf, count: usize, keys: String },
    #[error("{}: {module} is adapted, but the base has no tensor for it (looked for {name}); is this the right base model?", path.display())]
    NoTarget { path: PathBuf, module: String, name: String },
    #[error("{}: {key} is {actual:?}, expected {expected:?} to fit {tensor} {shape:?} with rank {rank}; is this the right base model?", path.display())]
    Shape {
        path: PathBuf,
        key: String,
        actual: Vec<u64>,
        expected: Vec<u64>,
        tensor: String,
        shape: Vec<u64>,
        rank: u64,
    },
    #[error("{}: {key} is {dtype}, expected F32, BF16 or F16", path.display())]
    Dtype { path: PathBuf, key: String, dtype: String },
    #[error("{}: {key} has the non-finite value {value} at {position:?}; the adapter is broken, train it again or take an earlier checkpoint of it", path.display())]
    BrokenFactor { path: PathBuf, key: String, value: f32, position: Vec<u64> },
    #[error("{} was trained on another base: it carries {expected}, the base is {actual}; merge it into the checkpoint it was trained on", path.display())]
    WrongBase { path: PathBuf, expected: String, actual: String },
    #[error(
        "{name} would become {value} at {position:?}; the base, the adapter or its weight in the recipe is broken"
    )]
    NonFinite { name: String, value: f32, position: Vec<u64> },
}
