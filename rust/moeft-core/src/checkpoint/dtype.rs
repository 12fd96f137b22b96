//! Element types of the safetensors format.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Element type. The order is that of the `safetensors` crate, which sorts tensors by it, descending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types, missing_docs)] // The names are the format's own.
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Bits of one element.
    pub fn bits(self) -> u32 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL | Self::U8 | Self::I8 => 8,
            Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 | Self::F8_E4M3FNUZ | Self::F8_E5M2FNUZ => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// Bytes of a tensor, or `None` if it is not a whole number of them or overflows.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size))?;
        let bits = elements.checked_mul(u64::from(self.bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Whether weights of this type can be computed with: F32, F16 or BF16.
    pub fn is_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Whether elements are whole numbers or booleans.
    pub fn is_integer(self) -> bool {
        use Dtype::*;
        matches!(self, BOOL | U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self:?}")
    }
}

impl FromStr for Dtype {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name)).map_err(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_equal_those_of_the_safetensors_crate() {
        for name in ["BOOL", "F4", "F6_E3M2", "U8", "F8_E4M3", "F8_E5M2FNUZ", "BF16", "F16", "I32", "C64", "U64"] {
            let theirs: safetensors::Dtype = serde_json::from_value(name.into()).unwrap();
            let ours: Dtype = name.parse().unwrap();
            assert_eq!(ours.bits() as usize, theirs.bitsize(), "{name}");
            assert_eq!(ours.to_string(), name);
        }
        assert_eq!(Dtype::F4.bytes(&[3]), None);
        assert_eq!(Dtype::BF16.bytes(&[u64::MAX, 2]), None);
    }
}
