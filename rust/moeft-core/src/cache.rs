//! How much the last-level cache of this machine holds.

use std::sync::LazyLock;

/// Taken where the system does not tell: what a core of a server has to itself, more or less.
const DEFAULT_BYTES: usize = 32 << 20;

/// Size of the largest cache of the first core, as Linux tells it; elsewhere 32 MiB.
pub fn last_level_bytes() -> usize {
    static BYTES: LazyLock<usize> = LazyLock::new(|| {
        let sizes = (0..8).filter_map(|index| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
            parse_size(std::fs::read_to_string(path).ok()?.trim())
        });
        sizes.max().filter(|&bytes| bytes > 0).unwrap_or(DEFAULT_BYTES)
    });
    *BYTES
}

/// Bytes of a size as the kernel writes it: `512K`, `32768K`, `16M`.
fn parse_size(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_kernel_writes_them() {
        let texts = ["512K", "32768K", "16M", "1G", "77"].map(parse_size);
        assert_eq!(texts, [512 << 10, 32 << 20, 16 << 20, 1 << 30, 77].map(Some));
        assert_eq!(["", "K", "12Q", "-1K", "1KK"].map(parse_size), [None; 5]);
    }

    #[test]
    fn a_cache_has_some_size() {
        assert!(last_level_bytes() > 0);
    }
}
