//! Everything that reads bytes others wrote, as functions of bytes that say whether they were accepted. Never a panic.
//!
//! `rust/fuzz` runs the same functions under libFuzzer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moeft_core::checkpoint::folder::Config;
use moeft_core::checkpoint::stage::Stage;
use moeft_core::checkpoint::{Checkpoint, CheckpointError, Dtype, Header, StagedFile, TensorSpec};
use moeft_core::families::Family;
use moeft_core::gguf;
use moeft_core::layout::{self, Direction};
use moeft_core::merge::{self, Recipe};
use moeft_core::names::DiskNames;
use moeft_core::progress::Silent;
use moeft_core::quantize::{self, Options};
use moeft_core::Result;
use serde_json::json;

/// A parser and a document that it accepts.
pub struct Parser {
    pub name: &'static str,
    pub parse: fn(&[u8]) -> bool,
    pub valid: fn() -> Vec<u8>,
}

pub const ALL: [Parser; 9] = [
    Parser { name: "header", parse: header, valid: || json_bytes(header_json("weights")) },
    Parser { name: "weights", parse: weights, valid: || json_bytes(header_json("weights")) },
    Parser { name: "config", parse: config, valid: || CONFIG.into() },
    Parser { name: "index", parse: index, valid: || INDEX.into() },
    Parser { name: "adapter_config", parse: adapter_config, valid: || ADAPTER_CONFIG.into() },
    Parser { name: "adapter_keys", parse: adapter_keys, valid: || ADAPTER_KEYS.into() },
    Parser { name: "recipe", parse: recipe, valid: || RECIPE.into() },
    Parser { name: "journal", parse: journal, valid: valid_journal },
    Parser { name: "gguf", parse: gguf, valid: valid_gguf },
];

const CONFIG: &[u8] = br#"{"model_type": "gemma4_text", "text_config": {"num_experts": 2}, "hidden_size": 3,
"dtype": "bfloat16", "quantization_config": null}"#;
const INDEX: &[u8] =
    br#"{"metadata": {"total_size": 24}, "weight_map": {"a.0": "a.safetensors", "b.0": "b.safetensors"}}"#;
const ADAPTER_CONFIG: &[u8] = br#"{"peft_type": "LORA", "peft_version": "0.21.2", "r": 1, "lora_alpha": 3,
"rank_pattern": {"experts.down_.*": 1}, "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}"#;
const ADAPTER_KEYS: &[u8] = b"base_model.model.model.layers.0.experts.lora_A.weight 2 2
base_model.model.model.layers.0.experts.lora_B.weight 3 2
base_model.model.model.layers.0.experts.base_layer.lora_A.weight 2 3
base_model.model.model.layers.0.experts.base_layer.lora_B.weight 4 2";
const RECIPE: &[u8] = b"merge_method: lora\nbase_model: base\nmodels:\n  - adapter: a\n    parameters: {weight: 0.5}\n\
parameters: {scale: 1.0}\nout_dtype: bfloat16\nrounding: peft\n";

/// The header of a safetensors file, with and without the length in front.
pub fn header(bytes: &[u8]) -> bool {
    let path = Path::new("x");
    let _ = Header::parse(path, bytes.to_vec(), bytes.len() as u64);
    let Some((header, _)) = parse_json(bytes) else { return false };
    let specs: Vec<TensorSpec> = header.tensors.iter().map(TensorSpec::from).collect();
    let written = Header::layout(path, specs, &header.metadata).unwrap();
    let again = Header::parse(path, written.raw.clone(), written.file_bytes()).expect("we read what we write");
    again.tensors.len() == header.tensors.len()
}

/// A header that claims whatever it wants: names and shapes reach every plan.
pub fn weights(bytes: &[u8]) -> bool {
    let Some((header, file_bytes)) = parse_json(bytes) else { return false };
    if file_bytes > 1 << 20 {
        return false;
    }
    let folder = folder("weights");
    let path = folder.join("model.safetensors");
    fs::write(&path, &header.raw).unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(file_bytes).unwrap();
    let mut accepted = false;
    for (model_type, experts) in
        [("gemma4_text", Some(2)), ("gemma4_text", None), ("mixtral", Some(2)), ("gpt_oss", None)]
    {
        let config = json!({"model_type": model_type, "num_experts": experts, "num_local_experts": experts});
        fs::write(folder.join("config.json"), json_bytes(config)).unwrap();
        accepted |= plan_everything(&folder).is_ok();
    }
    accepted
}

