//! The Python extension module `moeft._core`: buffers in, one core call with the GIL released, one error table.

mod error;

use pyo3::prelude::*;

/// Native core of moeft. Private: use the public functions of the `moeft` package.
#[pymodule]
mod _core {
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
