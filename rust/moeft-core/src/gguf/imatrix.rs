//! llama.cpp's importance matrix: mean squares of the inputs of each column, for every expert of a stack.
//!
//! Source: `tools/imatrix` and `tools/quantize` of llama.cpp (MIT).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::header::Header;
use super::value::{Array, Value};
use super::{GgmlType, GgufError, Spec, TensorInfo};
use crate::{Error, Result};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// A file of sums and counts, read tensor by tensor.
#[derive(Debug)]
pub struct Imatrix {
    path: PathBuf,
    file: File,
    header: Header,
    /// Name of a weight -> its sums and its counts.
    entries: BTreeMap<String, [TensorInfo; 2]>,
}

impl Imatrix {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`GgufError`] for a file that is damaged or no importance matrix; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let header = Header::read(path)?;
        let damaged = |cause: String| Error::from(GgufError::Damaged { path: path.into(), cause });
        if header.get("general.type") != Some(&Value::String("imatrix".into())) {
            return Err(damaged("general.type is not \"imatrix\", expected a file of `moeft imatrix`".into()));
        }
        let by_name: BTreeMap<&str, &TensorInfo> =
            header.tensors.iter().map(|info| (info.name.as_str(), info)).collect();
        let mut entries = BTreeMap::new();
        for (name, sums) in by_name.iter().filter_map(|(name, info)| Some((name.strip_suffix(SUMS)?, *info))) {
            let counts = by_name.get(format!("{name}{COUNTS}").as_str()).copied();
            let [rows, _] = sizes(sums);
            let fits = |counts: &&TensorInfo| {
                counts.shape.iter().product::<u64>() == rows && [sums.kind, counts.kind] == [GgmlType::F32; 2]
            };
            let Some(counts) = counts.filter(fits) else {
                return Err(damaged(format!("{name} has no counts that fit its {rows} rows, both of f32")));
            };
            entries.insert(name.to_string(), [sums.clone(), counts.clone()]);
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        Ok(Self { path: path.into(), file, header, entries })
    }

    /// What llama.cpp notes in a file that was quantised with it.
    pub fn metadata(&self) -> Vec<(String, Value)> {
        let dataset = match self.header.get("imatrix.datasets") {
            Some(Value::Array(Array::String(names))) => names.first().cloned(),
            _ => None,
        };
        let chunks = match self.header.get("imatrix.chunk_count") {
            Some(Value::Uint32(count)) => *count,
            _ => 0,
        };
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut found = vec![("quantize.imatrix.file".to_string(), Value::String(name))];
        found.extend(dataset.map(|dataset| ("quantize.imatrix.dataset".into(), Value::String(dataset))));
        found.push(("quantize.imatrix.entries_count".into(), Value::Uint32(self.entries.len() as u32)));
        found.push(("quantize.imatrix.chunks_count".into(), Value::Uint32(chunks)));
        found
    }

    /// Checks that the file is of a model with these tensors.
    ///
    /// # Errors
    /// [`GgufError::Tensor`] for a tensor of another shape, [`GgufError::Damaged`] if it knows none of them.
    pub fn check(&self, specs: &[Spec]) -> Result<()> {
        let mut known = 0;
        for (spec, [sums, _]) in specs.iter().filter_map(|spec| Some((spec, self.entries.get(&spec.name)?))) {
            let (matrices, columns) = (matrices(&spec.shape), spec.row_len());
            let found = sizes(sums);
            if found != [matrices, columns] {
                let cause = format!(
                    "{} has {found:?} matrices and columns for it, expected {:?}; it is of another model",
                    self.path.display(),
                    [matrices, columns]
                );
                return Err(GgufError::Tensor { name: spec.name.clone(), cause }.into());
            }
            known += 1;
        }
        if known == 0 {
            let cause = "none of its tensors is one of this model".to_string();
            return Err(GgufError::Damaged { path: self.path.clone(), cause }.into());
        }
        Ok(())
    }

    /// Mean squares of the inputs of a weight, matrix by matrix; none if it was not measured. A matrix that no input
    /// reached has ones, as in llama.cpp.
    ///
    /// # Errors
    /// [`GgufError::Damaged`] for sums that are negative or not finite; [`Error::Io`].
    pub fn means(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some([sums, counts]) = self.entries.get(name) else { return Ok(None) };
        let (mut means, counts) = (self.read(sums)?, self.read(counts)?);
        let columns = means.len() / counts.len().max(1);
        for (means, count) in means.chunks_exact_mut(columns.max(1)).zip(counts) {
            means.iter_mut().for_each(|mean| *mean = if count > 0.0 { *mean / count } else { 1.0 });
        }
        if means.iter().any(|mean| !mean.is_finite() || *mean < 0.0) {
            let cause = format!("{name} has means that are negative or not finite");
            return Err(GgufError::Damaged { path: self.path.clone(), cause }.into());
        }
        Ok(Some(means))
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let mut bytes = vec![0; info.bytes as usize];
        let place = self.header.data_offset + info.offset;
        self.file.read_exact_at(&mut bytes, place).map_err(Error::io("read", &self.path))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// Rows and their length.
fn sizes(info: &TensorInfo) -> [u64; 2] {
    info.shape.split_last().map_or([1, 1], |(&columns, rows)| [rows.iter().product(), columns])
}

/// Matrices of a tensor: experts of a stack, or one.
pub(super) fn matrices(shape: &[u64]) -> u64 {
    match shape {
        [outer @ .., _, _] => outer.iter().product(),
        _ => 1,
    }
}
