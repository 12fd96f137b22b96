//! How evenly the experts are loaded.

use crate::{Error, Result};

/// How evenly R rows are spread over E experts. Without rows every field is 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadStatistics {
    /// Entropy of the experts' shares of the rows, in nats: `ln E` if all are equal, 0 if one expert has every row.
    pub entropy_nats: f64,
    /// Entropy divided by `ln E`, in `0..=1`; 1 for a single expert, which cannot be loaded unevenly.
    pub normalized_entropy: f64,
    /// Standard deviation of the rows per expert (of the population: divided by E) over their mean.
    pub coefficient_of_variation: f64,
}

impl LoadStatistics {
    /// From the `offsets` that [`bucket`](super::bucket) fills: an expert's count is the difference of two neighbours, so
    /// this reads E + 1 numbers and no row.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `offsets` are fewer than two, do not start at 0 or descend.
    ///
    /// ```
    /// use moeft_core::routing::LoadStatistics;
    /// let load = LoadStatistics::from_offsets(&[0, 3, 3, 4])?;
    /// assert!((load.entropy_nats - 0.5623).abs() < 1e-4);
    /// assert!((load.coefficient_of_variation - 14f64.sqrt() / 4.0).abs() < 1e-12);
    /// # Ok::<(), moeft_core::Error>(())
    /// ```
    pub fn from_offsets(offsets: &[i32]) -> Result<Self> {
        let num_experts = offsets.len().saturating_sub(1);
        if num_experts == 0 {
            return Err(Error::invalid("offsets", format!("{} long", offsets.len()), "num_experts + 1, at least 2"));
        }
        if offsets[0] != 0 {
            return Err(Error::invalid("offsets[0]", offsets[0], 0));
        }
        let (mut entropy, mut squares) = (0.0, 0.0);
        let rows = f64::from(offsets[num_experts]);
        let mean = rows / num_experts as f64;
        for pair in offsets.windows(2) {
            if pair[1] < pair[0] {
                return Err(Error::invalid("offsets", format!("{} after {}", pair[1], pair[0]), "ascending values"));
            }
            let count = f64::from(pair[1] - pair[0]);
            squares += (count - mean) * (count - mean);
            if count > 0.0 {
                entropy -= count / rows * (count / rows).ln();
            }
        }
        if rows == 0.0 {
            return Ok(Self { entropy_nats: 0.0, normalized_entropy: 0.0, coefficient_of_variation: 0.0 });
        }
        Ok(Self {
            entropy_nats: entropy,
            normalized_entropy: if num_experts == 1 { 1.0 } else { (entropy / (num_experts as f64).ln()).min(1.0) },
            coefficient_of_variation: (squares / num_experts as f64).sqrt() / mean,
        })
    }
}
