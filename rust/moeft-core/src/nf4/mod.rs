//! NF4, the 4-bit normal float of QLoRA, byte-compatible with bitsandbytes 0.50.
//!
//! A *group* is a run of values that is quantised on its own: one expert of a stack, or a whole
//! 2-D weight. Inside a group, every `block_size` values share one f32 `absmax`; the last block may
//! be short. [`scalar`] is the definition; [`quantize`] and [`dequantize`] equal it bit for bit.
//!
//! Source: QLoRA, <https://arxiv.org/abs/2305.14314>; format as written by
//! <https://github.com/bitsandbytes-foundation/bitsandbytes>.
//!
//! ```
//! use moeft_core::nf4::{dequantize, quantize, Layout};
//!
//! let layout = Layout { groups: 2, group_len: 3, block_size: 64 };
//! let values = [1.0f32, -1.0, 0.0, 2.0, -2.0, 0.0];
//! let mut packed = vec![0; layout.packed_len()];
//! let mut absmax = vec![0.0; layout.absmax_len()];
//! quantize(&values, layout, &mut packed, &mut absmax)?;
//! assert_eq!(packed, [0xf0, 0x77, 0xf0, 0x77]);
//! assert_eq!(absmax, [1.0, 2.0]);
//!
//! let mut restored = [0.0f32; 6];
//! dequantize(&packed, &absmax, layout, &mut restored)?;
//! assert_eq!(restored, values);
//! # Ok::<(), moeft_core::Error>(())
//! ```

mod codebook;
mod decode;
mod dequantize;
mod dynamic_map;
mod element;
mod finite;
mod layout;
mod nested;
mod quantize;
pub mod scalar;
mod stream;

pub use codebook::{CODE, MIDPOINTS};
pub(crate) use decode::decode_run;
pub use decode::Scales;
pub use dequantize::dequantize;
pub use dynamic_map::DYNAMIC_MAP;
pub use element::Element;
pub use finite::first_non_finite;
pub use layout::Layout;
pub use nested::{nest, unnest, NESTED_BLOCK_SIZE};
pub use quantize::quantize;
pub use stream::GroupQuantizer;
