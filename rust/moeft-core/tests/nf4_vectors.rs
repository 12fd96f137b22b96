//! NF4 against bytes written by bitsandbytes (`tests/vectors`).

use half::{bf16, f16};
use moeft_core::nf4::{self, scalar, Codebook, Element, GroupQuantizer, Layout, Scales};
use serde_json::Value;

fn vectors(name: &str) -> Value {
    let path = format!("{}/../../tests/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    let hex = value.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    bytes(value).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn bits(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|hex| u32::from_str_radix(hex.as_str().unwrap(), 16).unwrap()).collect()
}

fn to_bits(values: &[f32]) -> Vec<u32> {
    // One bit pattern for every NaN.
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

fn check_case<T: Element>(case: &Value, values: &[T]) {
    let name = case["name"].as_str().unwrap();
    let layout =
        Layout { groups: 1, group_len: values.len(), block_size: case["block_size"].as_u64().unwrap() as usize };
    let (packed, absmax) = (bytes(&case["packed"]), to_bits(&floats(&case["absmax"])));

    let (scalar_packed, scalar_absmax) = scalar::quantize(Codebook::Nf4, values, layout);
    assert_eq!((scalar_packed, to_bits(&scalar_absmax)), (packed.clone(), absmax.clone()), "scalar, {name}");

    let (mut fast_packed, mut fast_absmax) = (vec![0xaa; layout.packed_len()], vec![f32::NAN; layout.absmax_len()]);
    nf4::quantize(values, Codebook::Nf4, layout, &mut fast_packed, &mut fast_absmax).unwrap();
    assert_eq!((fast_packed, to_bits(&fast_absmax)), (packed.clone(), absmax.clone()), "fast, {name}");

    let (mut packed_out, mut absmax_out) = (Vec::new(), Vec::new());
    let mut quantizer = GroupQuantizer::new(values.len(), layout.block_size).unwrap();
    for piece in values.chunks(7) {
        quantizer.push(piece, &mut packed_out, &mut absmax_out).unwrap();
    }
    quantizer.finish(&mut packed_out, &mut absmax_out).unwrap();
    assert_eq!((packed_out, to_bits(&absmax_out)), (packed, absmax), "streamed, {name}");
}

#[test]
fn quantised_bytes_equal_bitsandbytes() {
    let document = vectors("nf4_bitsandbytes.json");
    for case in document["quantised"].as_array().unwrap() {
        let values = bytes(&case["values"]);
        let halves = values.chunks(2).map(|b| u16::from_le_bytes(b.try_into().unwrap()));
        match case["dtype"].as_str().unwrap() {
            "float32" => check_case(case, &floats(&case["values"])),
            "bfloat16" => check_case(case, &halves.map(bf16::from_bits).collect::<Vec<_>>()),
            "float16" => check_case(case, &halves.map(f16::from_bits).collect::<Vec<_>>()),
            other => panic!("unknown dtype {other}"),
        }
    }
}

#[test]
fn platform_independent_vector_is_reproduced() {
    let document = vectors("nf4.json");
    let layout = Layout { groups: 1, group_len: 160, block_size: 64 };
    let values: Vec<f32> = (0..160).map(|i| ((i * 37 + 11) % 128 - 64) as f32 / 64.0 * 0.5f32.powi(i / 64)).collect();
    let (mut packed, mut absmax) = (vec![0; 80], vec![0.0; 3]);
    nf4::quantize(&values, Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
    assert_eq!(packed, bytes(&document["packed_hex"]));
    assert_eq!(to_bits(&absmax), bits(&document["absmax_f32_hex"]));

    let mut restored = vec![f32::NAN; 160];
    nf4::dequantize(&packed, Scales::Plain(&absmax), Codebook::Nf4, layout, &mut restored).unwrap();
    assert_eq!(to_bits(&restored[..8]), bits(&document["dequant_f32_hex_first8"]));

    let (mut codes, mut absmax2) = ([0; 3], [0.0]);
    let offset = nf4::nest(&absmax, None, &mut codes, &mut absmax2).unwrap();
    let expected: Vec<u64> =
        document["nested_absmax_u8"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
    assert_eq!(codes.map(u64::from).to_vec(), expected);
    assert_eq!(to_bits(&absmax2), bits(&document["nested_absmax2_hex"]));
    assert_eq!(format!("{:08x}", offset.to_bits()), document["nested_offset_hex"].as_str().unwrap());
}

#[test]
fn tables_have_the_published_bits() {
    let document = vectors("nf4.json");
    assert_eq!(to_bits(Codebook::Nf4.codes()), bits(&document["code_hex"]));
    assert_eq!(to_bits(Codebook::Nf4.midpoints()), bits(&document["midpoints_hex"]));
    assert_eq!(to_bits(&nf4::DYNAMIC_MAP), bits(&document["dynamic_map_hex"]));
}

#[test]
fn nested_codes_equal_bitsandbytes_for_its_offset() {
    let document = vectors("nf4_bitsandbytes.json");
    for case in document["nested"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (absmax, offset) = (floats(&case["absmax"]), floats(&case["offset"])[0]);
        let mut codes = vec![0xaa; absmax.len()];
        let mut absmax2 = vec![f32::NAN; absmax.len().div_ceil(nf4::NESTED_BLOCK_SIZE)];
        assert_eq!(nf4::nest(&absmax, Some(offset), &mut codes, &mut absmax2).unwrap(), offset);
        assert_eq!(codes, bytes(&case["codes"]), "{name}");
        assert_eq!(to_bits(&absmax2), to_bits(&floats(&case["absmax2"])), "{name}");

        let mut restored = vec![f32::NAN; absmax.len()];
        nf4::unnest(&codes, &absmax2, offset, &mut restored).unwrap();
        assert_eq!(to_bits(&restored), to_bits(&floats(&case["restored"])), "{name}");
    }
}
