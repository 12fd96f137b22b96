//! The parsers that the fuzz targets run: those of `tests/arbitrary_bytes.rs`.

#[path = "../../moeft-core/tests/parsers/mod.rs"]
pub mod parsers;
