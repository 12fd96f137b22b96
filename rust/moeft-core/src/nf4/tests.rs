//! Every path of this CPU against the definition, bit for bit.

use std::fmt::{Arguments, Debug};

use half::{bf16, f16};
use proptest::prelude::*;

use super::decode::decode_run;
use super::dequantize::dequantize_with;
use super::quantize::quantize_with;
use super::{nest, scalar, unnest, Codebook, Element, Layout, Scales, NESTED_BLOCK_SIZE};
use crate::isa::Isa;

fn layouts() -> impl Strategy<Value = Layout> {
    (0..4usize, 0..300usize, 5..13u32).prop_map(|(groups, group_len, log2)| Layout {
        groups,
        group_len,
        block_size: 1 << log2,
    })
}

fn codebooks() -> impl Strategy<Value = Codebook> {
    prop::sample::select(Codebook::ALL.to_vec())
}

/// Floats of every kind: any bits (NaN, infinities, denormals among them), and weights of usual size.
fn floats() -> impl Strategy<Value = f32> {
    prop_oneof![1 => any::<u32>().prop_map(f32::from_bits), 20 => -0.1f32..0.1, 2 => Just(0.0), 1 => Just(-0.0)]
}

/// A layout with values of one type.
fn weights<T: Element + Debug>(value: impl Strategy<Value = T>) -> impl Strategy<Value = (Layout, Vec<T>)> {
    let value = std::rc::Rc::new(value);
    layouts().prop_flat_map(move |layout| (Just(layout), prop::collection::vec(value.clone(), layout.values_len())))
}

/// Comparable form in which every NaN is equal.
fn to_bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|v| v.to_f32()).map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

/// Names the first difference, where all of a large weight would be hard to read.
fn assert_same<V: PartialEq + Debug>(found: &[V], expected: &[V], what: Arguments<'_>) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        panic!("{what}: {:x?} at {at}, expected {:x?}", found[at], expected[at]);
    }
}

/// Compares both directions of every path with the definition.
fn assert_all_equal_the_definition<T: Element>(codebook: Codebook, layout: Layout, values: &[T]) {
    let expected = scalar::quantize(codebook, values, layout);
    for isa in Isa::available() {
        let (mut packed, mut absmax) = (vec![0xaa; layout.packed_len()], vec![-1.0; layout.absmax_len()]);
        quantize_with(isa, values, codebook, layout, &mut packed, &mut absmax).unwrap();
        assert_same(&packed, &expected.0, format_args!("packed, {isa:?} {codebook:?}"));
        assert_same(&to_bits(&absmax), &to_bits(&expected.1), format_args!("absmax, {isa:?} {codebook:?}"));
        assert_restores::<T>(isa, codebook, layout, &packed, &absmax);
    }
}

