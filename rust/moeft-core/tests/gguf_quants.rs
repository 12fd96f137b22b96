//! GGUF blocks against those of ggml (`tests/vectors`), on every instruction set that the CPU has.

use std::num::NonZeroUsize;

use moeft_core::gguf::{quants, GgmlType};
use moeft_core::isa::Isa;
use moeft_core::parallel::with_threads;
use proptest::prelude::*;
use serde_json::Value;

fn bytes(value: &Value) -> Vec<u8> {
    let hex = value.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    bytes(value).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn blocks(isa: Isa, kind: GgmlType, values: &[f32], row_len: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut out = vec![0xaa; kind.bytes(values.len() as u64).unwrap() as usize];
    quants::quantize_with(isa, kind, values, row_len, importance, &mut out).unwrap();
    out
}

#[test]
fn blocks_equal_those_of_ggml() {
    let path = format!("{}/../../tests/vectors/gguf_blocks.json", env!("CARGO_MANIFEST_DIR"));
    let document: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let row_len = document["row_len"].as_u64().unwrap() as usize;
    let importance = floats(&document["importance"]);
    for case in document["cases"].as_array().unwrap() {
        let values = floats(&case["values"]);
        for (field, importance) in [("plain", None), ("weighted", Some(importance.as_slice()))] {
            for (name, expected) in case[field].as_object().unwrap() {
                let kind: GgmlType = name.parse().unwrap();
                for isa in Isa::available() {
                    let found = blocks(isa, kind, &values, row_len, importance);
                    assert!(found == bytes(expected), "{} {field} {name} {}", case["name"], isa.name());
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let values: Vec<f32> = (0..256 * 1024).map(|i| ((i * 2_654_435_761u64) % 1009) as f32 / 504.0 - 1.0).collect();
    let importance = vec![0.5; 512];
    for kind in [GgmlType::Q8_0, GgmlType::Q5_1] {
        let made = [1, 2, 3].map(|threads| {
            let mut out = vec![0; kind.bytes(values.len() as u64).unwrap() as usize];
            with_threads(NonZeroUsize::new(threads).unwrap(), || {
                quants::quantize_rows(kind, &values, 512, Some(&importance), &mut out).unwrap();
            });
            out
        });
        assert!(made[0] == made[1] && made[0] == made[2], "{kind}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (values, mut out) = ([1.0; 64], [0; 68]);
    let mut quantize = |kind, row_len, importance: Option<&[f32]>, len: usize| {
        quants::quantize(kind, &values, row_len, importance, &mut out[..len]).map_err(|error| error.to_string())
    };
    assert_eq!(quantize(GgmlType::Q8_0, 32, None, 68), Ok(()));
    for (kind, row_len, importance, len, expected) in [
        (GgmlType::Q8_0, 48, None, 68, "row_len is 48, expected a multiple of 32"),
        (GgmlType::Q8_0, 0, None, 68, "row_len is 0"),
        (GgmlType::Q4_K, 64, None, 36, "row_len is 64, expected a multiple of 256"),
        (GgmlType::Q8_0, 32, None, 67, "bytes is 67 long, expected 68"),
        (GgmlType::Q8_0, 32, Some(&[1.0f32; 3][..]), 68, "importance is 3 values, expected 32"),
    ] {
        let error = quantize(kind, row_len, importance, len).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let large = [1e9; 32];
    for kind in [GgmlType::F16, GgmlType::Q8_0] {
        let error = quants::quantize(kind, &large, 32, None, &mut out[..kind.bytes(32).unwrap() as usize]).unwrap_err();
        assert!(error.to_string().contains("scales"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any finite values: all instruction sets agree, and a value comes back within a step of the format.
    #[test]
    fn all_instruction_sets_agree(
        values in prop::collection::vec(-1e4f32..1e4, 512),
        exponent in -40i32..1,
        importance in prop::option::of(prop::collection::vec(0f32..4.0, 256)),
    ) {
        let values: Vec<f32> = values.iter().map(|value| value * 10f32.powi(exponent)).collect();
        for kind in GgmlType::ALL {
            let first = blocks(Isa::Scalar, kind, &values, 256, importance.as_deref());
            for isa in Isa::available() {
                prop_assert_eq!(&first, &blocks(isa, kind, &values, 256, importance.as_deref()), "{} {}", kind, isa.name());
            }
            let mut back = vec![f32::NAN; values.len()];
            quants::dequantize(kind, &first, &mut back).unwrap();
            prop_assert!(back.iter().all(|value| value.is_finite()));
        }
    }
}
