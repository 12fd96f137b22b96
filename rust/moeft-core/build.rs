//! Embeds every `python/moeft/families/*.toml`: the folder is the one source, and Python reads the same files.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../python/moeft/families");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot list {}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    let mut source = String::from("&[\n");
    for path in files {
        println!("cargo:rerun-if-changed={}", path.display());
        let name = path.file_stem().unwrap().to_str().unwrap();
        let path = path.canonicalize().unwrap();
        writeln!(source, "    ({name:?}, include_str!({:?})),", path.to_str().unwrap()).unwrap();
    }
    source.push(']');
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("families.rs"), source).unwrap();
}
