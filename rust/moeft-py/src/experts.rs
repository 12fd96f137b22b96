//! The expert block for Python.

use std::num::NonZeroUsize;

use half::{bf16, f16};
use moeft_core::experts::{self, Block, Gate, Gradients, Lora, Routing, Stack, StackValues};
use moeft_core::gemm::{Floats, FloatsMut};
use moeft_core::nf4::Scales;
use moeft_core::parallel;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{Buffers, Input, Output, WeightElement};
use crate::error::IntoPyResult;

/// Attributes of a stack of experts; see `Stack` in `moeft/kernels/experts/cpu.py`.
#[derive(FromPyObject)]
pub struct StackArgument<'py> {
    values: Bound<'py, PyAny>,
    dtype: String,
    shape: (usize, usize, usize),
    transposed: bool,
    bias: Option<Bound<'py, PyAny>>,
    block_size: usize,
    absmax: Option<Bound<'py, PyAny>>,
    nested_absmax: Option<Bound<'py, PyAny>>,
    nested_offset: f32,
    lora_a: Option<Bound<'py, PyAny>>,
    lora_b: Option<Bound<'py, PyAny>>,
    scaling: f32,
}

/// Attributes of an expert block; see `Block` in `moeft/kernels/experts/cpu.py`.
#[derive(FromPyObject)]
pub struct BlockArgument<'py> {
    gate_up: StackArgument<'py>,
    down: StackArgument<'py>,
    gate: String,
    alpha: f32,
    limit: f32,
    interleaved: bool,
    permutation: Bound<'py, PyAny>,
    offsets: Bound<'py, PyAny>,
    weights: Bound<'py, PyAny>,
    top_k: usize,
    dtype: String,
}

/// Run tokens through their experts.
#[pyfunction]
pub fn experts_forward(
    py: Python<'_>,
    block: BlockArgument<'_>,
    x: &Bound<'_, PyAny>,
    h: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let taken = BlockBuffers::take(&mut buffers, &block)?;
    let x = FloatInput::take(&mut buffers, "x", x, &block.dtype)?;
    let mut h = h.map(|h| FloatOutput::take(&mut buffers, "h", h, &block.dtype)).transpose()?;
    let mut out = FloatOutput::take(&mut buffers, "out", out, &block.dtype)?;
    let (core_block, routing) = taken.view(&block)?;
    let (x, h, out) = (x.view(), h.as_mut().map(FloatOutput::view), out.view());
    py.detach(|| parallel::with_threads(threads, || experts::forward(&core_block, &routing, x, h, out))).into_py()
}

/// Gradients of an expert block.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn experts_backward(
    py: Python<'_>,
    block: BlockArgument<'_>,
    x: &Bound<'_, PyAny>,
    h: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    grad_x: Option<&Bound<'_, PyAny>>,
    grad_weights: &Bound<'_, PyAny>,
    grad_gate_up: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    grad_down: Option<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
    threads: NonZeroUsize,
) -> PyResult<()> {
    let mut buffers = Buffers::default();
    let taken = BlockBuffers::take(&mut buffers, &block)?;
    let x = FloatInput::take(&mut buffers, "x", x, &block.dtype)?;
    let h = FloatInput::take(&mut buffers, "h", h, &block.dtype)?;
    let grad = FloatInput::take(&mut buffers, "grad", grad, &block.dtype)?;
    let mut grad_x = grad_x.map(|g| FloatOutput::take(&mut buffers, "grad_x", g, &block.dtype)).transpose()?;
    let mut grad_weights = buffers.output::<f32>("grad_weights", grad_weights)?;
    let mut grad_gate_up = take_pair(&mut buffers, grad_gate_up.as_ref())?;
    let mut grad_down = take_pair(&mut buffers, grad_down.as_ref())?;
    let (core_block, routing) = taken.view(&block)?;
    let (x, h, grad) = (x.view(), h.view(), grad.view());
    let gradients = Gradients {
        x: grad_x.as_mut().map(FloatOutput::view),
        weights: grad_weights.slice_mut(),
        gate_up_lora: grad_gate_up.as_mut().map(|(a, b)| (a.slice_mut(), b.slice_mut())),
        down_lora: grad_down.as_mut().map(|(a, b)| (a.slice_mut(), b.slice_mut())),
    };
    py.detach(|| parallel::with_threads(threads, || experts::backward(&core_block, &routing, x, h, grad, gradients)))
        .into_py()
}

type Pair = (Output<f32>, Output<f32>);

fn take_pair(buffers: &mut Buffers, pair: Option<&(Bound<'_, PyAny>, Bound<'_, PyAny>)>) -> PyResult<Option<Pair>> {
    pair.map(|(a, b)| Ok((buffers.output("gradient of lora a", a)?, buffers.output("gradient of lora b", b)?)))
        .transpose()
}

/// Buffers of a block, in the order of its attributes.
struct BlockBuffers {
    gate_up: StackBuffers,
    down: StackBuffers,
    permutation: Input<i64>,
    offsets: Input<i32>,
    weights: Input<f32>,
}

