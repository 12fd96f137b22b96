//! Reads the header of a GGUF file, whatever its bytes.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::value::{for_each_number, Array, Value, ARRAY, BOOL, STRING};
use super::{GgmlType, GgufError};
use crate::{Error, Result};

/// First bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Tensors start at multiples of this, unless `general.alignment` says otherwise.
pub(super) const ALIGNMENT: u64 = 32;
/// Longest header that is read: a vocabulary of a million tokens takes a tenth of it.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Most axes of a tensor.
const MAX_AXES: u32 = 4;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, as llama.cpp knows it.
    pub name: String,
    /// Sizes, slowest axis first; the file has them the other way round.
    pub shape: Vec<u64>,
    /// Type of its blocks.
    pub kind: GgmlType,
    /// First byte, counted from [`Header::data_offset`].
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A parsed and checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Keys and values in the file's order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in the file's order.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensors' bytes begin.
    pub data_offset: u64,
}

impl Header {
    /// Reads the header of the file at `path` and checks that its tensors lie inside of it, aligned and apart.
    ///
    /// # Errors
    /// [`GgufError`], one variant per cause; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let file_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        Ok(Self::parse(path, BufReader::new(file), file_bytes)?)
    }

    /// Parses a header from the beginning of `input`; `path` is for messages only.
    ///
    /// # Errors
    /// [`GgufError`]; never panics, whatever the bytes, and takes no more memory than they justify.
    pub fn parse(path: &Path, input: impl Read, file_bytes: u64) -> Result<Self, GgufError> {
        let left = file_bytes.min(MAX_HEADER_BYTES);
        let mut source = Source { path, input, left, position: 0 };
        let magic: [u8; 4] = source.bytes()?;
        if magic != MAGIC {
            return Err(GgufError::Magic { path: path.into(), found: magic });
        }
        let version = u32::from_le_bytes(source.bytes()?);
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { path: path.into(), version });
        }
        let (tensor_count, key_count) = (source.count(24)?, source.count(12)?);
        let mut metadata: Vec<(String, Value)> = Vec::new();
        let mut keys = std::collections::HashSet::new();
        for _ in 0..key_count {
            let key = source.string()?;
            if !keys.insert(key.clone()) {
                return Err(source.damaged(format!("the key {key:?} is there twice")));
            }
            let kind = u32::from_le_bytes(source.bytes()?);
            metadata.push((key, source.value(kind)?));
        }
        let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
            None => ALIGNMENT,
            Some((_, Value::Uint32(alignment))) if alignment.is_power_of_two() => u64::from(*alignment),
            Some((_, other)) => {
                return Err(source.damaged(format!("general.alignment is {other:?}, expected a power of two")))
            }
        };
        let mut tensors = Vec::new();
        let mut names = std::collections::HashSet::new();
        for _ in 0..tensor_count {
            let tensor = source.tensor()?;
            if !names.insert(tensor.name.clone()) {
                return Err(source.damaged(format!("{} is there twice", tensor.name)));
            }
            tensors.push(tensor);
        }
        let data_offset = source.position.next_multiple_of(alignment);
        let header = Self { version, metadata, tensors, data_offset };
        header.check_places(alignment, file_bytes).map_err(|cause| source.damaged(cause))?;
        Ok(header)
    }

    fn check_places(&self, alignment: u64, file_bytes: u64) -> Result<(), String> {
        let mut tensors: Vec<&TensorInfo> = self.tensors.iter().collect();
        tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
        let mut end = 0;
        for tensor in tensors {
            let (name, offset) = (&tensor.name, tensor.offset);
            if !offset.is_multiple_of(alignment) {
                return Err(format!("{name} starts at {offset}, expected a multiple of {alignment}"));
            }
            if offset < end {
                return Err(format!("{name} starts at {offset}, inside of another tensor that ends at {end}"));
            }
            let last = offset.checked_add(tensor.bytes).and_then(|last| last.checked_add(self.data_offset));
            if last.is_none_or(|last| last > file_bytes) {
                return Err(format!("{name} needs {} bytes at {offset}, past the end of the file", tensor.bytes));
            }
            end = offset + tensor.bytes;
        }
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(known, _)| known == key).map(|(_, value)| value)
    }
}