/// `config.json`.
pub fn config(bytes: &[u8]) -> bool {
    let folder = folder("config");
    save(&folder.join("model.safetensors"), WEIGHTS);
    fs::write(folder.join("config.json"), bytes).unwrap();
    plan_everything(&folder).is_ok()
}

/// `model.safetensors.index.json`.
pub fn index(bytes: &[u8]) -> bool {
    let folder = folder("index");
    for name in ["a", "b"] {
        save(&folder.join(format!("{name}.safetensors")), &[(&format!("{name}.0"), &[3])]);
    }
    fs::write(folder.join("model.safetensors.index.json"), bytes).unwrap();
    Checkpoint::open(&folder).is_ok()
}

/// `adapter_config.json` of PEFT.
pub fn adapter_config(bytes: &[u8]) -> bool {
    adapter("adapter_config", bytes, ADAPTER_KEYS)
}

/// The keys of an adapter, one a line with the sizes of a matrix.
pub fn adapter_keys(bytes: &[u8]) -> bool {
    adapter("adapter_keys", ADAPTER_CONFIG, bytes)
}

/// A merge recipe.
pub fn recipe(bytes: &[u8]) -> bool {
    Recipe::parse(&String::from_utf8_lossy(bytes), Path::new("/")).is_ok()
}

/// The journal of an interrupted run.
pub fn journal(bytes: &[u8]) -> bool {
    let folder = folder("journal");
    let private = folder.join("out.partial/.moeft");
    fs::create_dir_all(&private).unwrap();
    fs::write(private.join("journal.jsonl"), bytes).unwrap();
    save(&folder.join("out.partial/a.safetensors"), WEIGHTS);
    let resume = || -> Result<bool> {
        let mut stage = Stage::open(&folder.join("out"), "plan")?;
        let file = ("a.safetensors".to_string(), layout(WEIGHTS));
        let mut resumed = false;
        let written = stage.write_files(vec![file], &mut Silent, |_, writer, _| {
            resumed = writer.state::<u64>(WEIGHTS[0].0).is_some();
            WEIGHTS.iter().try_for_each(|(name, shape)| {
                writer.restart(name);
                writer.append(name, &zeros(shape))
            })
        })?;
        assert_eq!(written.checksums.len(), 1);
        Ok(resumed)
    };
    resume().unwrap_or(false)
}

/// Two experts of one Gemma-4 layer.
const WEIGHTS: &[(&str, &[u64])] =
    &[("model.layers.0.experts.gate_up_proj", &[2, 4, 3]), ("model.layers.0.experts.down_proj", &[2, 3, 2])];

fn valid_journal() -> Vec<u8> {
    let folder = folder("valid-journal");
    let mut stage = Stage::open(&folder.join("out"), "plan").unwrap();
    let file = ("a.safetensors".to_string(), layout(WEIGHTS));
    let fill = |writer: &mut StagedFile<'_>| {
        WEIGHTS.iter().try_for_each(|(name, shape)| {
            writer.append(name, &zeros(shape))?;
            writer.mark(&[name], 1)
        })
    };
    stage.write_files(vec![file], &mut Silent, |_, writer, _| fill(writer)).unwrap();
    fs::read(folder.join("out.partial/.moeft/journal.jsonl")).unwrap()
}

fn adapter(name: &str, config: &[u8], keys: &[u8]) -> bool {
    let folder = folder(name);
    for part in ["base", "adapter"] {
        fs::create_dir_all(folder.join(part)).unwrap();
    }
    save(&folder.join("base/model.safetensors"), WEIGHTS);
    fs::write(folder.join("base/config.json"), CONFIG).unwrap();
    fs::write(folder.join("adapter/adapter_config.json"), config).unwrap();
    let keys = String::from_utf8_lossy(keys);
    let size = |word: &str| word.parse::<u64>().ok().map(|size| size.min(64));
    let line = |line| -> Option<(&str, [u64; 2])> {
        let mut words = str::rsplitn(line, 3, ' ');
        let (cols, rows) = (size(words.next()?)?, size(words.next()?)?);
        Some((words.next()?, [rows, cols]))
    };
    let keys: BTreeMap<&str, [u64; 2]> = keys.lines().filter_map(line).collect();
    let tensors: Vec<(&str, &[u64])> = keys.iter().map(|(key, shape)| (*key, shape.as_slice())).collect();
    save(&folder.join("adapter/adapter_model.safetensors"), &tensors);
    let text = "merge_method: lora\nbase_model: base\nmodels: [{adapter: adapter}]";
    merge::Plan::resolve(Recipe::parse(text, &folder).unwrap()).is_ok()
}

