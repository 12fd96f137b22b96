//! `unsafe` stands in files of one instruction set (`avx2`, `avx512`), and in the few others that are listed here.

use std::fs;
use std::path::{Path, PathBuf};

/// Other places below `rust/`, and what they need it for. Clippy asks each block for its reason.
const PLACES: &[(&str, &str)] = &[
    ("moeft-core/src/checkpoint/disk.rs", "statvfs, copy_file_range"),
    ("moeft-core/src/checkpoint/writer.rs", "sync_file_range"),
    ("moeft-core/src/gemm/few.rs", "vectors at computed places"),
    ("moeft-core/src/gemm/mod.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-core/src/gemm/scalar.rs", "vectors at the addresses that a tile gives"),
    ("moeft-core/src/gemm/vector.rs", "tiles of raw pointers: bounds checks would take a third of the time"),
    ("moeft-core/src/gguf/quants/kernel.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-core/src/merge/simd.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-core/src/nf4/kernel.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-core/src/optim/block.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-core/src/rms_norm.rs", "calls of functions compiled for AVX2 and AVX-512"),
    ("moeft-py/src/buffers.rs", "slices of Python buffers"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// Whether a line of code, comments aside, has the word.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe")
}

fn is_of_one_instruction_set(path: &str) -> bool {
    path.split(['/', '.']).any(|part| matches!(part, "avx2" | "avx512"))
}

#[test]
fn unsafe_code_stays_where_it_is_known() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for part in ["moeft-core", "moeft-py", "moeft-merge"] {
        sources(&root.join(part).join("src"), &mut files);
    }
    let mut found: Vec<String> = Vec::new();
    for file in files.iter().filter(|file| fs::read_to_string(file).unwrap().lines().any(is_unsafe)) {
        found.push(file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/"));
    }
    let listed = |path: &String| PLACES.iter().any(|(place, _)| place == path);
    let unknown: Vec<_> = found.iter().filter(|path| !listed(path) && !is_of_one_instruction_set(path)).collect();
    assert!(
        unknown.is_empty(),
        "{unknown:?} have unsafe code: move it to a file of its instruction set, or list it here"
    );
    for (place, reason) in PLACES {
        assert!(found.iter().any(|path| path == place), "{place} ({reason}) has no unsafe code any more; take it off");
    }
}

#[test]
fn comments_and_longer_words_are_no_unsafe_code() {
    assert!(is_unsafe("    unsafe { call() }"));
    assert!(!is_unsafe("#![deny(unsafe_op_in_unsafe_fn)] // unsafe"));
}