/// Compares the restored values of one path, past the cache and not, with the definition.
fn assert_restores<T: Element>(isa: Isa, codebook: Codebook, layout: Layout, packed: &[u8], absmax: &[f32]) {
    let expected = to_bits(&scalar::dequantize::<T>(codebook, packed, absmax, layout));
    for streaming in [false, true] {
        let mut out = vec![T::from_f32(7.0); layout.values_len()];
        dequantize_with(isa, packed, Scales::Plain(absmax), codebook, layout, &mut out, streaming).unwrap();
        assert_same(&to_bits(&out), &expected, format_args!("{isa:?} {codebook:?}, streaming {streaming}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f32_equals_the_definition(codebook in codebooks(), (layout, values) in weights(floats())) {
        assert_all_equal_the_definition(codebook, layout, &values);
    }

    #[test]
    fn bf16_equals_the_definition(
        codebook in codebooks(), (layout, values) in weights(floats().prop_map(bf16::from_f32))
    ) {
        assert_all_equal_the_definition(codebook, layout, &values);
    }

    #[test]
    fn f16_equals_the_definition(
        codebook in codebooks(), (layout, values) in weights(floats().prop_map(f16::from_f32))
    ) {
        assert_all_equal_the_definition(codebook, layout, &values);
    }

    #[test]
    fn any_bits_equal_the_definition(codebook in codebooks(), bits in prop::collection::vec(any::<u32>(), 0..200)) {
        let layout = Layout { groups: 1, group_len: bits.len(), block_size: 64 };
        let halves = || bits.iter().map(|&b| b as u16);
        assert_all_equal_the_definition(codebook, layout, &halves().map(bf16::from_bits).collect::<Vec<_>>());
        assert_all_equal_the_definition(codebook, layout, &halves().map(f16::from_bits).collect::<Vec<_>>());
        assert_all_equal_the_definition(codebook, layout, &bits.into_iter().map(f32::from_bits).collect::<Vec<_>>());
    }

    /// Values next to a threshold are where multiplying by the reciprocal differs from dividing.
    #[test]
    fn values_at_thresholds_equal_the_definition(
        codebook in codebooks(), absmax in 0.5f32..1.5, at in prop::collection::vec((0..15usize, -2..3i32), 1..200)
    ) {
        let near = at.iter().map(|&(i, ulps)| {
            // Next to zero, where bits cannot be stepped below, lie the denormals of both signs.
            let midpoint = codebook.midpoints()[i] * absmax;
            if midpoint == 0.0 { ulps as f32 * 1e-45 } else { f32::from_bits(midpoint.to_bits().wrapping_add_signed(ulps)) }
        });
        let mut values: Vec<f32> = near.collect();
        values.iter_mut().step_by(64).for_each(|first| *first = absmax);
        assert_all_equal_the_definition(codebook, Layout { groups: 1, group_len: values.len(), block_size: 64 }, &values);
    }

    #[test]
    fn any_scale_restores_as_the_definition(
        codebook in codebooks(), packed in prop::collection::vec(any::<u8>(), 60),
        scales in prop::collection::vec(floats(), 4)
    ) {
        let layout = Layout { groups: 1, group_len: 119, block_size: 32 };
        for isa in Isa::available() {
            assert_restores::<f32>(isa, codebook, layout, &packed, &scales);
            assert_restores::<bf16>(isa, codebook, layout, &packed, &scales);
            assert_restores::<f16>(isa, codebook, layout, &packed, &scales);
        }
    }

    #[test]
    fn a_run_from_anywhere_equals_that_part_of_the_whole(
        codebook in codebooks(), packed in prop::collection::vec(any::<u8>(), 500), log2 in 5..11u32,
        start in 0..1000usize, len in 0..1000usize, seed: u8
    ) {
        let len = len.min(1000 - start);
        let layout = Layout { groups: 1, group_len: 1000, block_size: 1 << log2 };
        let absmax: Vec<f32> = (0..layout.absmax_len()).map(|i| (i as f32 + f32::from(seed)).sin()).collect();
        let whole = scalar::dequantize::<f32>(codebook, &packed, &absmax, layout);
        for isa in Isa::available() {
            let mut out = vec![7.0; len];
            decode_run(isa, &packed, Scales::Plain(&absmax), layout.block_size, start, &mut out, codebook);
            prop_assert_eq!(to_bits(&out), to_bits(&whole[start..start + len]), "{:?}", isa);
        }
    }

    #[test]
    fn nested_scales_restore_as_their_plain_form(
        absmax in prop::collection::vec(0.0f32..1.0, 1..700), byte: u8, groups in prop::sample::select(vec![1usize, 3])
    ) {
        let blocks = absmax.len() / groups;
        prop_assume!(blocks > 0);
        let absmax = &absmax[..blocks * groups];
        let (mut codes, mut absmax2) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(NESTED_BLOCK_SIZE)]);
        let offset = nest(absmax, None, &mut codes, &mut absmax2).unwrap();
        let mut plain = vec![0.0; absmax.len()];
        unnest(&codes, &absmax2, offset, &mut plain).unwrap();

        let layout = Layout { groups, group_len: blocks * 32 - 5, block_size: 32 };
        let packed: Vec<u8> = (0..layout.packed_len()).map(|i| byte.wrapping_mul(i as u8).wrapping_add(i as u8)).collect();
        let scales = Scales::Nested { codes: &codes, absmax2: &absmax2, offset, first: 0 };
        let expected = scalar::dequantize::<bf16>(Codebook::Nf4, &packed, &plain, layout);
        for isa in Isa::available() {
            let mut out = vec![bf16::ONE; layout.values_len()];
            dequantize_with(isa, &packed, scales, Codebook::Nf4, layout, &mut out, false).unwrap();
            prop_assert_eq!(to_bits(&out), to_bits(&expected));

            let last = scales.skip((groups - 1) * blocks);
            let mut run = vec![0.0; layout.group_len];
            let packed = &packed[(groups - 1) * layout.group_packed_len()..];
            decode_run(isa, packed, last, 32, 0, &mut run, Codebook::Nf4);
            let run: Vec<_> = run.into_iter().map(bf16::from_f32).collect();
            prop_assert_eq!(to_bits(&run), to_bits(&expected[(groups - 1) * layout.group_len..]));
        }
    }
}

/// Each block holds one special value among 32 of usual size: every kind in every place.
#[test]
fn special_values_in_every_place_equal_the_definition() {
    let specials = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -1e-40, 1e-38, f32::MAX, f32::MIN];
    for special in specials {
        for size in [0.0f32, 1.0, 1e-39] {
            let values: Vec<f32> =
                (0..32 * 32).map(|i| if i / 32 == i % 32 { special } else { (i as f32).sin() * size }).collect();
            let layout = Layout { groups: 1, group_len: values.len(), block_size: 32 };
            for codebook in Codebook::ALL {
                assert_all_equal_the_definition(codebook, layout, &values);
                let halves: Vec<_> = values.iter().map(|&v| bf16::from_f32(v)).collect();
                assert_all_equal_the_definition(codebook, layout, &halves);
                let halves: Vec<_> = values.iter().map(|&v| f16::from_f32(v)).collect();
                assert_all_equal_the_definition(codebook, layout, &halves);
            }
        }
    }
}

#[test]
fn large_weights_equal_the_definition() {
    // Large enough for the parallel path: one odd group, few large groups, many small ones.
    for (groups, group_len) in [(1, 600_001), (2, 600_000), (3000, 201)] {
        let layout = Layout { groups, group_len, block_size: 64 };
        let values: Vec<bf16> = (0..layout.values_len() as u32)
            .map(|i| bf16::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0))
            .collect();
        assert_all_equal_the_definition(Codebook::Nf4, layout, &values);
    }
}