impl BlockBuffers {
    fn take(buffers: &mut Buffers, block: &BlockArgument<'_>) -> PyResult<Self> {
        Ok(Self {
            gate_up: StackBuffers::take(buffers, &block.gate_up)?,
            down: StackBuffers::take(buffers, &block.down)?,
            permutation: buffers.input("permutation", &block.permutation)?,
            offsets: buffers.input("offsets", &block.offsets)?,
            weights: buffers.input("weights", &block.weights)?,
        })
    }

    fn view(&self, block: &BlockArgument<'_>) -> PyResult<(Block<'_>, Routing<'_>)> {
        let gate = match block.gate.as_str() {
            "silu" => Gate::Silu,
            "gelu_tanh" => Gate::GeluTanh,
            "clamped_swiglu" => Gate::ClampedSwiglu { alpha: block.alpha, limit: block.limit },
            other => return Err(PyValueError::new_err(format!("gate is {other:?}, expected one that is known"))),
        };
        let (gate_up, gate_up_lora) = self.gate_up.view(&block.gate_up);
        let (down, down_lora) = self.down.view(&block.down);
        let routing = Routing {
            permutation: self.permutation.slice(),
            offsets: self.offsets.slice(),
            weights: self.weights.slice(),
            top_k: block.top_k,
        };
        Ok((Block { gate_up, down, gate, interleaved: block.interleaved, gate_up_lora, down_lora }, routing))
    }
}

/// Buffers of one stack.
struct StackBuffers {
    values: StackInput,
    bias: Option<Input<f32>>,
    lora: Option<(Input<f32>, Input<f32>)>,
}

enum StackInput {
    Dense(FloatInput),
    Nf4 { packed: Input<u8>, absmax: Input<f32> },
    Nested { packed: Input<u8>, codes: Input<u8>, absmax2: Input<f32> },
}

impl StackBuffers {
    fn take(buffers: &mut Buffers, stack: &StackArgument<'_>) -> PyResult<Self> {
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
        let lora = match (&stack.lora_a, &stack.lora_b) {
            (Some(a), Some(b)) => Some((buffers.input("lora a", a)?, buffers.input("lora b", b)?)),
            _ => None,
        };
        Ok(Self { values, bias, lora })
    }

    fn view(&self, stack: &StackArgument<'_>) -> (Stack<'_>, Option<Lora<'_>>) {
        let (num_experts, rows, cols) = stack.shape;
        let block_size = stack.block_size;
        let values = match &self.values {
            StackInput::Dense(floats) => StackValues::Dense(floats.view()),
            StackInput::Nf4 { packed, absmax } => {
                StackValues::Nf4 { packed: packed.slice(), scales: Scales::Plain(absmax.slice()), block_size }
            }
            StackInput::Nested { packed, codes, absmax2 } => StackValues::Nf4 {
                packed: packed.slice(),
                scales: Scales::Nested {
                    codes: codes.slice(),
                    absmax2: absmax2.slice(),
                    offset: stack.nested_offset,
                    first: 0,
                },
                block_size,
            },
        };
        let bias = self.bias.as_ref().map(Input::slice);
        let core = Stack { values, num_experts, rows, cols, transposed: stack.transposed, bias };
        let lora = self.lora.as_ref().map(|(a, b)| {
            let (a, b) = (a.slice(), b.slice());
            let rank = a.len() / (num_experts * core.inputs()).max(1);
            Lora { a, b, rank, scaling: stack.scaling }
        });
        (core, lora)
    }
}

/// Values to read, of the type that `dtype` names.
enum FloatInput {
    F32(Input<f32>),
    Bf16(Input<u16>),
    F16(Input<u16>),
}

impl FloatInput {
    fn take(buffers: &mut Buffers, name: &'static str, object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "float32" => buffers.input(name, object).map(Self::F32),
            "bfloat16" => buffers.input(name, object).map(Self::Bf16),
            "float16" => buffers.input(name, object).map(Self::F16),
            other => Err(unknown_dtype(other)),
        }
    }

    fn view(&self) -> Floats<'_> {
        match self {
            Self::F32(values) => Floats::F32(values.slice()),
            Self::Bf16(values) => Floats::Bf16(bf16::view(values.slice())),
            Self::F16(values) => Floats::F16(f16::view(values.slice())),
        }
    }
}

/// Values to write, of the type that `dtype` names.
enum FloatOutput {
    F32(Output<f32>),
    Bf16(Output<u16>),
    F16(Output<u16>),
}

impl FloatOutput {
    fn take(buffers: &mut Buffers, name: &'static str, object: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Self> {
        match dtype {
            "float32" => buffers.output(name, object).map(Self::F32),
            "bfloat16" => buffers.output(name, object).map(Self::Bf16),
            "float16" => buffers.output(name, object).map(Self::F16),
            other => Err(unknown_dtype(other)),
        }
    }

    fn view(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(values) => FloatsMut::F32(values.slice_mut()),
            Self::Bf16(values) => FloatsMut::Bf16(bf16::view_mut(values.slice_mut())),
            Self::F16(values) => FloatsMut::F16(f16::view_mut(values.slice_mut())),
        }
    }
}

fn unknown_dtype(found: &str) -> PyErr {
    PyValueError::new_err(format!("dtype is {found:?}, expected \"float32\", \"bfloat16\" or \"float16\""))
}
