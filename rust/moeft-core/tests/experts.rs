//! The expert block against its formula in f64; gradients against differences of that formula.

use std::num::NonZeroUsize;

use moeft_core::experts::{backward, forward, Block, Gate, Gradients, Lora, Routing};
use moeft_core::gemm::{Floats, FloatsMut, Stack, Values};
use moeft_core::parallel::with_threads;
use moeft_core::routing::bucket;
use proptest::prelude::*;

/// A block with everything: biases, adapters on both stacks.
#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    top_k: usize,
    experts: usize,
    hidden: usize,
    inner: usize,
    rank: usize,
    transposed: bool,
    interleaved: bool,
    gate: Gate,
    index: Vec<i64>,
    x: Vec<f32>,
    weights: Vec<f32>,
    gate_up: Vec<f32>,
    gate_up_bias: Vec<f32>,
    down: Vec<f32>,
    down_bias: Vec<f32>,
    factors: [Vec<f32>; 4],
    grad: Vec<f32>,
}

const SCALINGS: [f32; 2] = [0.5, 2.0];

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Values in [-1, 1).
    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (1usize..40, 1usize..4, 1usize..6, 1usize..24, 1usize..20, 1usize..4);
    let gate =
        prop_oneof![Just(Gate::Silu), Just(Gate::GeluTanh), Just(Gate::ClampedSwiglu { alpha: 1.702, limit: 0.75 })];
    (sizes, any::<bool>(), any::<bool>(), gate, 1u64..u64::MAX).prop_map(
        |((tokens, top_k, experts, hidden, inner, rank), transposed, interleaved, gate, seed)| {
            let mut random = Random(seed);
            Case {
                tokens,
                top_k,
                experts,
                hidden,
                inner,
                rank,
                transposed,
                interleaved,
                gate,
                index: (0..tokens * top_k).map(|_| (random.bits() % experts as u64) as i64).collect(),
                x: random.values(tokens * hidden),
                weights: random.values(tokens * top_k),
                gate_up: random.values(experts * 2 * inner * hidden),
                gate_up_bias: random.values(experts * 2 * inner),
                down: random.values(experts * hidden * inner),
                down_bias: random.values(experts * hidden),
                factors: [
                    random.values(experts * rank * hidden),
                    random.values(2 * inner * rank * experts),
                    random.values(experts * rank * inner),
                    random.values(hidden * rank * experts),
                ],
                grad: random.values(tokens * hidden),
            }
        },
    )
}

/// What gradients are taken of, in f64.
#[derive(Clone)]
struct Leaves {
    x: Vec<f64>,
    weights: Vec<f64>,
    factors: [Vec<f64>; 4],
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

impl Case {
    fn leaves(&self) -> Leaves {
        Leaves { x: wide(&self.x), weights: wide(&self.weights), factors: self.factors.each_ref().map(|f| wide(f)) }
    }

    /// Element (output, input) of an expert's weight with its delta.
    #[allow(clippy::too_many_arguments)]
    fn weight(&self, stack: &[f32], leaves: &Leaves, which: usize, e: usize, o: usize, i: usize) -> f64 {
        let (outputs, inputs) = [(2 * self.inner, self.hidden), (self.hidden, self.inner)][which];
        let at = if self.transposed { i * outputs + o } else { o * inputs + i };
        let (a, b) = (&leaves.factors[2 * which], &leaves.factors[2 * which + 1]);
        let delta: f64 = (0..self.rank)
            .map(|j| b[(o * self.rank + j) * self.experts + e] * a[(e * self.rank + j) * inputs + i])
            .sum();
        f64::from(stack[e * outputs * inputs + at]) + f64::from(SCALINGS[which]) * delta
    }

    fn activation(&self, gate: f64, up: f64) -> f64 {
        let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
        match self.gate {
            Gate::Silu => gate * sigmoid(gate) * up,
            Gate::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
                0.5 * gate * (1.0 + u.tanh()) * up
            }
            Gate::ClampedSwiglu { alpha, limit } => {
                let (gate, up) = (gate.min(f64::from(limit)), up.clamp(-f64::from(limit), f64::from(limit)));
                gate * sigmoid(f64::from(alpha) * gate) * (up + 1.0)
            }
        }
    }

    fn formula(&self, leaves: &Leaves) -> Vec<f64> {
        let (hidden, inner) = (self.hidden, self.inner);
        let mut out = vec![0.0; self.tokens * hidden];
        for (row, &expert) in self.index.iter().enumerate() {
            let (token, e) = (row / self.top_k, expert as usize);
            let x = &leaves.x[token * hidden..][..hidden];
            let linear = |o: usize| -> f64 {
                let sum: f64 = (0..hidden).map(|i| self.weight(&self.gate_up, leaves, 0, e, o, i) * x[i]).sum();
                sum + f64::from(self.gate_up_bias[e * 2 * inner + o])
            };
            let h: Vec<f64> = (0..2 * inner).map(linear).collect();
            let pair = |i: usize| if self.interleaved { (h[2 * i], h[2 * i + 1]) } else { (h[i], h[inner + i]) };
            let act: Vec<f64> = (0..inner).map(|i| self.activation(pair(i).0, pair(i).1)).collect();
            for o in 0..hidden {
                let sum: f64 = (0..inner).map(|i| self.weight(&self.down, leaves, 1, e, o, i) * act[i]).sum();
                let y = sum + f64::from(self.down_bias[e * hidden + o]);
                out[token * hidden + o] += leaves.weights[row] * y;
            }
        }
        out
    }

