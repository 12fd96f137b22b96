//! The expert block of a Mixture-of-Experts layer on the CPU: gate/up, activation, down, LoRA and combine.
//!
//! Experts are worked through in tasks of at most 256 rows. A task gathers its rows, runs them through the
//! packed weights panel by panel and adds the result to the tokens, so that neither a restored stack nor the rows
//! of all experts ever exist at once. Tasks run in parallel and are added up in order: the result does not
//! depend on the number of threads.
//!
//! Shapes: T tokens, k experts per token, R = T * k rows sorted by expert, E experts, H hidden, I expert
//! hidden, r rank.

mod backward;
mod block;
mod forward;
mod gate;
mod linear;

pub use backward::{backward, Gradients};
pub use block::{Block, Lora, Routing};
pub use forward::forward;
pub use gate::Gate;
