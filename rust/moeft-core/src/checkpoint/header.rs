//! The header of a safetensors file: 8 bytes of length, JSON, then tensors without holes.

use std::fmt;
use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{CheckpointError, Dtype};

/// Longest JSON that the format allows.
pub const MAX_JSON_BYTES: u64 = 100_000_000;
/// Bytes of the length in front of the JSON.
pub const LENGTH_BYTES: u64 = 8;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name on disk.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, slowest axis first.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A parsed and checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__` of the file.
    pub metadata: Vec<(String, String)>,
    /// The length and the JSON, byte for byte.
    pub raw: Vec<u8>,
}

impl Header {
    /// Checks the length field of a file of `file_bytes` and returns how long the JSON is.
    ///
    /// # Errors
    /// [`CheckpointError::HeaderTooLarge`] or [`CheckpointError::HeaderTruncated`].
    pub fn json_bytes(path: &Path, length: [u8; 8], file_bytes: u64) -> Result<u64, CheckpointError> {
        let claimed = u64::from_le_bytes(length);
        if claimed > MAX_JSON_BYTES {
            return Err(CheckpointError::HeaderTooLarge { path: path.into(), claimed });
        }
        if claimed > file_bytes.saturating_sub(LENGTH_BYTES) {
            return Err(CheckpointError::HeaderTruncated { path: path.into(), claimed, bytes: file_bytes });
        }
        Ok(claimed)
    }

    /// Parses and checks a header.
    ///
    /// # Arguments
    /// * `path`: the file, for messages only.
    /// * `raw`: the length field and the JSON.
    /// * `file_bytes`: length of the whole file.
    ///
    /// # Errors
    /// One variant of [`CheckpointError`] per cause; never panics, whatever the bytes.
    pub fn parse(path: &Path, raw: Vec<u8>, file_bytes: u64) -> Result<Self, CheckpointError> {
        let Some((length, json)) = raw.split_first_chunk::<8>() else {
            return Err(CheckpointError::TooShort { path: path.into(), bytes: file_bytes });
        };
        if Self::json_bytes(path, *length, file_bytes)? != json.len() as u64 {
            return Err(CheckpointError::HeaderTruncated {
                path: path.into(),
                claimed: u64::from_le_bytes(*length),
                bytes: raw.len() as u64,
            });
        }
        let invalid = |cause: String| CheckpointError::HeaderInvalid { path: path.into(), cause };
        if json.first() != Some(&b'{') {
            return Err(invalid("it does not start with an opening brace".into()));
        }
        let Entries(entries) = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
        let mut metadata = Vec::new();
        let mut tensors = Vec::with_capacity(entries.len());
        let mut names = std::collections::HashSet::with_capacity(entries.len());
        for (name, value) in entries {
            if !names.insert(name.clone()) {
                return Err(CheckpointError::DuplicateName { path: path.into(), name });
            }
            if name == "__metadata__" {
                let entries = Map::deserialize(value).map_err(|error| invalid(error.to_string()))?;
                for (key, value) in entries {
                    let Value::String(value) = value else {
                        return Err(invalid(format!("__metadata__.{key} is not a string")));
                    };
                    metadata.push((key, value));
                }
            } else {
                tensors.push(tensor(path, name, value, raw.len() as u64)?);
            }
        }
        tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
        let mut expected = raw.len() as u64;
        for tensor in &tensors {
            if tensor.offset != expected {
                let base = raw.len() as u64;
                let (begin, expected) = (tensor.offset - base, expected - base);
                return Err(CheckpointError::Misplaced {
                    path: path.into(),
                    name: tensor.name.clone(),
                    begin,
                    expected,
                });
            }
            expected = tensor.offset + tensor.bytes;
        }
        if expected != file_bytes {
            let base = raw.len() as u64;
            return Err(CheckpointError::WrongDataLength {
                path: path.into(),
                expected: expected - base,
                actual: file_bytes - base,
            });
        }
        Ok(Self { tensors, metadata, raw })
    }
}

/// One entry of the header, checked against itself.
fn tensor(path: &Path, name: String, value: Value, base: u64) -> Result<TensorInfo, CheckpointError> {
    #[derive(Deserialize)]
    struct Entry {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: (u64, u64),
    }
    let entry: Entry = serde_json::from_value(value)
        .map_err(|error| CheckpointError::HeaderInvalid { path: path.into(), cause: format!("{name}: {error}") })?;
    let Ok(dtype) = entry.dtype.parse::<Dtype>() else {
        return Err(CheckpointError::UnknownDtype { path: path.into(), name, dtype: entry.dtype });
    };
    let (begin, end) = entry.data_offsets;
    let length = end.checked_sub(begin).filter(|_| end.checked_add(base).is_some());
    match (dtype.bytes(&entry.shape), length) {
        (Some(bytes), Some(length)) if bytes == length => {
            Ok(TensorInfo { name, dtype, shape: entry.shape, offset: base + begin, bytes })
        }
        (_, length) => {
            let elements = entry.shape.iter().fold(1u128, |product, &size| product.saturating_mul(u128::from(size)));
            let expected = elements.saturating_mul(u128::from(dtype.bits())) / 8;
            let (dtype, actual) = (entry.dtype, length.unwrap_or(0));
            Err(CheckpointError::WrongLength { path: path.into(), name, dtype, shape: entry.shape, expected, actual })
        }
    }
}

/// The entries of a JSON object with duplicates kept, which a map would drop in silence.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
