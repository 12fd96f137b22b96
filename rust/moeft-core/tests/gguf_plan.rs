//! Types of tensors against the choices of llama.cpp: its own dry runs of Gemma 4 26B-A4B's shapes.

use moeft_core::gguf::plan::{FileType, Rules, Weight};
use moeft_core::gguf::GgmlType;

const LAYERS: u64 = 30;
/// Layers that llama.cpp gives more bits: of 30 down projections, and of the 25 layers that have a value projection.
const DOWN: [u64; 14] = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29];
const VALUE: [u64; 13] = [0, 1, 2, 6, 9, 13, 16, 20, 24, 25, 26, 27, 28];

type Tensor = (String, Vec<u64>);

/// Tensors of Gemma 4 26B-A4B: every sixth layer is global, with 2 heads of 512 for keys and no values.
fn tensors() -> Vec<Tensor> {
    let mut found = vec![
        ("rope_freqs.weight".to_string(), vec![256]),
        ("token_embd.weight".into(), vec![262_144, 2816]),
        ("output_norm.weight".into(), vec![2816]),
    ];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[u64]| found.push((format!("blk.{layer}.{name}"), shape.to_vec()));
        let (keys, head_dim) = if layer % 6 == 5 { (2, 512) } else { (8, 256) };
        add("attn_q.weight", &[16 * head_dim, 2816]);
        add("attn_k.weight", &[keys * head_dim, 2816]);
        if layer % 6 != 5 {
            add("attn_v.weight", &[keys * head_dim, 2816]);
        }
        add("attn_output.weight", &[2816, 16 * head_dim]);
        add("attn_q_norm.weight", &[head_dim]);
        add("attn_k_norm.weight", &[head_dim]);
        add("ffn_gate.weight", &[2112, 2816]);
        add("ffn_up.weight", &[2112, 2816]);
        add("ffn_down.weight", &[2816, 2112]);
        add("ffn_gate_inp.weight", &[128, 2816]);
        add("ffn_gate_inp.scale", &[2816]);
        add("ffn_down_exps.scale", &[128]);
        add("ffn_gate_up_exps.weight", &[128, 1408, 2816]);
        add("ffn_down_exps.weight", &[128, 2816, 704]);
        add("layer_output_scale.weight", &[1]);
        for norm in ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"] {
            add(&format!("{norm}.weight"), &[2816]);
        }
        for norm in ["post_ffw_norm_1", "post_ffw_norm_2", "pre_ffw_norm_2"] {
            add(&format!("{norm}.weight"), &[2816]);
        }
    }
    found
}

fn types(tensors: &[Tensor], file_type: FileType, num_experts: u64, overrides: &[(&str, GgmlType)]) -> Vec<GgmlType> {
    let weights: Vec<Weight<'_>> =
        tensors.iter().map(|(name, shape)| Weight { name, shape, source: GgmlType::BF16 }).collect();
    let overrides: Vec<_> = overrides.iter().map(|(pattern, kind)| (pattern.to_string(), *kind)).collect();
    let overrides = Rules::overrides(&overrides).unwrap();
    Rules { file_type, num_layers: LAYERS, num_experts, overrides }.types(&weights)
}

