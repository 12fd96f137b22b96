//! Where an element of one expert lies in a stack.

use serde::Serialize;

use crate::families::Family;

/// How a family arranges the matrices of an expert in a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Arrangement {
    /// Inputs before outputs: `[E, H, 2I]` and `[E, I, H]`.
    pub transposed: bool,
    /// Gate and up alternate along the axis of 2I.
    pub interleaved: bool,
}

/// Sizes of one expert's matrices: `parts` of them (gate and up, or down alone), each `[outputs, inputs]`. A bias has
/// one input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Sizes {
    pub parts: u64,
    pub outputs: u64,
    pub inputs: u64,
}

/// Elements from one part, output or input to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Strides {
    pub part: u64,
    pub output: u64,
    pub input: u64,
}

impl Arrangement {
    /// That of a family. It is never guessed from shapes, which do not tell where 2I = H or I = H.
    pub fn of(family: &Family) -> Self {
        Self { transposed: family.layout.transposed, interleaved: family.layout.interleaved }
    }

    /// Strides inside one expert of a stack.
    pub(crate) fn strides(self, sizes: Sizes) -> Strides {
        let Sizes { parts, outputs, inputs } = sizes;
        match (self.transposed, self.interleaved) {
            (false, false) => Strides { part: outputs * inputs, output: inputs, input: 1 },
            (false, true) => Strides { part: inputs, output: parts * inputs, input: 1 },
            (true, false) => Strides { part: outputs, output: 1, input: parts * outputs },
            (true, true) => Strides { part: 1, output: parts, input: parts * outputs },
        }
    }

    /// Shape of a stack of that many experts; one axis less for a bias.
    pub(crate) fn shape(self, experts: u64, sizes: Sizes, is_bias: bool) -> Vec<u64> {
        let rows = sizes.parts * sizes.outputs;
        match (is_bias, self.transposed) {
            (true, _) => vec![experts, rows],
            (false, true) => vec![experts, sizes.inputs, rows],
            (false, false) => vec![experts, rows, sizes.inputs],
        }
    }
}

impl Sizes {
    /// Elements of one expert.
    pub fn elements(self) -> u64 {
        self.parts * self.outputs * self.inputs
    }

    /// Strides of a matrix that is a tensor of its own.
    pub fn matrix(self) -> Strides {
        Strides { part: self.outputs * self.inputs, output: self.inputs, input: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_arrangement_numbers_each_element_once() {
        let sizes = Sizes { parts: 2, outputs: 3, inputs: 5 };
        for (transposed, interleaved) in [(false, false), (false, true), (true, false), (true, true)] {
            let strides = Arrangement { transposed, interleaved }.strides(sizes);
            let mut places: Vec<u64> = Vec::new();
            for part in 0..2 {
                for output in 0..3 {
                    places.extend((0..5).map(|i| part * strides.part + output * strides.output + i * strides.input));
                }
            }
            places.sort_unstable();
            assert_eq!(places, (0..30).collect::<Vec<_>>(), "transposed {transposed}, interleaved {interleaved}");
        }
    }
}
