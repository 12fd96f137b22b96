//! The weights that are written: those of a checkpoint, or of a checkpoint with an adapter added.

use std::path::Path;

use super::source::Piece;
use crate::checkpoint::{unravel, Checkpoint, CheckpointError, Tensor};
use crate::float::{decode, first_non_finite};
use crate::merge::{Adapted, Factors, Scratch};
use crate::Result;

/// Weights by name on disk.
#[derive(Debug)]
pub struct Weights {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    adapted: Option<Adapted>,
}

/// What a thread needs to read rows.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: Vec<u8>,
    scratch: Scratch,
}

impl Weights {
    /// Opens a checkpoint, and an adapter that was trained on it.
    ///
    /// # Errors
    /// [`CheckpointError`], [`crate::adapter::AdapterError`].
    pub fn open(folder: &Path, adapter: Option<&Path>) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let adapted = adapter.map(|adapter| Adapted::open(&checkpoint, adapter)).transpose()?;
        Ok(Self { checkpoint, adapted })
    }

    /// All files that are read.
    pub fn inputs(&self) -> impl Iterator<Item = &Checkpoint> {
        std::iter::once(&self.checkpoint).chain(self.adapted.iter().map(Adapted::weights))
    }

    /// What the factors of the adapter are multiplied by.
    pub fn scalings(&self) -> Option<Vec<(&str, f32)>> {
        self.adapted.as_ref().map(Adapted::scalings)
    }

    /// The tensor that a piece is cut from.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub fn tensor(&self, piece: &Piece) -> Result<Tensor<'_>> {
        self.checkpoint.get(&piece.tensor).ok_or_else(|| {
            let cause = "its architecture needs it; download or copy the checkpoint again".to_string();
            CheckpointError::MissingTensor { name: piece.tensor.clone(), cause }.into()
        })
    }

    /// Reads what [`Self::rows`] needs for these tensors.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn prepare<'n>(&self, names: impl Iterator<Item = &'n str>, factors: &mut Factors) -> Result<()> {
        self.adapted.as_ref().map_or(Ok(()), |adapted| adapted.load(names, factors))
    }

    /// Reads rows `first..` of a tensor of 16- or 32-bit floats.
    ///
    /// # Errors
    /// [`CheckpointError::NonFinite`], [`crate::Error::Io`].
    pub fn rows(
        &self,
        tensor: Tensor<'_>,
        first: u64,
        row_len: u64,
        values: &mut [f32],
        factors: &Factors,
        reader: &mut Reader,
    ) -> Result<()> {
        let (dtype, bytes) = (tensor.info.dtype, &mut reader.bytes);
        let element_bytes = dtype.bits() as usize / 8;
        bytes.resize(values.len() * element_bytes, 0);
        let start = first * row_len;
        tensor.read_at(bytes, start * element_bytes as u64)?;
        if let Some((position, value)) = first_non_finite(dtype, bytes) {
            return Err(CheckpointError::NonFinite {
                name: tensor.info.name.clone(),
                value,
                position: unravel(start + position as u64, &tensor.info.shape),
                advice: "llama.cpp refuses such a file; download the checkpoint again or repair that tensor",
            }
            .into());
        }
        decode(dtype, bytes, values);
        match &self.adapted {
            Some(adapted) => adapted.add(factors, tensor, first, values, &mut reader.scratch),
            None => Ok(()),
        }
    }
}
