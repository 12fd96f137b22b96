//! Random numbers by place: the same for any order of reading and any number of threads.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The increment of SplitMix64.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A stream of random numbers that can be read at any place.
///
/// Number `i` is what SplitMix64 (Steele et al., <https://doi.org/10.1145/2660193.2660195>) gives at its step `i + 1` from
/// a state that is the XXH3 of the tensor's name, with `seed + model * STEP` as its seed.
#[derive(Debug, Clone, Copy)]
pub struct Stream(u64);

impl Stream {
    /// The stream of a model's tensor.
    pub fn new(seed: u64, tensor: &str, model: usize) -> Self {
        Self(xxh3_64_with_seed(tensor.as_bytes(), seed.wrapping_add((model as u64).wrapping_mul(STEP))))
    }

    /// Whether the event of that probability happens at place `index`, to 32 bits.
    #[inline(always)]
    pub fn happens(self, index: u64, probability: f64) -> bool {
        (self.at(index) >> 32) < (probability * 4_294_967_296.0) as u64
    }

    #[inline(always)]
    fn at(self, index: u64) -> u64 {
        let state = self.0.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP));
        let state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ state >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_splitmix64() {
        // The first numbers of the published generator from the state 1234567.
        let stream = Stream(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([0, 1, 2].map(|index| stream.at(index)), expected);
    }

    #[test]
    fn events_happen_as_often_as_asked() {
        let stream = Stream::new(0, "model.norm.weight", 1);
        for probability in [0.0, 0.1, 0.5, 1.0] {
            let count = (0..100_000).filter(|&index| stream.happens(index, probability)).count() as f64;
            // Five standard deviations.
            assert!((count - 1e5 * probability).abs() <= 5.0 * (1e5 * probability * (1.0 - probability)).sqrt());
        }
    }
}
