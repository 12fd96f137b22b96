//! Values of GGUF metadata.

use serde::{Deserialize, Serialize};

/// A value and its type, as JSON `{"type": "uint32", "value": 3}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "value", rename_all = "lowercase", deny_unknown_fields)]
#[allow(missing_docs)] // The names are the format's own.
pub enum Value {
    Uint8(u8),
    Int8(i8),
    Uint16(u16),
    Int16(i16),
    Uint32(u32),
    Int32(i32),
    Float32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    Uint64(u64),
    Int64(i64),
    Float64(f64),
}

/// Values of one type. Arrays of arrays are in the format, but nobody writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "value", rename_all = "lowercase", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum Array {
    Uint8(Vec<u8>),
    Int8(Vec<i8>),
    Uint16(Vec<u16>),
    Int16(Vec<i16>),
    Uint32(Vec<u32>),
    Int32(Vec<i32>),
    Float32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Uint64(Vec<u64>),
    Int64(Vec<i64>),
    Float64(Vec<f64>),
}

/// Calls a macro with every type of number: variant, Rust's type, number in the file.
macro_rules! for_each_number {
    ($call:ident) => {
        $call! {
            Uint8 u8 0, Int8 i8 1, Uint16 u16 2, Int16 i16 3, Uint32 u32 4, Int32 i32 5, Float32 f32 6,
            Uint64 u64 10, Int64 i64 11, Float64 f64 12
        }
    };
}
pub(super) use for_each_number;

/// Number of the type `Bool` in a file.
pub(super) const BOOL: u32 = 7;
/// Number of the type `String` in a file.
pub(super) const STRING: u32 = 8;
/// Number of the type `Array` in a file.
pub(super) const ARRAY: u32 = 9;
