//! Products of a few rows with packed or dense weights, in f32, where the weight is restored panel by panel.
//!
//! Rows are kept in blocks of sixteen, so that one vector holds the same column of several rows
//! ([`Rows`]); a weight element is broadcast to all of them. Three things follow. A weight is used in the
//! order in which it is stored, for `x W^T` and for `g W` alike, and never transposed or repacked. The
//! result of one product is the input of the next without a copy. And elementwise functions do not care.
//!
//! Sums run in f32, in a fixed order; the last bits differ between instruction sets, because the scalar
//! one has no fused multiply-add.
//!
//! Source of the blocking: BLIS, <https://doi.org/10.1145/2764454>.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod few;
mod floats;
mod grouped;
mod matrix;
mod multiply;
mod outer;
mod rows;
mod scalar;
mod stack;
mod vector;

pub use floats::{Floats, FloatsMut, Precision};
pub use grouped::grouped_linear;
pub(crate) use grouped::{check_offsets, tasks, Task};
pub use matrix::{Matrix, Values};
pub use multiply::{multiply, Side};
pub use outer::add_outer;
pub use rows::{Lanes, Rows, LANES};
pub(crate) use stack::check_len;
pub use stack::Stack;

use crate::isa::Isa;

/// Calls the function of that name of the file for `$isa`.
macro_rules! dispatch {
    ($isa:expr, $name:ident($($argument:expr),* $(,)?)) => {
        match $isa {
            crate::isa::Isa::Scalar => crate::gemm::scalar::$name($($argument),*),
            // SAFETY: an `Isa` value other than Scalar is only handed out where `is_available` was asked.
            #[cfg(target_arch = "x86_64")]
            crate::isa::Isa::Avx2 => unsafe { crate::gemm::avx2::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            crate::isa::Isa::Avx512 => unsafe { crate::gemm::avx512::$name($($argument),*) },
            #[cfg(not(target_arch = "x86_64"))]
            crate::isa::Isa::Avx2 | crate::isa::Isa::Avx512 => unreachable!("not available here"),
        }
    };
}
pub(crate) use dispatch;

/// Work whose loops the compiler should turn into the instructions of a set.
pub(crate) trait Kernel {
    /// What comes out.
    type Output;
    /// Does the work. Must be `#[inline(always)]`, or it is compiled without the instructions.
    fn run(self) -> Self::Output;
}

/// Does the work with the instructions of `isa`.
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    dispatch!(isa, run(kernel))
}
