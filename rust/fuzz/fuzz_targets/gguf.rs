#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    moeft_fuzz::parsers::gguf(bytes);
});
