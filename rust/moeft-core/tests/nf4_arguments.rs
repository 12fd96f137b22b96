//! NF4: what is refused, and how it is said.

use moeft_core::nf4::{dequantize, nest, quantize, unnest, Codebook, GroupQuantizer, Layout, Scales};

const NF4: Codebook = Codebook::Nf4;

const LAYOUT: Layout = Layout { groups: 2, group_len: 65, block_size: 64 };

#[test]
fn lengths_that_do_not_fit_the_layout_are_named() {
    let cases =
        [(129, 66, 4, "values is 129 long"), (130, 65, 4, "packed is 65 long"), (130, 66, 3, "absmax is 3 long")];
    for (values, packed, absmax, message) in cases {
        let error =
            quantize(&vec![0.0f32; values], NF4, LAYOUT, &mut vec![0; packed], &mut vec![0.0; absmax]).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        let (scales, mut out) = (vec![0.0; absmax], vec![0.0f32; values]);
        let error = dequantize(&vec![0; packed], Scales::Plain(&scales), NF4, LAYOUT, &mut out).unwrap_err();
        assert!(error.to_string().starts_with(&message.replace("values", "out")), "{error}");
    }
}

#[test]
fn block_sizes_that_bitsandbytes_lacks_are_refused() {
    for block_size in [0, 1, 16, 48, 63, 8192, usize::MAX] {
        let layout = Layout { groups: 1, group_len: 0, block_size };
        let error = quantize::<f32>(&[], NF4, layout, &mut [], &mut []).unwrap_err();
        assert_eq!(error.to_string(), format!("block_size is {block_size}, expected a power of two from 32 to 4096"));
        assert!(GroupQuantizer::new(1, block_size).is_err());
    }
}

#[test]
fn a_layout_that_overflows_is_refused() {
    let layout = Layout { groups: usize::MAX, group_len: 3, block_size: 64 };
    assert!(quantize(&[0.0f32; 3], NF4, layout, &mut [0; 2], &mut [0.0]).is_err());
}

#[test]
fn nothing_to_quantise_is_fine() {
    for (groups, group_len) in [(0, 64), (4, 0), (0, 0)] {
        let layout = Layout { groups, group_len, block_size: 64 };
        quantize::<f32>(&[], NF4, layout, &mut [], &mut []).unwrap();
        dequantize::<f32>(&[], Scales::Plain(&[]), NF4, layout, &mut []).unwrap();
    }
    assert_eq!(nest(&[], None, &mut [], &mut []).unwrap(), 0.0);
}

#[test]
fn a_stream_refuses_too_many_and_too_few_values() {
    let (mut packed, mut absmax) = (Vec::new(), Vec::new());
    let mut quantizer = GroupQuantizer::new(4, 64).unwrap();
    quantizer.push(&[1.0f32; 3], &mut packed, &mut absmax).unwrap();
    let error = quantizer.push(&[1.0f32; 2], &mut packed, &mut absmax).unwrap_err();
    assert_eq!(error.to_string(), "values is 2 long, expected at most the 1 missing of a group of 4");
    let error = quantizer.clone().finish(&mut packed, &mut absmax).unwrap_err();
    assert_eq!(error.to_string(), "values is 3 in all, expected 4");
    quantizer.push(&[1.0f32], &mut packed, &mut absmax).unwrap();
    quantizer.finish(&mut packed, &mut absmax).unwrap();
    assert_eq!((packed, absmax), (vec![0xff, 0xff], vec![1.0]));
}

#[test]
fn nesting_refuses_non_finite_scales_and_wrong_lengths() {
    let error = nest(&[1.0, f32::NAN], None, &mut [0; 2], &mut [0.0]).unwrap_err();
    assert!(error.to_string().starts_with("absmax is NaN at 1"), "{error}");
    assert!(nest(&[1.0], Some(f32::INFINITY), &mut [0], &mut [0.0]).is_err());
    assert!(nest(&[1.0; 2], None, &mut [0; 1], &mut [0.0]).is_err());
    assert!(nest(&[1.0; 257], None, &mut [0; 257], &mut [0.0]).is_err());
    assert!(unnest(&[0; 257], &[0.0; 2], 0.0, &mut [0.0; 256]).is_err());
    assert!(unnest(&[0; 257], &[0.0; 3], 0.0, &mut [0.0; 257]).is_err());
}

#[test]
fn a_second_level_that_does_not_cover_the_codes_is_refused() {
    let layout = Layout { groups: 1, group_len: 64 * 257, block_size: 64 };
    let (packed, codes, mut out) = (vec![0; 32 * 257], vec![0; 257], vec![0.0f32; 64 * 257]);
    for (absmax2, first, message) in [
        (1, 0, "absmax2 is 1 long, expected ceil(codes / 256) = 2"),
        (2, 256, "absmax2 is 2 long, expected ceil(codes / 256) = 3"),
    ] {
        let scales = Scales::Nested { codes: &codes, absmax2: &vec![1.0; absmax2], offset: 0.0, first };
        let error = dequantize(&packed, scales, NF4, layout, &mut out).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}
