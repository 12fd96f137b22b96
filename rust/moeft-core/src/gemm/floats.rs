//! Slices of float32, bfloat16 or float16, chosen at run time.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Values to read, of one of the three types.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// float32
    F32(&'a [f32]),
    /// bfloat16
    Bf16(&'a [bf16]),
    /// float16
    F16(&'a [f16]),
}

impl<'a> Floats<'a> {
    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// The values in `range`.
    pub fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[range]),
            Self::Bf16(values) => Self::Bf16(&values[range]),
            Self::F16(values) => Self::F16(&values[range]),
        }
    }

    /// Widens the values from `start` on into `out`; exact.
    #[inline(always)]
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F32(values) => out.copy_from_slice(&values[range]),
            Self::Bf16(values) => {
                for (wide, value) in out.iter_mut().zip(&values[range]) {
                    *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
            Self::F16(values) => values[range].convert_to_f32_slice(out),
        }
    }
}

/// What is kept of a value when it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// All of it.
    F32,
    /// A [`bf16`].
    Bf16,
    /// An [`f16`].
    F16,
}

/// Values to write, of one of the three types.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// float16
    F16(&'a mut [f16]),
}

impl<'a> FloatsMut<'a> {
    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Precision of the type.
    pub fn precision(&self) -> Precision {
        match self {
            Self::F32(_) => Precision::F32,
            Self::Bf16(_) => Precision::Bf16,
            Self::F16(_) => Precision::F16,
        }
    }

    /// Rounds `row` into the values from `start` on.
    pub fn write(&mut self, start: usize, row: &[f32]) {
        let range = start..start + row.len();
        match self {
            Self::F32(values) => values[range].copy_from_slice(row),
            Self::Bf16(values) => {
                for (value, &wide) in values[range].iter_mut().zip(row) {
                    *value = bf16::from_bits(crate::float::round_bf16(wide));
                }
            }
            Self::F16(values) => {
                values[range].convert_from_f32_slice(row);
            }
        }
    }

    /// Cuts the values into pieces of these lengths, which must add up.
    pub fn split(self, lengths: impl Iterator<Item = usize>) -> Vec<Self> {
        fn cut<T>(mut rest: &mut [T], lengths: impl Iterator<Item = usize>) -> impl Iterator<Item = &mut [T]> {
            lengths.map(move |len| rest.split_off_mut(..len).expect("lengths add up"))
        }
        match self {
            Self::F32(values) => cut(values, lengths).map(Self::F32).collect(),
            Self::Bf16(values) => cut(values, lengths).map(Self::Bf16).collect(),
            Self::F16(values) => cut(values, lengths).map(Self::F16).collect(),
        }
    }

    /// Lets `add` sum up in f32, from zero, and stores the sums.
    pub fn accumulate(self, add: impl FnOnce(&mut [f32])) {
        match self {
            Self::F32(values) => {
                values.fill(0.0);
                add(values);
            }
            mut narrow => {
                let mut sums = vec![0.0; narrow.len()];
                add(&mut sums);
                narrow.write(0, &sums);
            }
        }
    }
}
