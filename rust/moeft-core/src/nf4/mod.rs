//! NF4, the 4-bit normal float of QLoRA, byte-compatible with bitsandbytes 0.50. Its FP4 too: another [`Codebook`].
//!
//! A *group* is a run of values that is quantised on its own: one expert of a stack, or a whole
//! 2-D weight. Inside a group, every `block_size` values share one f32 `absmax`; the last block may
//! be short. [`scalar`] is the definition; [`quantize`] and [`dequantize`] equal it bit for bit, whatever the
//! instruction set ([`Isa`](crate::isa::Isa)).
//!
//! Source: QLoRA, <https://arxiv.org/abs/2305.14314>; format as written by
//! <https://github.com/bitsandbytes-foundation/bitsandbytes>.
//!
//! ```
//! use moeft_core::nf4::{dequantize, quantize, Codebook, Layout, Scales};
//!
//! let layout = Layout { groups: 2, group_len: 3, block_size: 64 };
//! let values = [1.0f32, -1.0, 0.0, 2.0, -2.0, 0.0];
//! let mut packed = vec![0; layout.packed_len()];
//! let mut absmax = vec![0.0; layout.absmax_len()];
//! quantize(&values, Codebook::Nf4, layout, &mut packed, &mut absmax)?;
//! assert_eq!(packed, [0xf0, 0x77, 0xf0, 0x77]);
//! assert_eq!(absmax, [1.0, 2.0]);
//!
//! let mut restored = [0.0f32; 6];
//! dequantize(&packed, Scales::Plain(&absmax), Codebook::Nf4, layout, &mut restored)?;
//! assert_eq!(restored, values);
//! # Ok::<(), moeft_core::Error>(())
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod codebook;
mod decode;
mod dequantize;
mod dynamic_map;
mod element;
mod finite;
mod kernel;
mod layout;
mod nested;
mod portable;
mod quantize;
pub mod scalar;
mod scales;
mod stream;
#[cfg(test)]
mod tests;

pub use codebook::Codebook;
pub(crate) use decode::decode_run;
pub use dequantize::dequantize;
pub use dynamic_map::DYNAMIC_MAP;
pub use element::Element;
pub use finite::first_non_finite;
pub use layout::Layout;
pub use nested::{nest, unnest, NESTED_BLOCK_SIZE};
pub use quantize::quantize;
pub use scales::Scales;
pub use stream::GroupQuantizer;
