//! The Python extension module `moeft._core`: buffers in, one core call with the GIL released, one error table.

mod arguments;
mod buffers;
mod checkpoint;
mod cross_entropy;
mod error;
mod experts;
mod floats;
mod gguf;
mod grouped_linear;
mod isa;
mod merge;
mod nf4;
mod optim;
mod progress;
mod rms_norm;
mod routing;
mod stacks;

use pyo3::prelude::*;

/// Native core of moeft. Private: use the public functions of the `moeft` package.
#[pymodule]
mod _core {
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use super::checkpoint::{checksum, convert_layout, fingerprint, quantize_checkpoint, stamp_metadata, tensors};
    #[pymodule_export]
    use super::cross_entropy::log_probs_and_gradient;
    #[pymodule_export]
    use super::experts::{experts_backward, experts_forward};
    #[pymodule_export]
    use super::gguf::{gguf_dequantize, gguf_encode_header, gguf_header, gguf_plan, gguf_quantize, gguf_write};
    #[pymodule_export]
    use super::grouped_linear::grouped_linear;
    #[pymodule_export]
    use super::isa::{has_bf16_instructions, instruction_set};
    #[pymodule_export]
    use super::merge::{check_merge, merge_checkpoint, merge_command, plan_merge};
    #[pymodule_export]
    use super::nf4::{nf4_dequantize, nf4_first_non_finite, nf4_nest, nf4_quantize, nf4_unnest};
    #[pymodule_export]
    use super::optim::{adamw_step, blockwise_dequantize, blockwise_quantize};
    #[pymodule_export]
    use super::rms_norm::{rms_norm_backward, rms_norm_forward};
    #[pymodule_export]
    use super::routing::{bucket, load_statistics};
}
