//! The binary as a user runs it.

#[path = "../../moeft-core/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moeft-merge")).current_dir(folder).args(arguments).output().unwrap()
}

fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    common::save_base(&folder.path().join("base"), 2);
    common::save_adapter(&folder.path().join("adapter"), 2, 0.1);
    let recipe = "merge_method: lora\nbase_model: base\nmodels:\n- adapter: adapter\n";
    fs::write(folder.path().join("recipe.yaml"), recipe).unwrap();
    folder
}

#[test]
fn a_merge_prints_its_report() {
    let folder = prepared();
    let done = run(folder.path(), &["recipe.yaml", "--out", "text"]);
    assert!(done.status.success(), "{done:?}");
    assert!(String::from_utf8(done.stdout).unwrap().contains("tensors: 6 merged, 2 copied byte for byte"));
    let done = run(folder.path(), &["recipe.yaml", "--out", "json", "--json", "--quiet"]);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["tensors_merged"], 6);
    assert_eq!(done.stderr, b"");
    assert_eq!(common::files(&folder.path().join("text")), common::files(&folder.path().join("json")));
}

#[test]
fn exit_codes_tell_what_was_wrong() {
    let folder = prepared();
    let check = |arguments: &[&str], code, message: &str| {
        let done = run(folder.path(), arguments);
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
        assert!(!folder.path().join("out").exists());
    };
    check(&["recipe.yaml"], 2, "--out");
    check(&["missing.yaml", "--out", "out"], 3, "cannot read missing.yaml");
    fs::write(folder.path().join("typo.yaml"), "merge_metod: lora").unwrap();
    check(&["typo.yaml", "--out", "out"], 2, "did you mean \"merge_method\"");
    fs::remove_file(folder.path().join("base/model-00002-of-00002.safetensors")).unwrap();
    check(&["recipe.yaml", "--out", "out"], 1, "is named in the index but does not exist");
}

#[test]
#[cfg(target_os = "linux")]
fn a_report_that_cannot_be_printed_is_an_error() {
    let folder = prepared();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_moeft-merge"))
        .current_dir(folder.path())
        .args(["recipe.yaml", "--dry-run", "--json"])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(done.status.code(), Some(3));
    assert!(String::from_utf8(done.stderr).unwrap().contains("cannot write standard output"));
}

/// A checkpoint of zeros, most of which is a hole in the file.
fn save_zeros(folder: &Path, bytes: u64) {
    fs::create_dir_all(folder).unwrap();
    let entry = serde_json::json!({"dtype": "F32", "shape": [bytes / 4096, 1024], "data_offsets": [0, bytes]});
    let header = serde_json::json!({"model.x": entry}).to_string();
    let raw = [(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes()].concat();
    let path = folder.join("model.safetensors");
    fs::write(&path, &raw).unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(raw.len() as u64 + bytes).unwrap();
    fs::write(folder.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
}

/// A merge of large files, once it has begun to write.
fn begun(folder: &Path, out: &Path, command: &mut Command) -> std::process::Child {
    save_zeros(&folder.join("a"), 512 << 20);
    save_zeros(&folder.join("b"), 512 << 20);
    fs::write(folder.join("recipe.yaml"), "merge_method: linear\nmodels: [{model: a}, {model: b}]").unwrap();
    command.arg(folder.join("recipe.yaml")).arg("--out").arg(out).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let file = out.with_extension("partial").join("model.safetensors");
    while fs::metadata(&file).map_or(0, |file| file.len()) < 1 << 20 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before the signal");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child
}

fn send(signal: &str, child: &std::process::Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn the_signals_that_end_a_process_stop_the_merge_so_that_it_can_go_on() {
    let folder = tempfile::tempdir().unwrap();
    for signal in ["-INT", "-TERM", "-HUP"] {
        let out = folder.path().join(signal.trim_start_matches('-'));
        let child = begun(folder.path(), &out, &mut Command::new(env!("CARGO_BIN_EXE_moeft-merge")));
        send(signal, &child);
        let done = child.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(130), "{signal}: {done:?}");
        assert!(String::from_utf8(done.stderr).unwrap().contains("what is finished was kept"));
        assert!(!out.exists());
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_that_nohup_hides_does_not_stop_the_merge() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_moeft-merge")]);
    let child = begun(folder.path(), &out, &mut command);
    send("-HUP", &child);
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(out.join("model.safetensors").exists());
}

#[test]
fn a_dry_run_names_every_tensor_and_writes_nothing() {
    let folder = prepared();
    let done = run(folder.path(), &["recipe.yaml", "--dry-run", "--max-shard-size", "1KB"]);
    assert!(done.status.success(), "{done:?}");
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(text.contains("merge  model.layers.0.experts.gate_up_proj (model-00002-of-"), "{text}");
    assert!(text.contains("copy   model.layers.1.input_layernorm.weight"), "{text}");
    assert!(text.contains("lora: 8 tensors in "), "{text}");
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn help_completions_and_manual_need_no_recipe() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, part) in [
        (&["--help"][..], "merge_method: fisher_damped"),
        (&["--man"], ".TH moeft"),
        (&["--completions", "bash"], "complete -F"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let done = run(folder.path(), arguments);
        assert!(done.status.success(), "{done:?}");
        assert!(String::from_utf8(done.stdout).unwrap().contains(part), "{arguments:?}");
    }
}
