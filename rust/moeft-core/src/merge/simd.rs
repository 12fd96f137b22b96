//! Functions compiled once for every CPU and once for AVX2 and AVX-512, chosen when they are called.
//!
//! The loops in them are plain Rust that the compiler turns into vector code. It never contracts or reorders floating
//! point, so every version gives the same bits.

use std::sync::LazyLock;

use crate::isa::Isa;

/// The set in use. The engine has refused a wrong `MOEFT_ISA` before anything is computed.
pub(super) static ACTIVE: LazyLock<Isa> = LazyLock::new(|| Isa::active().unwrap_or(Isa::Scalar));

/// Defines a function in all versions. Its body must inline what it calls.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn plain($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    plain($($argument),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    plain($($argument),*)
                }
                match *$crate::merge::simd::ACTIVE {
                    // SAFETY: the set in use is one that this CPU has.
                    $crate::isa::Isa::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::isa::Isa::Scalar => {}
                }
            }
            plain($($argument),*)
        }
    };
}
pub(super) use vectorised;
