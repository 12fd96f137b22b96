//! The archive of a release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn package(out: &Path) -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/package.sh");
    let done = Command::new("bash").arg(script).arg(env!("CARGO_BIN_EXE_moeft-merge")).arg(out).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    PathBuf::from(String::from_utf8(done.stdout).unwrap().trim())
}

#[test]
fn the_archive_holds_a_binary_that_runs_and_its_help() {
    let folder = tempfile::tempdir().unwrap();
    let archive = package(folder.path());
    let unpack = Command::new("tar").arg("xzf").arg(&archive).current_dir(folder.path()).status().unwrap();
    assert!(unpack.success());
    let name = archive.file_name().unwrap().to_str().unwrap().trim_end_matches(".tar.gz");
    assert!(name.starts_with(&format!("moeft-merge-{}-", env!("CARGO_PKG_VERSION"))), "{name}");
    let inside = folder.path().join(name);
    let version = Command::new(inside.join("moeft-merge")).arg("--version").output().unwrap();
    assert_eq!(version.stdout, format!("moeft-merge {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
    assert!(fs::read_to_string(inside.join("moeft-merge.1")).unwrap().contains(".TH moeft-merge 1"));
    assert!(fs::read_to_string(inside.join("completions/moeft-merge.bash")).unwrap().contains("--max-shard-size"));
    assert!(inside.join("LICENSE").is_file());
}

#[test]
fn the_same_binary_gives_the_same_archive() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [first, second] = folders.each_ref().map(|folder| fs::read(package(folder.path())).unwrap());
    assert!(first == second);
}
