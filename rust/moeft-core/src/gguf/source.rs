//! Where the rows of a GGUF tensor come from: pieces of a checkpoint's tensors, or values made for it.

use serde::{Deserialize, Serialize};

use super::weights::{Reader, Weights};
use super::{GgmlType, GgufError};
use crate::checkpoint::{Dtype, Tensor};
use crate::merge::Factors;
use crate::{Error, Result};

/// Rows of one tensor of the checkpoint; all axes but the last count rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Name on disk.
    pub tensor: String,
    /// First row.
    pub first_row: u64,
    /// Number of rows.
    pub rows: u64,
}

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Name, as llama.cpp knows it.
    pub name: String,
    /// Sizes, slowest axis first.
    pub shape: Vec<u64>,
    /// Its rows, one piece after the other; empty if there are `values`.
    #[serde(default)]
    pub pieces: Vec<Piece>,
    /// Values that no tensor of the checkpoint holds.
    #[serde(default)]
    pub values: Vec<f32>,
    /// Added to every value in f32: 1 for norms whose checkpoint counts from zero.
    #[serde(default)]
    pub add: f32,
    /// Rows per head whose two halves are to alternate: llama.cpp rotates neighbours where transformers rotates halves.
    #[serde(default)]
    pub interleave: Option<u64>,
}

impl Spec {
    /// Values in a row.
    pub fn row_len(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// Number of values.
    pub fn num_values(&self) -> u64 {
        self.rows() * self.row_len()
    }

    /// The type that keeps the bits of the source.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn source_type(&self, weights: &Weights) -> Result<GgmlType> {
        self.check(weights)?;
        let dtypes = self.pieces.iter().filter_map(|piece| weights.checkpoint.get(&piece.tensor)).map(|t| t.info.dtype);
        let mut kinds = dtypes.map(|dtype| match dtype {
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            _ => GgmlType::F32,
        });
        let first = kinds.next().unwrap_or(GgmlType::F32);
        Ok(if kinds.all(|kind| kind == first) { first } else { GgmlType::F32 })
    }

    /// Checks that the checkpoint has all rows.
    ///
    /// # Errors
    /// [`crate::checkpoint::CheckpointError::MissingTensor`], [`GgufError::Tensor`].
    fn check(&self, weights: &Weights) -> Result<()> {
        let wrong = |cause: String| Error::from(GgufError::Tensor { name: self.name.clone(), cause });
        let len = self.shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let Some(len) = len.filter(|&len| len > 0 && self.shape.len() <= 4) else {
            return Err(wrong(format!("the shape is {:?}, expected one to four sizes above zero", self.shape)));
        };
        if self.pieces.is_empty() && self.values.len() as u64 != len {
            return Err(wrong(format!("has {} values, expected {len}", self.values.len())));
        }
        let mut rows = 0u64;
        for piece in &self.pieces {
            let tensor = weights.tensor(piece)?;
            let (outer, row_len) = flat(tensor);
            let end = piece.first_row.checked_add(piece.rows).filter(|&end| end <= outer);
            if row_len != self.row_len() || end.is_none() || !tensor.info.dtype.is_weight() {
                let (found, name) = (format!("{} {:?}", tensor.info.dtype, tensor.info.shape), &piece.tensor);
                let (first, count) = (piece.first_row, piece.rows);
                return Err(wrong(format!(
                    "{name} is {found}, expected 16- or 32-bit floats with rows {first} to {first} + {count} of {}; \
                     config.json is of another model",
                    self.row_len()
                )));
            }
            rows += piece.rows;
        }
        if !self.pieces.is_empty() && rows != self.rows() {
            return Err(wrong(format!("has {rows} rows, expected {}", self.rows())));
        }
        if self.interleave.is_some_and(|rows| rows == 0 || rows % 2 == 1 || !self.rows().is_multiple_of(rows)) {
            return Err(wrong(format!("{} rows are no whole heads of {:?}", self.rows(), self.interleave)));
        }
        Ok(())
    }

    /// Reads rows `first..` into `values`, whose length says how many.
    ///
    /// # Errors
    /// As [`Weights::rows`].
    pub fn read(
        &self,
        weights: &Weights,
        factors: &Factors,
        first: u64,
        values: &mut [f32],
        reader: &mut Reader,
    ) -> Result<()> {
        let row_len = self.row_len();
        let count = values.len() as u64 / row_len;
        if self.pieces.is_empty() {
            let start = (first * row_len) as usize;
            values.copy_from_slice(&self.values[start..start + values.len()]);
        } else if let Some(head) = self.interleave {
            for (row, values) in (first..).zip(values.chunks_exact_mut(row_len as usize)) {
                let place = row % head;
                self.read_rows(weights, factors, row - place + place % 2 * (head / 2) + place / 2, values, reader)?;
            }
        } else {
            let mut done = 0;
            while done < count {
                let rest = &mut values[(done * row_len) as usize..];
                done += self.read_rows(weights, factors, first + done, rest, reader)?;
            }
        }
        if self.add != 0.0 {
            values.iter_mut().for_each(|value| *value += self.add);
        }
        Ok(())
    }

    /// Reads as many rows as lie together; returns how many.
    fn read_rows(
        &self,
        weights: &Weights,
        factors: &Factors,
        row: u64,
        values: &mut [f32],
        reader: &mut Reader,
    ) -> Result<u64> {
        let mut row = row;
        let mut pieces = self.pieces.iter();
        let piece = loop {
            let piece = pieces.next().expect("the rows were counted");
            if row < piece.rows {
                break piece;
            }
            row -= piece.rows;
        };
        let row_len = self.row_len();
        let rows = (piece.rows - row).min(values.len() as u64 / row_len);
        let values = &mut values[..(rows * row_len) as usize];
        weights.rows(weights.tensor(piece)?, piece.first_row + row, row_len, values, factors, reader)?;
        Ok(rows)
    }
}

/// Rows and their length.
fn flat(tensor: Tensor<'_>) -> (u64, u64) {
    tensor.info.shape.split_last().map_or((1, 1), |(&row_len, outer)| (outer.iter().product(), row_len))
}
