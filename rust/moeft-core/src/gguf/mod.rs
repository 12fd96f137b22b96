//! GGUF, the model files of llama.cpp: block formats, header, type plans and a streaming writer.

mod encode;
mod error;
pub mod export;
mod finished;
mod header;
mod imatrix;
pub mod plan;
pub mod quants;
mod shards;
mod source;
mod types;
mod value;
mod weights;
mod writer;

pub use encode::header as encode_header;
pub use error::GgufError;
pub use header::{Header, TensorInfo};
pub use imatrix::Imatrix;
pub use source::{Piece, Spec};
pub use types::GgmlType;
pub use value::{Array, Value};
pub use weights::Weights;
