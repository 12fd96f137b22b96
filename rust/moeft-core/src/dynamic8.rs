//! How bitsandbytes' CPU kernel finds the 8-bit code of a value, whatever the map of codes.
//!
//! [-1, 1] is cut into 65535 steps and the code nearest to the *step* is taken, not the code nearest to the value.

/// Positions of steps.
pub(crate) const STEPS: usize = 1 << 16;

/// Step of a value; what lies outside [-1, 1] takes the end of it, NaN takes step 0.
///
/// Made of what becomes vector code, unlike `clamp` and the casts of Rust: comparisons that send NaN to -1, and a sum
/// that leaves the nearest integer in the low bits.
#[inline(always)]
pub(crate) fn step(scaled: f32) -> u32 {
    const INTEGERS: f32 = (1 << 23) as f32;
    let low = if scaled > -1.0 { scaled } else { -1.0 };
    let clamped = if low < 1.0 { low } else { 1.0 };
    let position = (clamped + 1.0) * 32767.5 + 0.5;
    let nearest = position + INTEGERS;
    let is_above = nearest - INTEGERS > position;
    (nearest.to_bits() & 0x7f_ffff) - u32::from(is_above)
}

/// The code of each step.
///
/// # Arguments
/// * `map` - values of the 256 codes, ascending.
pub(crate) fn step_codes(map: &[f32; 256]) -> Vec<u8> {
    (0..=u16::MAX).map(|step| nearest(map, f32::from(step) * (2.0 / 65535.0) - 1.0)).collect()
}

/// The code nearest to `value`.
fn nearest(map: &[f32; 256], value: f32) -> u8 {
    let right = map.partition_point(|&code| code < value).clamp(1, 255);
    let left = right - 1;
    let is_right = map[right] - value < value - map[left];
    (if is_right { right } else { left }) as u8
}