#[test]
fn types_of_gemma4_26b_are_those_of_llama_cpp() {
    let tensors = tensors();
    assert_eq!(tensors.len(), 658);
    let plans = [
        (FileType::Q8_0, 25_600, GgmlType::Q8_0, GgmlType::Q8_0, GgmlType::Q8_0, GgmlType::Q8_0),
        (FileType::Q6_K, 21_575, GgmlType::Q6_K, GgmlType::Q8_0, GgmlType::Q8_0, GgmlType::Q6_K),
        (FileType::Q5_K_M, 18_231, GgmlType::Q5_K, GgmlType::Q5_1, GgmlType::Q8_0, GgmlType::Q6_K),
        (FileType::Q4_K_M, 16_003, GgmlType::Q4_K, GgmlType::Q5_0, GgmlType::Q8_0, GgmlType::Q6_K),
    ];
    for (file_type, mebibytes, default, down, better_down, better) in plans {
        let types = types(&tensors, file_type, 128, &[]);
        let mut values = 0;
        let mut bytes = 0;
        for ((name, shape), kind) in tensors.iter().zip(&types) {
            bytes += kind.bytes(shape.iter().product()).unwrap();
            let layer: u64 = name.split('.').nth(1).unwrap().parse().unwrap_or(0);
            let expected = match name.split('.').next_back() {
                Some("scale") => GgmlType::F32,
                _ if shape.len() < 2 || name.contains("ffn_gate_inp") => GgmlType::F32,
                _ if name.contains("ffn_down") && DOWN.contains(&layer) => better_down,
                _ if name.contains("ffn_down") => down,
                _ if name.contains("attn_v") => {
                    values += 1;
                    if VALUE.contains(&layer) {
                        better
                    } else {
                        default
                    }
                }
                _ if name == "token_embd.weight" => better,
                _ => default,
            };
            assert_eq!(*kind, expected, "{file_type:?} {name}");
        }
        assert_eq!(values, 25);
        assert_eq!((bytes as f64 / f64::from(1 << 20)).round() as u64, mebibytes, "{file_type:?}");
    }
}

#[test]
fn float_files_keep_vectors_and_routers_in_f32() {
    let tensors = tensors();
    for (file_type, kind) in
        [(FileType::F32, GgmlType::F32), (FileType::F16, GgmlType::F16), (FileType::BF16, GgmlType::BF16)]
    {
        for ((name, shape), found) in tensors.iter().zip(types(&tensors, file_type, 128, &[])) {
            let small = shape.len() < 2 || name.contains("ffn_gate_inp");
            assert_eq!(found, if small { GgmlType::F32 } else { kind }, "{name}");
        }
    }
}

#[test]
fn the_first_override_that_matches_wins_and_rows_must_still_fit() {
    let tensors = tensors();
    let overrides = [("blk\\.0\\..*exps", GgmlType::Q5_K), ("exps", GgmlType::F16), ("_norm", GgmlType::Q8_0)];
    for ((name, _), kind) in tensors.iter().zip(types(&tensors, FileType::Q4_K_M, 128, &overrides)) {
        match name.as_str() {
            "blk.0.ffn_gate_up_exps.weight" => assert_eq!(kind, GgmlType::Q5_K),
            "blk.0.ffn_down_exps.weight" => assert_eq!(kind, GgmlType::Q5_1, "704 values are no blocks of 256"),
            "blk.1.ffn_gate_up_exps.weight" => assert_eq!(kind, GgmlType::F16),
            name if name.contains("norm") => assert_eq!(kind, GgmlType::F32, "{name}"),
            _ => {}
        }
    }
    let broken = Rules::overrides(&[("(".to_string(), GgmlType::Q8_0)]).unwrap_err().to_string();
    assert!(broken.contains("a regular expression"), "{broken}");
}

#[test]
fn eight_experts_and_an_untied_head_have_rules_of_their_own() {
    let mut tensors = tensors();
    tensors.push(("output.weight".into(), vec![262_144, 2816]));
    let kind = |experts, name: &str| {
        let index = tensors.iter().position(|(known, _)| known == name).unwrap();
        types(&tensors, FileType::Q4_K_M, experts, &[])[index]
    };
    assert_eq!(kind(128, "output.weight"), GgmlType::Q6_K);
    assert_eq!(kind(128, "token_embd.weight"), GgmlType::Q4_K);
    assert_eq!(kind(8, "blk.3.attn_k.weight"), GgmlType::Q8_0);
    assert_eq!(kind(8, "blk.3.attn_v.weight"), GgmlType::Q8_0);
    assert_eq!(kind(8, "blk.3.attn_output.weight"), GgmlType::Q5_K);
}
