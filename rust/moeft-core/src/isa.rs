//! Which vector instructions the kernels use.

use std::sync::LazyLock;

use crate::{Error, Result};

/// A set of instructions that kernels are written for, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What every CPU of the target has; plain Rust, shaped for the compiler's vectoriser.
    Scalar,
    /// AVX2, FMA and F16C: x86-64 since Haswell and Zen.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VBMI: x86-64 since Ice Lake and Zen 4.
    Avx512,
}

/// Environment variable that forces a set: `scalar`, `avx2` or `avx512`. Read once.
pub const VARIABLE: &str = "MOEFT_ISA";

impl Isa {
    /// All sets, ascending.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Name as in the environment variable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has all instructions of the set.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vbmi")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }

    /// The sets that this CPU has, ascending.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The set in use: the one that `MOEFT_ISA` names, or the largest available.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the variable names no set, or one that this CPU lacks.
    pub fn active() -> Result<Self> {
        static ACTIVE: LazyLock<std::result::Result<Isa, String>> = LazyLock::new(|| {
            let asked = std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
            choose(asked.as_deref())
        });
        ACTIVE.clone().map_err(|value| {
            let names: Vec<_> = Self::available().map(Self::name).collect();
            Error::invalid(VARIABLE, value, format!("one that this CPU has: {}", names.join(", ")))
        })
    }
}

/// Whether this CPU multiplies bf16 directly: AVX512-BF16, which CPUs with AMX have too. Our kernels compute in f32.
pub fn has_bf16_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The set of that name, or the largest available; the name back if it cannot be used.
fn choose(asked: Option<&str>) -> std::result::Result<Isa, String> {
    match asked {
        None | Some("") => Ok(Isa::available().last().unwrap_or(Isa::Scalar)),
        Some(name) => Isa::available().find(|isa| isa.name() == name).ok_or_else(|| format!("{name:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_chosen_by_name_and_unknown_names_come_back() {
        assert_eq!(choose(Some("scalar")), Ok(Isa::Scalar));
        assert_eq!(choose(Some("sse9")), Err("\"sse9\"".to_owned()));
        assert_eq!(choose(None), choose(Some("")));
        assert_eq!(choose(None).map(Isa::is_available), Ok(true));
    }
}