/// What every command does with a checkpoint before it writes.
fn plan_everything(folder: &Path) -> Result<()> {
    let (checkpoint, config) = (Checkpoint::open(folder)?, Config::read(folder)?);
    let _ = config.quant_method();
    let family = Family::for_model_type(config.model_type(folder)?)?;
    let names = DiskNames::new(&checkpoint, family, &config);
    let options = Options { block_size: 64, ..Options::default() };
    let plan = quantize::Plan::new(&names, &options);
    for spec in plan.iter().flat_map(|plan| &plan.jobs).flat_map(|(_, job)| job.outputs(&options)) {
        assert!(spec.dtype.bytes(&spec.shape).is_some(), "{spec:?}");
    }
    for direction in [Direction::Fuse, Direction::Unfuse] {
        if let Ok(plan) = layout::Plan::new(&names, &config, direction) {
            let made: u64 = plan.outputs.iter().map(|output| output.spec.bytes()).sum();
            let read: u64 = plan.consumed.keys().map(|name| checkpoint.get(name).unwrap().info.bytes).sum();
            assert_eq!(made, read);
        }
    }
    plan.map(drop)
}

/// A header without its length field, and the length of the file that it describes.
fn parse_json(json: &[u8]) -> Option<(Header, u64)> {
    let raw: Vec<u8> = (json.len() as u64).to_le_bytes().into_iter().chain(json.iter().copied()).collect();
    let length = raw.len() as u64;
    let file_bytes = match Header::parse(Path::new("x"), raw.clone(), length) {
        Err(CheckpointError::WrongDataLength { expected, .. }) => length + expected,
        _ => length,
    };
    Header::parse(Path::new("x"), raw, file_bytes).ok().map(|header| (header, file_bytes))
}

fn header_json(note: &str) -> serde_json::Value {
    let mut object = serde_json::Map::new();
    object.insert("__metadata__".into(), json!({"note": note}));
    let mut begin = 0;
    for (name, shape) in WEIGHTS {
        let end = begin + 4 * shape.iter().product::<u64>();
        object.insert((*name).into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
        begin = end;
    }
    object.into()
}

fn json_bytes(value: serde_json::Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn zeros(shape: &[u64]) -> Vec<u8> {
    vec![0; 4 * shape.iter().product::<u64>() as usize]
}

/// Header of a file of F32 tensors.
fn layout(tensors: &[(&str, &[u64])]) -> Header {
    let spec =
        |(name, shape): &(&str, &[u64])| TensorSpec { name: (*name).into(), dtype: Dtype::F32, shape: shape.to_vec() };
    Header::layout(Path::new("x"), tensors.iter().map(spec).collect(), &[]).unwrap()
}

/// Writes F32 tensors of zeros.
fn save(path: &Path, tensors: &[(&str, &[u64])]) {
    let header = layout(tensors);
    let data = vec![0; (header.file_bytes() - header.raw.len() as u64) as usize];
    fs::write(path, [header.raw, data].concat()).unwrap();
}

/// A folder of this thread, emptied; in memory where the system has such a place.
fn folder(name: &str) -> PathBuf {
    thread_local! {
        static ROOT: tempfile::TempDir = {
            let memory = Path::new("/dev/shm");
            let place = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
            tempfile::tempdir_in(place).unwrap()
        };
    }
    let folder = ROOT.with(|root| root.path().join(name));
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{}: {error}", folder.display()),
        _ => fs::create_dir_all(&folder).unwrap(),
    }
    folder
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) -> bool {
    gguf::Header::parse(Path::new("x"), bytes, bytes.len() as u64).is_ok()
}

/// Two keys and two tensors, written out so that no code of ours helps.
fn valid_gguf() -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    let count = |bytes: &mut Vec<u8>, count: u64| bytes.extend(count.to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    count(&mut bytes, 2);
    count(&mut bytes, 2);
    text(&mut bytes, "general.alignment");
    bytes.extend([4u32, 32].map(u32::to_le_bytes).concat());
    text(&mut bytes, "tokens");
    bytes.extend([9u32, 8].map(u32::to_le_bytes).concat());
    count(&mut bytes, 2);
    text(&mut bytes, "a");
    text(&mut bytes, "<b>");
    for (name, kind, offset) in [("norm", 0u32, 0u64), ("weight", 8, 128)] {
        text(&mut bytes, name);
        bytes.extend(1u32.to_le_bytes());
        count(&mut bytes, 32);
        bytes.extend(kind.to_le_bytes());
        count(&mut bytes, offset);
    }
    bytes.resize(bytes.len().next_multiple_of(32) + 128 + 34, 0);
    bytes
}
