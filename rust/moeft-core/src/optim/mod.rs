//! Optimisers on the host.
//!
//! ```
//! use moeft_core::optim::{adamw_step, Gradients, Hyperparameters, Moments, Parameters};
//!
//! let (mut weights, gradients) = ([1.0f32, -1.0], [0.5f32, -0.25]);
//! let (mut exp_avg, mut exp_avg_sq) = ([0.0f32; 2], [0.0f32; 2]);
//! let moments = Moments::F32 { exp_avg: &mut exp_avg, exp_avg_sq: &mut exp_avg_sq };
//! let rate = Hyperparameters { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
//! adamw_step(Parameters::F32(&mut weights), Gradients::F32(&gradients), moments, rate, 1)?;
//! // The first step of Adam is the learning rate, against the sign of the gradient.
//! assert!((weights[0] - 0.9).abs() < 1e-6 && (weights[1] + 0.9).abs() < 1e-6);
//! # Ok::<(), moeft_core::Error>(())
//! ```

mod adamw;
mod block;
mod buffers;
mod quantized;
mod unsigned_map;

pub use adamw::{adamw_step, Hyperparameters};
pub use buffers::{Gradients, Moments, Parameters};
pub use quantized::{Code, Quantized, BLOCK_SIZE};
pub use unsigned_map::UNSIGNED_DYNAMIC_MAP;
