//! The sixteen values of a 4-bit type, and the thresholds between them.

/// A 4-bit type of bitsandbytes. Blocks, scales and bytes are the same for all; only the sixteen values differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codebook {
    /// Quantiles of N(0, 1) scaled to [-1, 1], with an exact zero; ascending.
    ///
    /// Source: QLoRA, appendix E, <https://arxiv.org/abs/2305.14314>.
    #[default]
    Nf4,
    /// Sign, two bits of exponent, one of mantissa, scaled to [-1, 1]. Index 8 is a second zero, which positive
    /// values nearest to zero take.
    Fp4,
}

impl Codebook {
    /// All codebooks.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// Name as bitsandbytes' `quant_type` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// Values of the sixteen indices.
    pub fn codes(self) -> &'static [f32; 16] {
        &self.table().codes
    }

    /// Midpoint `i` lies between the values of ranks `i` and `i + 1`, rounded to f32.
    ///
    /// A *rank* is a position in ascending order. A value on a midpoint takes the lower rank.
    pub fn midpoints(self) -> &'static [f32; 15] {
        &self.table().midpoints
    }

    /// Index of each rank.
    pub fn ranked(self) -> &'static [u8; 16] {
        &self.table().ranked
    }

    fn table(self) -> &'static Table {
        match self {
            Self::Nf4 => &Table::NF4,
            Self::Fp4 => &Table::FP4,
        }
    }
}

struct Table {
    codes: [f32; 16],
    ranked: [u8; 16],
    midpoints: [f32; 15],
}

// Digits as in the sources, so that the tables can be compared with them by eye.
#[allow(clippy::excessive_precision)]
impl Table {
    const NF4: Self = Self::new(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    );

    const FP4: Self = Self::new(
        [
            0.0,
            0.0052083334885537624,
            0.6666666865348816,
            1.0,
            0.3333333432674408,
            0.5,
            0.1666666716337204,
            0.25,
            0.0,
            -0.0052083334885537624,
            -0.6666666865348816,
            -1.0,
            -0.3333333432674408,
            -0.5,
            -0.1666666716337204,
            -0.25,
        ],
        [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
    );

    const fn new(codes: [f32; 16], ranked: [u8; 16]) -> Self {
        let mut midpoints = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            midpoints[i] = (codes[ranked[i] as usize] + codes[ranked[i + 1] as usize]) / 2.0;
            i += 1;
        }
        Self { codes, ranked, midpoints }
    }
}

/// A scale is never taken from an absolute maximum below this, so that an all-zero block divides by something.
pub(super) const MIN_ABSMAX: f32 = 1e-38;
