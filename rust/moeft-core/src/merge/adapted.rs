//! A base with one adapter added, row by row, for those who write it in a format of their own.

use std::collections::BTreeMap;
use std::path::Path;

use super::adapters::{patches, Patch};
use super::engine::check_base;
use super::factors::{Factors, Sides};
use super::recipe::Rounding;
use crate::adapter::{Adapter, AdapterError};
use crate::checkpoint::folder::Config;
use crate::checkpoint::{fingerprint, unravel, Checkpoint, Tensor};
use crate::families::Family;
use crate::float::round_trip;
use crate::names::DiskNames;
use crate::Result;

/// An adapter and the tensors of its base that it changes.
#[derive(Debug)]
pub struct Adapted {
    adapters: [Adapter; 1],
    /// By name, each with a number of its own.
    patches: BTreeMap<String, (u64, Patch)>,
}

/// The memory in which rows are changed, kept from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    sides: Sides,
    delta: Vec<f32>,
}

impl Adapted {
    /// Opens an adapter for a base.
    ///
    /// # Errors
    /// As [`super::Plan::resolve`]; [`AdapterError::WrongBase`].
    pub fn open(base: &Checkpoint, adapter: &Path) -> Result<Self> {
        let config = Config::read(&base.path)?;
        let family = Family::of_checkpoint(config.model_type(&base.path)?, base)?;
        let adapters = [Adapter::open(adapter, &family)?];
        check_base(&adapters, &fingerprint(base)?)?;
        let found = patches(&DiskNames::new(base, &family, &config), &adapters, 0, Rounding::Single)?;
        let patches = (0..).zip(found).map(|(number, (name, patch))| (name, (number, patch))).collect();
        Ok(Self { adapters, patches })
    }

    /// The file of the factors.
    pub fn weights(&self) -> &Checkpoint {
        &self.adapters[0].weights
    }

    /// What its factors are multiplied by.
    pub fn scalings(&self) -> Vec<(&str, f32)> {
        self.adapters[0].scalings()
    }

    /// Reads what several calls of [`Self::add`] for these tensors of the base need.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn load<'n>(&self, names: impl Iterator<Item = &'n str>, factors: &mut Factors) -> Result<()> {
        let patches = names.filter_map(|name| Some(&self.patches.get(name)?.1));
        factors.load(&self.adapters, patches)
    }

    /// Adds to rows `first..` of a tensor, whose values are those of the base, and rounds them to the type of the base, as
    /// a merged checkpoint has them.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; [`AdapterError::NonFinite`].
    pub fn add(
        &self,
        factors: &Factors,
        tensor: Tensor<'_>,
        first: u64,
        values: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Some((number, patch)) = self.patches.get(&tensor.info.name) else { return Ok(()) };
        let dtype = tensor.info.dtype;
        scratch.delta.resize(values.len(), 0.0);
        let rows = [first, first + values.len() as u64 / patch.cols.max(1)];
        scratch.sides.delta(factors, &self.adapters, patch, *number, rows, &mut scratch.delta)?;
        super::methods::add_base(values, &mut scratch.delta);
        for (value, sum) in values.iter_mut().zip(&scratch.delta) {
            *value = round_trip(dtype, *sum);
        }
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let (name, value) = (tensor.info.name.clone(), values[position]);
            let position = unravel(first * patch.cols + position as u64, &tensor.info.shape);
            return Err(AdapterError::NonFinite { name, value, position }.into());
        }
        Ok(())
    }
}
