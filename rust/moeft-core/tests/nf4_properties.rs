//! NF4: what must hold for all inputs. That each path equals the definition is tested beside the paths.

use std::fmt::Debug;

use half::{bf16, f16};
use moeft_core::nf4::{self, Codebook, Element, GroupQuantizer, Layout, Scales};
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
    nf4::quantize(values, Codebook::Nf4, layout, &mut packed, &mut absmax).unwrap();
    (packed, absmax)
}

proptest! {
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
        nf4::dequantize(&packed, Scales::Plain(&absmax), Codebook::Nf4, layout, &mut restored).unwrap();
        let half_gap = Codebook::Nf4.codes().windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max);
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
