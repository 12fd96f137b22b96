//! NF4: what must hold for all inputs.

use std::fmt::Debug;

use half::{bf16, f16};
use moeft_core::nf4::{self, scalar, Element, GroupQuantizer, Layout};
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = Layout> {
    (0..4usize, 0..300usize, 5..13u32).prop_map(|(groups, group_len, log2)| Layout {
        groups,
        group_len,
        block_size: 1 << log2,
    })
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

fn quantize<T: Element>(values: &[T], layout: Layout) -> (Vec<u8>, Vec<f32>) {
    let (mut packed, mut absmax) = (vec![0xaa; layout.packed_len()], vec![f32::NAN; layout.absmax_len()]);
    nf4::quantize(values, layout, &mut packed, &mut absmax).unwrap();
    (packed, absmax)
}

fn assert_equals_scalar<T: Element>(layout: Layout, values: &[T]) {
    let (packed, absmax) = quantize(values, layout);
    let (scalar_packed, scalar_absmax) = scalar::quantize(values, layout);
    assert_eq!(packed, scalar_packed);
    assert_eq!(to_bits(&absmax), to_bits(&scalar_absmax));

    let mut restored = vec![T::from_f32(f32::NAN); values.len()];
    nf4::dequantize(&packed, &absmax, layout, &mut restored).unwrap();
    assert_eq!(to_bits(&restored), to_bits(&scalar::dequantize::<T>(&packed, &absmax, layout)));
}

proptest! {
    #[test]
    fn f32_equals_scalar((layout, values) in weights(floats())) {
        assert_equals_scalar(layout, &values);
    }

    #[test]
    fn bf16_equals_scalar((layout, values) in weights(floats().prop_map(bf16::from_f32))) {
        assert_equals_scalar(layout, &values);
    }

    #[test]
    fn f16_equals_scalar((layout, values) in weights(floats().prop_map(f16::from_f32))) {
        assert_equals_scalar(layout, &values);
    }

    /// Values next to a threshold are where multiplying by the reciprocal differs from dividing.
    #[test]
    fn values_at_thresholds_equal_scalar(
        absmax in 0.5f32..1.5, at in prop::collection::vec((0..15usize, -2..3i32), 1..200)
    ) {
        let near = at.iter().map(|&(i, ulps)| (nf4::MIDPOINTS[i] * absmax).to_bits().wrapping_add_signed(ulps));
        let mut values: Vec<f32> = near.map(f32::from_bits).collect();
        values.iter_mut().step_by(64).for_each(|first| *first = absmax);
        assert_equals_scalar(Layout { groups: 1, group_len: values.len(), block_size: 64 }, &values);
    }

    #[test]
    fn any_bits_equal_scalar(bits in prop::collection::vec(any::<u16>(), 0..200)) {
        let layout = Layout { groups: 1, group_len: bits.len(), block_size: 64 };
        assert_equals_scalar(layout, &bits.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>());
        assert_equals_scalar(layout, &bits.iter().map(|&b| f16::from_bits(b)).collect::<Vec<_>>());
    }

    #[test]
    fn dequantise_equals_scalar_for_any_scale(
        packed in prop::collection::vec(any::<u8>(), 60), scales in prop::collection::vec(floats(), 4)
    ) {
        let layout = Layout { groups: 1, group_len: 119, block_size: 32 };
        let mut wide = vec![0.0f32; 119];
        nf4::dequantize(&packed, &scales, layout, &mut wide).unwrap();
        prop_assert_eq!(to_bits(&wide), to_bits(&scalar::dequantize::<f32>(&packed, &scales, layout)));
        let mut half = vec![bf16::ZERO; 119];
        nf4::dequantize(&packed, &scales, layout, &mut half).unwrap();
        let rounded: Vec<bf16> = wide.iter().map(|&v| bf16::from_f32(v)).collect();
        prop_assert_eq!(to_bits(&half), to_bits(&rounded));
    }

    #[test]
    fn streaming_equals_one_shot(
        (layout, values) in weights(floats()), cuts in prop::collection::vec(0..200usize, 0..12)
    ) {
        let (mut packed, mut absmax) = (Vec::new(), Vec::new());
        for group in 0..layout.groups {
            let mut rest = &values[group * layout.group_len..][..layout.group_len];
            let mut quantizer = GroupQuantizer::new(layout.group_len, layout.block_size).unwrap();
            for &cut in &cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                quantizer.push(piece, &mut packed, &mut absmax).unwrap();
                rest = tail;
            }
            quantizer.push(rest, &mut packed, &mut absmax).unwrap();
            quantizer.finish(&mut packed, &mut absmax).unwrap();
        }
        let (expected_packed, expected_absmax) = quantize(&values, layout);
        prop_assert_eq!(packed, expected_packed);
        prop_assert_eq!(to_bits(&absmax), to_bits(&expected_absmax));
    }

    #[test]
    fn groups_do_not_touch_each_other((layout, values) in weights(floats())) {
        let mut joined = (Vec::new(), Vec::new());
        for group in values.chunks(layout.group_len.max(1)) {
            let (packed, absmax) = quantize(group, Layout { groups: 1, ..layout });
            joined.0.extend(packed);
            joined.1.extend(absmax);
        }
        let (packed, absmax) = quantize(&values, layout);
        prop_assert_eq!(packed, joined.0);
        prop_assert_eq!(to_bits(&absmax), to_bits(&joined.1));
    }

    /// A value is at most half the widest gap between codes (0.1519, below the first code's midpoint) times
    /// absmax away. Scaling, threshold and product round once each in f32: 4 epsilon more.
    #[test]
    fn error_is_at_most_half_the_widest_gap(values in prop::collection::vec(-1e3f32..1e3, 1..300)) {
        let layout = Layout { groups: 1, group_len: values.len(), block_size: 64 };
        let (packed, absmax) = quantize(&values, layout);
        let mut restored = vec![0.0f32; values.len()];
        nf4::dequantize(&packed, &absmax, layout, &mut restored).unwrap();
        let half_gap = nf4::CODE.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max);
        for (i, (value, restored)) in values.iter().zip(&restored).enumerate() {
            let bound = absmax[i / 64] * (half_gap + 4.0 * f32::EPSILON);
            prop_assert!((value - restored).abs() <= bound, "{value} became {restored} at {i}");
        }
    }

    #[test]
    fn first_non_finite_is_the_first(
        mut values in prop::collection::vec(-1.0f32..1.0, 1..3000), at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])
    ) {
        prop_assert_eq!(nf4::first_non_finite(&values), None);
        let at = at.index(values.len());
        values[at] = bad;
        *values.last_mut().unwrap() = f32::NAN;
        prop_assert_eq!(nf4::first_non_finite(&values), Some(at));
        let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        prop_assert_eq!(nf4::first_non_finite(&halves), Some(at));
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        prop_assert_eq!(nf4::first_non_finite(&halves), Some(at));
    }

    /// Nested absmax is within one code of the residual: a step of 1/65535 beyond half the widest gap
    /// of the dynamic map (0.00703), times the block's absmax2.
    #[test]
    fn nesting_error_is_bounded(absmax in prop::collection::vec(0.0f32..1.0, 1..600)) {
        let mut codes = vec![0; absmax.len()];
        let mut absmax2 = vec![0.0; absmax.len().div_ceil(nf4::NESTED_BLOCK_SIZE)];
        let offset = nf4::nest(&absmax, None, &mut codes, &mut absmax2).unwrap();
        let mut restored = vec![f32::NAN; absmax.len()];
        nf4::unnest(&codes, &absmax2, offset, &mut restored).unwrap();
        let half_gap = nf4::DYNAMIC_MAP.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max);
        for (i, (value, restored)) in absmax.iter().zip(&restored).enumerate() {
            let bound = absmax2[i / 256] * (half_gap + 1.0 / 65535.0) + 4.0 * f32::EPSILON;
            prop_assert!((value - restored).abs() <= bound, "{value} became {restored} at {i}");
        }
    }
}

#[test]
fn large_weights_equal_scalar() {
    // Large enough for the parallel path: one odd group, few large groups, many small ones.
    for (groups, group_len) in [(1, 600_001), (2, 600_000), (3000, 201)] {
        let layout = Layout { groups, group_len, block_size: 64 };
        let values: Vec<f32> = (0..layout.values_len() as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect();
        assert_equals_scalar(layout, &values);
    }
}
