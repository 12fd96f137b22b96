//! Every way a checkpoint can be unusable.

use std::path::PathBuf;

/// A checkpoint is incomplete, damaged, or not what the operation needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The message of each variant says what it is.
pub enum CheckpointError {
    #[error("{} is {bytes} bytes long, too short for a safetensors file; download or copy it again", path.display())]
    TooShort { path: PathBuf, bytes: u64 },
    #[error("{}: the header claims {claimed} bytes, more than the 100 MB that safetensors allows; this is not a safetensors file or it is damaged", path.display())]
    HeaderTooLarge { path: PathBuf, claimed: u64 },
    #[error("{}: the header claims {claimed} bytes but the file ends after {bytes}; the file is truncated, download or copy it again", path.display())]
    HeaderTruncated { path: PathBuf, claimed: u64, bytes: u64 },
    #[error("{}: the header is not a JSON object of tensors: {cause}; the file is damaged, download or copy it again", path.display())]
    HeaderInvalid { path: PathBuf, cause: String },
    #[error("{}: the header names {name:?} twice; the file is damaged", path.display())]
    DuplicateName { path: PathBuf, name: String },
    #[error("{}: {name} has the dtype {dtype:?}, which moeft does not know; a newer moeft may", path.display())]
    UnknownDtype { path: PathBuf, name: String, dtype: String },
    #[error("{}: {name} is {dtype} {shape:?}, {expected} bytes, but its offsets span {actual}; the file is damaged", path.display())]
    WrongLength { path: PathBuf, name: String, dtype: String, shape: Vec<u64>, expected: u128, actual: u64 },
    #[error("{}: {name} starts at byte {begin} of the data, expected {expected}; the tensors overlap or leave a hole, the file is damaged", path.display())]
    Misplaced { path: PathBuf, name: String, begin: u64, expected: u64 },
    #[error("{}: the tensors need {expected} bytes of data but the file has {actual}; the file is truncated or damaged, download or copy it again", path.display())]
    WrongDataLength { path: PathBuf, expected: u64, actual: u64 },
    #[error("{}: {found}; expected model.safetensors, or model.safetensors.index.json and its shards", path.display())]
    NoWeights { path: PathBuf, found: String },
    #[error("{}: not the index of a sharded checkpoint: {cause}", path.display())]
    IndexInvalid { path: PathBuf, cause: String },
    #[error("{} is named in the index but does not exist; download or copy that shard again", path.display())]
    MissingShard { path: PathBuf },
    #[error("{}: the index says that {name} is here, but the shard does not hold it; index and shards are of different checkpoints", path.display())]
    AbsentTensor { path: PathBuf, name: String },
    #[error("{name} is in {} and again in {}; remove the shard that does not belong to this checkpoint", first.display(), second.display())]
    DuplicateTensor { name: String, first: PathBuf, second: PathBuf },
    #[error("{}: {cause}", path.display())]
    Config { path: PathBuf, cause: String },
    #[error("{} is packed already (quantization_config.quant_method is {method:?}); {advice}", path.display())]
    AlreadyQuantized { path: PathBuf, method: String, advice: &'static str },
    #[error("{name} is missing from the checkpoint: {cause}")]
    MissingTensor { name: String, cause: String },
    #[error("{name} is {actual}, expected {expected}; {advice}")]
    UnexpectedTensor { name: String, actual: String, expected: String, advice: &'static str },
    #[error("{name} has the non-finite value {value} at {position:?}; {advice}")]
    NonFinite { name: String, value: f32, position: Vec<u64>, advice: &'static str },
    #[error("{} exists and is not empty; choose another name or remove it, moeft never overwrites", path.display())]
    OutputExists { path: PathBuf },
    #[error("{} has no name to write under; give the output folder a name of its own", path.display())]
    OutputUnnamed { path: PathBuf },
    #[error("{} is being written by another process; wait for it or stop it", path.display())]
    Locked { path: PathBuf },
    #[error("{} holds an interrupted run of another plan: the recipe, the options or an input changed; delete that folder to start over", path.display())]
    PlanChanged { path: PathBuf },
    #[error("{} needs {needed} more bytes but its disk has {available} free; free {} bytes or choose another disk", path.display(), needed - available)]
    NoSpace { path: PathBuf, needed: u64, available: u64 },
}
