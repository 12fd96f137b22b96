//! The expert block for Python.

use moeft_core::experts::{self, Block, Gate, Gradients, Lora, Routing};
use moeft_core::gemm::Stack;
use moeft_core::parallel;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arguments::thread_limit;
use crate::buffers::{Buffers, Input, Output};
use crate::error::IntoPyResult;
use crate::floats::{FloatInput, FloatOutput};
use crate::stacks::{StackArgument, StackBuffers};

/// Attributes of the low-rank factors of a stack; see `LoraFactors` in `moeft/kernels/experts/lora.py`.
#[derive(FromPyObject)]
pub struct FactorsArgument<'py> {
    a: Bound<'py, PyAny>,
    b: Bound<'py, PyAny>,
    scaling: f32,
}

/// Attributes of an expert block; see `Block` in `moeft/kernels/experts/cpu.py`.
#[derive(FromPyObject)]
pub struct BlockArgument<'py> {
    gate_up: StackArgument<'py>,
    down: StackArgument<'py>,
    gate_up_lora: Option<FactorsArgument<'py>>,
    down_lora: Option<FactorsArgument<'py>>,
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
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
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
    threads: i64,
) -> PyResult<()> {
    let threads = thread_limit(threads)?;
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
    gate_up_lora: Option<FactorBuffers>,
    down_lora: Option<FactorBuffers>,
    permutation: Input<i64>,
    offsets: Input<i32>,
    weights: Input<f32>,
}

impl BlockBuffers {
    fn take(buffers: &mut Buffers, block: &BlockArgument<'_>) -> PyResult<Self> {
        Ok(Self {
            gate_up: StackBuffers::take(buffers, &block.gate_up)?,
            down: StackBuffers::take(buffers, &block.down)?,
            gate_up_lora: FactorBuffers::take(buffers, block.gate_up_lora.as_ref())?,
            down_lora: FactorBuffers::take(buffers, block.down_lora.as_ref())?,
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
        let (gate_up, down) = (self.gate_up.view(&block.gate_up), self.down.view(&block.down));
        let gate_up_lora = lora_of(self.gate_up_lora.as_ref(), block.gate_up_lora.as_ref(), &gate_up);
        let down_lora = lora_of(self.down_lora.as_ref(), block.down_lora.as_ref(), &down);
        let routing = Routing {
            permutation: self.permutation.slice(),
            offsets: self.offsets.slice(),
            weights: self.weights.slice(),
            top_k: block.top_k,
        };
        Ok((Block { gate_up, down, gate, interleaved: block.interleaved, gate_up_lora, down_lora }, routing))
    }
}

/// Buffers of the factors of one stack.
struct FactorBuffers {
    a: Input<f32>,
    b: Input<f32>,
}

impl FactorBuffers {
    fn take(buffers: &mut Buffers, factors: Option<&FactorsArgument<'_>>) -> PyResult<Option<Self>> {
        factors
            .map(|factors| {
                Ok(Self { a: buffers.input("lora a", &factors.a)?, b: buffers.input("lora b", &factors.b)? })
            })
            .transpose()
    }
}

fn lora_of<'a>(
    factors: Option<&'a FactorBuffers>,
    argument: Option<&FactorsArgument<'_>>,
    stack: &Stack<'_>,
) -> Option<Lora<'a>> {
    factors.zip(argument).map(|(factors, argument)| {
        let (a, b) = (factors.a.slice(), factors.b.slice());
        let rank = a.len() / (stack.num_experts * stack.inputs()).max(1);
        Lora { a, b, rank, scaling: argument.scaling }
    })
}