    fn loss(&self, leaves: &Leaves) -> f64 {
        self.formula(leaves).iter().zip(&self.grad).map(|(out, &grad)| out * f64::from(grad)).sum()
    }

    /// Output, then gradients of x, weights and the four factors.
    fn run(&self, threads: usize) -> Vec<Vec<f32>> {
        let (experts, hidden, inner) = (self.experts, self.hidden, self.inner);
        let rows = self.index.len();
        let (mut permutation, mut inverse, mut offsets) = (vec![0; rows], vec![0; rows], vec![0; experts + 1]);
        bucket(&self.index, experts, &mut permutation, &mut inverse, &mut offsets).unwrap();
        let routing =
            Routing { permutation: &permutation, offsets: &offsets, weights: &self.weights, top_k: self.top_k };
        let stack = |values, bias, outputs, inputs| {
            let (rows, cols) = if self.transposed { (inputs, outputs) } else { (outputs, inputs) };
            let values = Values::Dense(Floats::F32(values));
            Stack { values, num_experts: experts, rows, cols, transposed: self.transposed, bias: Some(bias) }
        };
        let [a_up, b_up, a_down, b_down] = &self.factors;
        let block = Block {
            gate_up: stack(&self.gate_up, &self.gate_up_bias[..], 2 * inner, hidden),
            down: stack(&self.down, &self.down_bias[..], hidden, inner),
            gate: self.gate,
            interleaved: self.interleaved,
            gate_up_lora: Some(Lora { a: a_up, b: b_up, rank: self.rank, scaling: SCALINGS[0] }),
            down_lora: Some(Lora { a: a_down, b: b_down, rank: self.rank, scaling: SCALINGS[1] }),
        };
        let mut h = vec![f32::NAN; rows * 2 * inner];
        let mut results = vec![vec![f32::NAN; self.x.len()], vec![f32::NAN; self.x.len()], vec![f32::NAN; rows]];
        results.extend(self.factors.each_ref().map(|f| vec![f32::NAN; f.len()]));
        with_threads(NonZeroUsize::new(threads).unwrap(), || {
            let [out, x, weights, a_up, b_up, a_down, b_down] = &mut results[..] else { unreachable!() };
            forward(&block, &routing, Floats::F32(&self.x), Some(FloatsMut::F32(&mut h)), FloatsMut::F32(out)).unwrap();
            let gradients = Gradients {
                x: Some(FloatsMut::F32(x)),
                weights,
                gate_up_lora: Some((a_up, b_up)),
                down_lora: Some((a_down, b_down)),
            };
            backward(&block, &routing, Floats::F32(&self.x), Floats::F32(&h), Floats::F32(&self.grad), gradients)
                .unwrap();
        });
        results
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn forward_equals_the_formula_and_gradients_its_differences(case in case(), pick: u64) {
        let found = case.run(1);
        let leaves = case.leaves();
        let expected = case.formula(&leaves);
        let largest = expected.iter().fold(1.0f64, |max, v| max.max(v.abs()));
        for (found, expected) in found[0].iter().zip(&expected) {
            prop_assert!((f64::from(*found) - expected).abs() <= 1e-4 * largest, "{found} {expected}");
        }
        // One value of each leaf, at a place that the case chooses. Differences across a clamp's corner mean nothing,
        // but a corner within 1e-6 of a value is rare; both one-sided differences must then differ.
        let mut random = Random(pick | 1);
        for (which, gradients) in found[1..].iter().enumerate() {
            let at = (random.bits() % gradients.len() as u64) as usize;
            let shifted = |step: f64| {
                let mut moved = leaves.clone();
                match which {
                    0 => moved.x[at] += step,
                    1 => moved.weights[at] += step,
                    _ => moved.factors[which - 2][at] += step,
                }
                case.loss(&moved)
            };
            let (below, middle, above) = (shifted(-1e-6), shifted(0.0), shifted(1e-6));
            let (left, right) = ((middle - below) / 1e-6, (above - middle) / 1e-6);
            if (left - right).abs() > 1e-3 * (1.0 + left.abs()) {
                continue;
            }
            let expected = (above - below) / 2e-6;
            let bound = 1e-4 * expected.abs().max(largest * case.tokens as f64);
            prop_assert!((f64::from(gradients[at]) - expected).abs() <= bound, "{which}: {} {expected}", gradients[at]);
        }
    }

    #[test]
    fn every_bit_is_the_same_for_any_number_of_threads(mut case in case()) {
        // Enough rows for several tasks per expert.
        case.index = (0..700 * case.top_k).map(|i| (i * i % case.experts) as i64).collect();
        let mut random = Random(7);
        case.tokens = 700;
        case.x = random.values(700 * case.hidden);
        case.grad = random.values(700 * case.hidden);
        case.weights = random.values(700 * case.top_k);
        let bits = |results: Vec<Vec<f32>>| -> Vec<Vec<u32>> {
            results.iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect()
        };
        let one = bits(case.run(1));
        prop_assert_eq!(&one, &bits(case.run(2)));
        prop_assert_eq!(&one, &bits(case.run(3)));
    }
}