/// What is left to read.
struct Source<'a, R> {
    path: &'a Path,
    input: R,
    left: u64,
    position: u64,
}

impl<R: Read> Source<'_, R> {
    fn damaged(&self, cause: String) -> GgufError {
        GgufError::Damaged { path: self.path.into(), cause }
    }

    fn take(&mut self, len: u64) -> Result<Vec<u8>, GgufError> {
        let cut = format!("{len} bytes are expected at {}, where {} are left", self.position, self.left);
        if len > self.left {
            return Err(self.damaged(cut));
        }
        // Grows as the bytes come in: a length alone costs no memory.
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(len).read_to_end(&mut bytes);
        if !matches!(read, Ok(count) if count as u64 == len) {
            return Err(self.damaged(cut));
        }
        self.left -= len;
        self.position += len;
        Ok(bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        Ok(self.take(N as u64)?.try_into().expect("as many as were asked for"))
    }

    /// A number of entries of at least `least` bytes each.
    fn count(&mut self, least: u64) -> Result<u64, GgufError> {
        let count = u64::from_le_bytes(self.bytes()?);
        if count.checked_mul(least).is_none_or(|bytes| bytes > self.left) {
            return Err(self.damaged(format!("{count} entries are announced, more than the file can hold")));
        }
        Ok(count)
    }

    fn string(&mut self) -> Result<String, GgufError> {
        let len = u64::from_le_bytes(self.bytes()?);
        let bytes = self.take(len)?;
        String::from_utf8(bytes).map_err(|error| self.damaged(format!("a text is not UTF-8: {error}")))
    }

    fn flag(&mut self) -> Result<bool, GgufError> {
        match self.bytes()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.damaged(format!("a truth value is {other}, expected 0 or 1"))),
        }
    }

    fn tensor(&mut self) -> Result<TensorInfo, GgufError> {
        let name = self.string()?;
        let axes = u32::from_le_bytes(self.bytes()?);
        if axes > MAX_AXES {
            return Err(self.damaged(format!("{name} has {axes} axes, expected at most {MAX_AXES}")));
        }
        let mut shape = Vec::new();
        for _ in 0..axes {
            shape.push(u64::from_le_bytes(self.bytes()?));
        }
        let id = u32::from_le_bytes(self.bytes()?);
        let offset = u64::from_le_bytes(self.bytes()?);
        let Some(kind) = GgmlType::ALL.into_iter().find(|kind| kind.id() == id) else {
            return Err(GgufError::UnknownType { path: self.path.into(), name, kind: id });
        };
        let row_len = shape.first().copied().unwrap_or(1);
        let len = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bytes = len.filter(|_| row_len.is_multiple_of(kind.block_len() as u64)).and_then(|len| kind.bytes(len));
        let Some(bytes) = bytes else {
            return Err(self.damaged(format!("{name} is {kind} of {shape:?}, which has no size")));
        };
        shape.reverse();
        Ok(TensorInfo { name, shape, kind, offset, bytes })
    }
}

macro_rules! decode {
    ($($variant:ident $type:ident $number:literal),*) => {
        impl<R: Read> Source<'_, R> {
            fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
                Ok(match kind {
                    $($number => Value::$variant($type::from_le_bytes(self.bytes()?)),)*
                    BOOL => Value::Bool(self.flag()?),
                    STRING => Value::String(self.string()?),
                    ARRAY => Value::Array(self.array()?),
                    other => return Err(self.damaged(format!("a value has the type {other}, which is not in the format"))),
                })
            }

            fn array(&mut self) -> Result<Array, GgufError> {
                let kind = u32::from_le_bytes(self.bytes()?);
                Ok(match kind {
                    $($number => Array::$variant(self.items(|source| Ok($type::from_le_bytes(source.bytes()?)))?),)*
                    BOOL => Array::Bool(self.items(Self::flag)?),
                    STRING => Array::String(self.items(Self::string)?),
                    other => return Err(self.damaged(format!("an array has items of type {other}, which moeft does not read"))),
                })
            }
        }
    };
}
for_each_number!(decode);

impl<R: Read> Source<'_, R> {
    fn items<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, GgufError>) -> Result<Vec<T>, GgufError> {
        let count = self.count(1)?;
        (0..count).map(|_| item(self)).collect()
    }
}
