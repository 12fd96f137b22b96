//! Whatever the bytes, a parser refuses them or takes them: no panic, no loop without end, no allocation that bytes of
//! this size cannot justify.

mod parsers;

use parsers::{Parser, ALL};
use proptest::prelude::*;
use proptest::sample::Index;

/// Pieces that parsers trip over.
const PIECES: &[&str] = &[
    "18446744073709551615",
    "9223372036854775808",
    "-1",
    "1e999",
    "0",
    "null",
    "\"\"",
    "[",
    "{",
    "]}",
    "\u{0}",
    "\\u0000",
    "\n",
    "{}",
    "[[[[[[[[",
    "&a [*a, *a]",
    ": ",
    "../",
    "\"weight_map\"",
    "\"num_experts\": 18446744073709551615,",
];

#[derive(Debug, Clone)]
enum Mutation {
    Replace(Index, u8),
    Delete(Index, usize),
    Repeat(Index, usize),
    Insert(Index, &'static str),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(place, byte)| Mutation::Replace(place, byte)),
        (any::<Index>(), 1usize..20).prop_map(|(place, count)| Mutation::Delete(place, count)),
        (any::<Index>(), 1usize..40).prop_map(|(place, count)| Mutation::Repeat(place, count)),
        (any::<Index>(), prop::sample::select(PIECES)).prop_map(|(place, piece)| Mutation::Insert(place, piece)),
    ]
}

fn mutate(mut bytes: Vec<u8>, mutations: &[Mutation]) -> Vec<u8> {
    for mutation in mutations {
        if bytes.is_empty() {
            break;
        }
        let from = |place: &Index, count: usize| {
            let place = place.index(bytes.len());
            place..bytes.len().min(place + count)
        };
        match mutation {
            Mutation::Replace(place, byte) => {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            Mutation::Delete(place, count) => drop(bytes.drain(from(place, *count))),
            Mutation::Repeat(place, count) => {
                let range = from(place, *count);
                let piece = bytes[range.clone()].to_vec();
                bytes.splice(range.start..range.start, piece);
            }
            Mutation::Insert(place, piece) => {
                let place = place.index(bytes.len());
                bytes.splice(place..place, piece.bytes());
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn arbitrary_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for Parser { parse, .. } in &ALL {
            parse(&bytes);
        }
    }

    #[test]
    fn damaged_documents_are_refused_without_a_panic(mutations in prop::collection::vec(mutation(), 1..6)) {
        for Parser { parse, valid, .. } in &ALL {
            parse(&mutate(valid(), &mutations));
        }
    }
}

#[test]
fn no_document_makes_a_parser_take_much_memory() {
    let documents: [&[u8]; 6] = [
        br#"{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 18446744073709551615]}}"#,
        br#"{"model.layers.0.experts.18446744073709551615.gate_proj.weight":
            {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}"#,
        br#"{"model_type": "mixtral", "num_local_experts": 18446744073709551615}"#,
        br#"{"peft_type": "LORA", "peft_version": "0.21.2", "r": 1e300, "lora_alpha": 1,
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}"#,
        b"a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n\
            d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e]\n",
        br#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {"((a{1000}){1000}){1000}": 1}}"#,
    ];
    let before = virtual_kib();
    for document in documents {
        for Parser { parse, .. } in &ALL {
            parse(document);
        }
    }
    if let (Some(before), Some(after)) = (before, virtual_kib()) {
        assert!(after - before < 1 << 20, "the address space grew by {} KiB", after - before);
    }
}

/// Most address space this process had; allocations that were never touched count. `None` where Linux does not tell.
fn virtual_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"))?;
    line.trim().trim_end_matches("kB").trim().parse().ok()
}

#[test]
fn a_journal_with_another_state_than_its_checksum_is_not_believed() {
    let journal = ALL.iter().find(|parser| parser.name == "journal").unwrap();
    let text = String::from_utf8((journal.valid)()).unwrap();
    let damaged = text.replace(r#""state":1"#, r#""state":2"#);
    assert_ne!(damaged, text);
    assert!(!(journal.parse)(damaged.as_bytes()));
}

#[test]
fn the_documents_that_are_damaged_above_are_valid() {
    for Parser { name, parse, valid } in &ALL {
        assert!(parse(&valid()), "{name}");
    }
}
