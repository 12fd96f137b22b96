//! Routing: what must hold for all inputs, and what is refused.

use moeft_core::routing::{bucket, ExpertIndex, LoadStatistics};
use proptest::prelude::*;

fn sort<I: ExpertIndex>(top_k_index: &[I], num_experts: usize) -> (Vec<i64>, Vec<i64>, Vec<i32>) {
    let (mut permutation, mut inverse) = (vec![-1; top_k_index.len()], vec![-1; top_k_index.len()]);
    let mut offsets = vec![-1; num_experts + 1];
    bucket(top_k_index, num_experts, &mut permutation, &mut inverse, &mut offsets).unwrap();
    (permutation, inverse, offsets)
}

proptest! {
    #[test]
    fn equals_a_stable_sort(num_experts in 1..140usize, seeds in prop::collection::vec(any::<u16>(), 0..600)) {
        let top_k_index: Vec<i64> = seeds.iter().map(|&s| i64::from(s) % num_experts as i64).collect();
        let (permutation, inverse, offsets) = sort(&top_k_index, num_experts);

        let mut expected: Vec<i64> = (0..top_k_index.len() as i64).collect();
        expected.sort_by_key(|&row| top_k_index[row as usize]);
        prop_assert_eq!(&permutation, &expected);
        for (row, &position) in inverse.iter().enumerate() {
            prop_assert_eq!(permutation[position as usize], row as i64);
        }
        for (expert, &offset) in offsets.iter().enumerate() {
            let before = top_k_index.iter().filter(|&&e| e < expert as i64).count();
            prop_assert_eq!(offset, before as i32);
        }

        let narrow: Vec<i32> = top_k_index.iter().map(|&e| e as i32).collect();
        prop_assert_eq!(sort(&narrow, num_experts), (permutation, inverse, offsets));
    }
}

proptest! {
    #[test]
    fn load_statistics_stay_in_their_range(counts in prop::collection::vec(0..1000i32, 1..140)) {
        let offsets: Vec<i32> = std::iter::once(0).chain(counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        })).collect();
        let load = LoadStatistics::from_offsets(&offsets).unwrap();
        let num_experts = counts.len() as f64;
        prop_assert!((0.0..=num_experts.ln() + 1e-12).contains(&load.entropy_nats));
        prop_assert!((0.0..=1.0).contains(&load.normalized_entropy));
        prop_assert!((0.0..=num_experts.sqrt()).contains(&load.coefficient_of_variation));
    }
}

#[test]
fn all_rows_on_one_expert_keep_their_order() {
    let (permutation, inverse, offsets) = sort(&[2i32; 5], 4);
    assert_eq!(permutation, [0, 1, 2, 3, 4]);
    assert_eq!(inverse, permutation);
    assert_eq!(offsets, [0, 0, 0, 5, 5]);
}

#[test]
fn no_rows_and_no_experts_give_zero_offsets() {
    assert_eq!(sort::<i64>(&[], 3).2, [0; 4]);
    assert_eq!(sort::<i64>(&[], 0).2, [0]);
}

#[test]
fn an_index_out_of_range_is_named_with_its_row() {
    for (bad, num_experts) in [(4i64, 4), (-1, 4), (i64::MIN, 4), (1 << 32, 4), (0, 0)] {
        let index = [bad];
        let error = bucket(&index, num_experts, &mut [0], &mut [0], &mut vec![0; num_experts + 1]).unwrap_err();
        assert_eq!(error.to_string(), format!("top_k_index is {bad} at row 0, expected an expert in 0..{num_experts}"));
    }
}

#[test]
fn lengths_that_do_not_fit_are_named() {
    let index = [0i32, 1];
    let error = bucket(&index, 2, &mut [0], &mut [0; 2], &mut [0; 3]).unwrap_err();
    assert_eq!(error.to_string(), "permutation is 1 long, expected 2");
    let error = bucket(&index, 2, &mut [0; 2], &mut [0; 3], &mut [0; 3]).unwrap_err();
    assert_eq!(error.to_string(), "inverse is 3 long, expected 2");
    let error = bucket(&index, 2, &mut [0; 2], &mut [0; 2], &mut [0; 2]).unwrap_err();
    assert_eq!(error.to_string(), "offsets is 2 long, expected 3");
    assert!(bucket(&index, usize::MAX, &mut [0; 2], &mut [0; 2], &mut [0; 3]).is_err());
}
