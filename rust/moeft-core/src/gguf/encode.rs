//! Writes the header of a GGUF file: metadata, then the tensors' names, shapes, types and places.

use super::header::{TensorInfo, ALIGNMENT, MAGIC};
use super::value::{for_each_number, Array, Value, ARRAY, BOOL, STRING};

/// Version of the format that is written.
const VERSION: u32 = 3;

/// The header of a file, padded to where the tensors' bytes begin. Offsets are the tensors' own.
pub fn header(metadata: &[(String, Value)], tensors: &[TensorInfo]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, entry) in metadata {
        string(&mut out, key);
        value(&mut out, entry);
    }
    for tensor in tensors {
        string(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend_from_slice(&size.to_le_bytes());
        }
        out.extend_from_slice(&tensor.kind.id().to_le_bytes());
        out.extend_from_slice(&tensor.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

macro_rules! encode {
    ($($variant:ident $type:ident $number:literal),*) => {
        fn value(out: &mut Vec<u8>, value: &Value) {
            match value {
                $(Value::$variant(number) => {
                    out.extend_from_slice(&u32::to_le_bytes($number));
                    out.extend_from_slice(&number.to_le_bytes());
                })*
                Value::Bool(flag) => {
                    out.extend_from_slice(&BOOL.to_le_bytes());
                    out.push(u8::from(*flag));
                }
                Value::String(text) => {
                    out.extend_from_slice(&STRING.to_le_bytes());
                    string(out, text);
                }
                Value::Array(items) => {
                    out.extend_from_slice(&ARRAY.to_le_bytes());
                    array(out, items);
                }
            }
        }

        fn array(out: &mut Vec<u8>, array: &Array) {
            let start = |out: &mut Vec<u8>, number: u32, len: usize| {
                out.extend_from_slice(&number.to_le_bytes());
                out.extend_from_slice(&(len as u64).to_le_bytes());
            };
            match array {
                $(Array::$variant(items) => {
                    start(out, $number, items.len());
                    items.iter().for_each(|item| out.extend_from_slice(&item.to_le_bytes()));
                })*
                Array::Bool(items) => {
                    start(out, BOOL, items.len());
                    out.extend(items.iter().map(|&item| u8::from(item)));
                }
                Array::String(items) => {
                    start(out, STRING, items.len());
                    items.iter().for_each(|item| string(out, item));
                }
            }
        }
    };
}
for_each_number!(encode);
