//! Python buffers as checked slices: element type, contiguity, alignment, write access, no overlap.

use std::ops::Range;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use moeft_core::nf4;
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The buffers of one call. Each is checked against those taken before it, so that no output
/// overlaps an input or another output.
///
/// Slices stay valid while the GIL is released, because the export keeps the memory in place. That no
/// other Python thread writes to a buffer during the call is the caller's duty, as with numpy.
#[derive(Default)]
pub struct Buffers {
    taken: Vec<Taken>,
}

struct Taken {
    name: &'static str,
    bytes: Range<usize>,
    is_output: bool,
}

/// A buffer to read.
pub struct Input<T: Element>(PyBuffer<T>);

/// A buffer to write.
pub struct Output<T: Element>(PyBuffer<T>);

impl Buffers {
    /// Takes a C-contiguous buffer of `T` to read.
    ///
    /// # Errors
    /// `TypeError` for another element type, `ValueError` if not contiguous or overlapping an output.
    pub fn input<T: Element>(&mut self, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Input<T>> {
        self.take(name, object, false).map(Input)
    }

    /// Takes a writable C-contiguous buffer of `T`.
    ///
    /// # Errors
    /// `TypeError` for another element type, `ValueError` if read-only, not contiguous or overlapping
    /// another buffer of the call.
    pub fn output<T: Element>(&mut self, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Output<T>> {
        let buffer = self.take::<T>(name, object, true)?;
        if buffer.readonly() {
            return Err(PyValueError::new_err(format!("{name} is read-only, expected a writable array")));
        }
        Ok(Output(buffer))
    }

    fn take<T: Element>(
        &mut self,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        is_output: bool,
    ) -> PyResult<PyBuffer<T>> {
        let buffer = PyBuffer::<T>::get(object).map_err(|error| {
            let expected = std::any::type_name::<T>();
            PyTypeError::new_err(format!("{name} is not an aligned array of {expected}: {}", error.value(object.py())))
        })?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err(format!("{name} is not C-contiguous; pass a contiguous copy")));
        }
        let start = buffer.buf_ptr() as usize;
        let bytes = start..start + buffer.len_bytes();
        for other in &self.taken {
            // An empty buffer may point anywhere.
            let overlaps = !bytes.is_empty() && bytes.start < other.bytes.end && other.bytes.start < bytes.end;
            if overlaps && (is_output || other.is_output) {
                return Err(PyValueError::new_err(format!(
                    "{name} and {} overlap, expected separate memory",
                    other.name
                )));
            }
        }
        self.taken.push(Taken { name, bytes, is_output });
        Ok(buffer)
    }
}

impl<T: Element> Input<T> {
    /// The values.
    pub fn slice(&self) -> &[T] {
        match self.0.as_slice_ptr() {
            // SAFETY: `take` checked type, alignment and contiguity; the export held by `self` keeps the memory
            // alive, and `Buffers` refused outputs of this call that overlap it.
            Some(values) if self.0.item_count() > 0 => unsafe { values.as_ref() },
            _ => &[],
        }
    }
}

impl<T: Element> Output<T> {
    /// The memory to fill.
    pub fn slice_mut(&mut self) -> &mut [T] {
        match self.0.as_slice_ptr() {
            // SAFETY: as for `Input::slice`; the buffer is writable, nothing else of this call overlaps it, and
            // `&mut self` allows one slice at a time.
            Some(mut values) if self.0.item_count() > 0 => unsafe { values.as_mut() },
            _ => &mut [],
        }
    }
}

/// A weight type of the core and the buffer element that carries it: Python has no bfloat16, and its
/// float16 is numpy's alone, so 16-bit floats travel as their bits in uint16 arrays.
pub trait WeightElement: nf4::Element {
    /// Element of the Python buffer.
    type Carrier: Element + Send + Sync;
    /// The carried values.
    fn view(carried: &[Self::Carrier]) -> &[Self];
    /// The carried values, to be filled.
    fn view_mut(carried: &mut [Self::Carrier]) -> &mut [Self];
}

impl WeightElement for f32 {
    type Carrier = f32;

    fn view(carried: &[f32]) -> &[f32] {
        carried
    }

    fn view_mut(carried: &mut [f32]) -> &mut [f32] {
        carried
    }
}

macro_rules! impl_carried_by_bits {
    ($($half:ty),*) => {$(
        impl WeightElement for $half {
            type Carrier = u16;

            fn view(carried: &[u16]) -> &[Self] {
                carried.reinterpret_cast()
            }

            fn view_mut(carried: &mut [u16]) -> &mut [Self] {
                carried.reinterpret_cast_mut()
            }
        }
    )*};
}
impl_carried_by_bits!(bf16, f16);
