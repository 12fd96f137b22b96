//! Stacks of experts, packed or dense, from Python.

use moeft_core::gemm::{Stack, Values};
use moeft_core::nf4::{Codebook, Scales};
use pyo3::prelude::*;

use crate::arguments::codebook_named;
use crate::buffers::{Buffers, Input};
use crate::floats::FloatInput;

/// Attributes of a stack of experts; see `Stack` in `moeft/kernels/grouped_linear/cpu.py`.
#[derive(FromPyObject)]
pub struct StackArgument<'py> {
    values: Bound<'py, PyAny>,
    dtype: String,
    codebook: String,
    shape: (usize, usize, usize),
    transposed: bool,
    bias: Option<Bound<'py, PyAny>>,
    block_size: usize,
    absmax: Option<Bound<'py, PyAny>>,
    nested_absmax: Option<Bound<'py, PyAny>>,
    nested_offset: f32,
}

/// Buffers of one stack.
pub struct StackBuffers {
    values: StackInput,
    codebook: Codebook,
    bias: Option<Input<f32>>,
}

enum StackInput {
    Dense(FloatInput),
    Nf4 { packed: Input<u8>, absmax: Input<f32> },
    Nested { packed: Input<u8>, codes: Input<u8>, absmax2: Input<f32> },
}

impl StackBuffers {
    /// Takes the buffers; see [`Buffers`].
    pub fn take(buffers: &mut Buffers, stack: &StackArgument<'_>) -> PyResult<Self> {
        let values = match (&stack.absmax, &stack.nested_absmax) {
            (None, _) => StackInput::Dense(FloatInput::take(buffers, "weight", &stack.values, &stack.dtype)?),
            (Some(absmax), None) => StackInput::Nf4 {
                packed: buffers.input("packed", &stack.values)?,
                absmax: buffers.input("absmax", absmax)?,
            },
            (Some(codes), Some(absmax2)) => StackInput::Nested {
                packed: buffers.input("packed", &stack.values)?,
                codes: buffers.input("absmax", codes)?,
                absmax2: buffers.input("nested absmax", absmax2)?,
            },
        };
        let bias = stack.bias.as_ref().map(|bias| buffers.input("bias", bias)).transpose()?;
        Ok(Self { values, codebook: codebook_named(&stack.codebook)?, bias })
    }

    /// The stack.
    pub fn view(&self, stack: &StackArgument<'_>) -> Stack<'_> {
        let (num_experts, rows, cols) = stack.shape;
        let (block_size, codebook) = (stack.block_size, self.codebook);
        let values = match &self.values {
            StackInput::Dense(floats) => Values::Dense(floats.view()),
            StackInput::Nf4 { packed, absmax } => {
                Values::Nf4 { packed: packed.slice(), scales: Scales::Plain(absmax.slice()), block_size, codebook }
            }
            StackInput::Nested { packed, codes, absmax2 } => {
                let (codes, absmax2, offset) = (codes.slice(), absmax2.slice(), stack.nested_offset);
                let scales = Scales::Nested { codes, absmax2, offset, first: 0 };
                Values::Nf4 { packed: packed.slice(), scales, block_size, codebook }
            }
        };
        let bias = self.bias.as_ref().map(Input::slice);
        Stack { values, num_experts, rows, cols, transposed: stack.transposed, bias }
    }
}
