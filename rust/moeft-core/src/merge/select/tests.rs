//! The k largest as a sort finds them.

use proptest::prelude::*;

use super::*;
use crate::checkpoint::Dtype;
use crate::merge::recipe::Parameters;

/// A tensor cut into blocks of 8 that are looked at two by two, as chunks are.
const BLOCK: usize = 8;
const CHUNK: usize = 2 * BLOCK;

fn cuts(inputs: &[Vec<f32>], targets: Vec<Vec<u64>>) -> Largest {
    let shape = [inputs[0].len() as u64];
    let common = Parameters::new();
    let settings = Settings {
        name: "x",
        block: BLOCK as u64,
        experts: 1,
        shape: &shape,
        dtype: Dtype::F32,
        depth: 0.0,
        seed: 0,
        common: &common,
        models: vec![&common; inputs.len()],
        entries: (0..inputs.len()).collect(),
        total_weight: 0.0,
        total_magnitude: 0.0,
        delta_dtype: None,
        layer_importance: 0.0,
        fisher_range: None,
        of_deltas: true,
        has_fisher: false,
    };
    let mut largest = Largest::new(targets, &settings);
    while largest.pass().is_some() {
        let mut all = Gathered::default();
        for chunk in (0..inputs[0].len()).step_by(CHUNK) {
            let mut found = Gathered::default();
            for start in (chunk..inputs[0].len().min(chunk + CHUNK)).step_by(BLOCK) {
                let part = |input: &Vec<f32>| input[start..input.len().min(start + BLOCK)].to_vec();
                let inputs = inputs.iter().map(part).collect();
                largest.gather(&Block { start: start as u64, inputs, ..Block::default() }, &mut found);
            }
            all.add(&found);
        }
        largest.learn(&all);
    }
    largest
}

fn keep(largest: &Largest, input: usize, cut: usize, others: bool, values: &mut [f32]) {
    for (block, values) in (0..).zip(values.chunks_mut(BLOCK)) {
        largest.keep(input, cut, (block * BLOCK) as u64, others, values);
    }
}

/// Places by falling magnitude, equal ones by rising index: the first k are the k largest.
fn ranked(values: &[f32]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|&left, &right| values[right].abs().total_cmp(&values[left].abs()).then(left.cmp(&right)));
    places
}

fn zeroed(values: &[f32], places: &[usize]) -> Vec<f32> {
    let mut values = values.to_vec();
    places.iter().for_each(|&place| values[place] = 0.0);
    values
}

/// Magnitudes of which many are equal, that differ in upper or in lower bits alone.
fn value() -> impl Strategy<Value = f32> {
    let one = 1.0f32.to_bits();
    let bits = [0, 1, 2, 1 << 15, one, one + 1, one + (1 << 15), f32::MAX.to_bits()];
    (prop::sample::select(bits.to_vec()), any::<bool>())
        .prop_map(|(bits, negative)| f32::from_bits(bits | u32::from(negative) << 31))
}

/// Two inputs of one length, each with a narrow cut and one that is as wide or wider.
fn inputs() -> impl Strategy<Value = (Vec<Vec<f32>>, Vec<Vec<u64>>)> {
    (1usize..100).prop_flat_map(|len| {
        let inputs = prop::collection::vec(prop::collection::vec(value(), len), 2);
        let targets = prop::collection::vec(prop::collection::vec(0..=len as u64, 2), 2);
        (
            inputs,
            targets.prop_map(|mut targets| {
                targets.iter_mut().for_each(|targets| targets.sort_unstable());
                targets
            }),
        )
    })
}

proptest! {
    #[test]
    fn a_cut_keeps_the_largest_or_the_others((inputs, targets) in inputs()) {
        let largest = cuts(&inputs, targets.clone());
        for (input, values) in inputs.iter().enumerate() {
            let places = ranked(values);
            for (cut, &target) in targets[input].iter().enumerate() {
                let (first, rest) = places.split_at(target as usize);
                for (others, dropped) in [(false, rest), (true, first)] {
                    let mut kept = values.clone();
                    keep(&largest, input, cut, others, &mut kept);
                    prop_assert_eq!(kept, zeroed(values, dropped));
                }
            }
        }
    }

    #[test]
    fn a_wider_cut_before_a_narrow_one_leaves_what_lies_between((inputs, targets) in inputs()) {
        let largest = cuts(&inputs, targets.clone());
        for (input, values) in inputs.iter().enumerate() {
            let places = ranked(values);
            let [narrow, wide] = [0, 1].map(|cut| targets[input][cut] as usize);
            let mut kept = values.clone();
            keep(&largest, input, 1, false, &mut kept);
            keep(&largest, input, 0, true, &mut kept);
            prop_assert_eq!(kept, zeroed(&zeroed(values, &places[wide..]), &places[..narrow]));
        }
    }
}
