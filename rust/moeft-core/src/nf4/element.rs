//! The floating-point types a weight can have.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    /// Which type it is, for code that reads and writes vectors of it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Kind {
        F32,
        Bf16,
        F16,
    }

    pub trait Sealed: Copy + Default + Send + Sync + 'static {
        /// The implementing type.
        const KIND: Kind;
        /// Largest magnitude, widened exactly; NaN if any value is NaN, 0 for no values.
        fn absmax(values: &[Self]) -> f32;
        /// Widens `values` exactly into `out`, which is as long.
        fn widen(values: &[Self], out: &mut [f32]);
        /// Whether the value is infinite or NaN.
        fn is_non_finite(self) -> bool;
    }
}
pub(super) use sealed::{Kind, Sealed};

/// A floating-point type of weights: `f32`, [`half::bf16`] or [`half::f16`]. Sealed.
pub trait Element: sealed::Sealed {
    /// Exact conversion to f32.
    fn to_f32(self) -> f32;
    /// Nearest value of this type, ties to even.
    fn from_f32(value: f32) -> Self;
}

// Magnitudes are compared as the integers of their bits: the order is the same, NaN comes out on top
// (f32::max would drop it), and integer maxima vectorise without a NaN check.

impl Element for f32 {
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Sealed for f32 {
    const KIND: Kind = Kind::F32;

    #[inline]
    fn absmax(values: &[Self]) -> f32 {
        f32::from_bits(values.iter().fold(0, |max, v| max.max((v.to_bits() & 0x7fff_ffff) as i32)) as u32)
    }

    #[inline]
    fn widen(values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }

    #[inline]
    fn is_non_finite(self) -> bool {
        self.to_bits() & 0x7f80_0000 == 0x7f80_0000
    }
}

impl Element for bf16 {
    #[inline]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Sealed for bf16 {
    const KIND: Kind = Kind::Bf16;

    #[inline]
    fn absmax(values: &[Self]) -> f32 {
        bf16::from_bits(magnitude_max(values.iter().map(|v| v.to_bits()))).to_f32()
    }

    #[inline]
    fn widen(values: &[Self], out: &mut [f32]) {
        for (wide, &value) in out.iter_mut().zip(values) {
            *wide = Element::to_f32(value);
        }
    }

    #[inline]
    fn is_non_finite(self) -> bool {
        self.to_bits() & 0x7f80 == 0x7f80
    }
}

impl Element for f16 {
    #[inline]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Sealed for f16 {
    const KIND: Kind = Kind::F16;

    #[inline]
    fn absmax(values: &[Self]) -> f32 {
        f16::from_bits(magnitude_max(values.iter().map(|v| v.to_bits()))).to_f32()
    }

    #[inline]
    fn widen(values: &[Self], out: &mut [f32]) {
        values.convert_to_f32_slice(out);
    }

    #[inline]
    fn is_non_finite(self) -> bool {
        self.to_bits() & 0x7c00 == 0x7c00
    }
}

/// Largest of 16-bit floats without their sign bit. Signed maxima are in the x86-64 baseline, unsigned ones are not.
#[inline]
fn magnitude_max(bits: impl Iterator<Item = u16>) -> u16 {
    bits.fold(0i16, |max, b| max.max((b & 0x7fff) as i16)) as u16
}
