"""The tokenizer of an exported file in llama.cpp cuts texts as that of the checkpoint does.

``MOEFT_TOKENIZER_TEXTS=2000 pytest tests/test_gguf_tokenizers.py`` compares more of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from moeft import gguf
from moeft.errors import UnsupportedModelError
from moeft.gguf.pre_tokenizer import SPLITS, pre_tokenizer
from moeft.serving import ServeOptions, Server
from tests.real_models import gemma3_270m, smollm2_135m
from tests.test_gguf_export import BASE
from tests.tokenizer_texts import varied_texts

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

DIALOGUE = Path(__file__).parent.parent / "recipes" / "visual-novel" / "dialogue.jsonl"
TEXTS = int(os.environ.get("MOEFT_TOKENIZER_TEXTS", "300"))
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
INNER = {**BYTES, "use_regex": False}
LLAMA3, QWEN2 = SPLITS


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def with_small_weights(tokenizer: Path, folder: Path) -> Path:
    """A model that is quick to export and to load, with a real tokenizer."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    if "gemma" in tokenizer.name:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, layer_types=["sliding_attention"]))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def assert_equal_tokens(folder: Path, scratch: Path, texts: list[str]) -> None:
    gguf.export(folder, scratch / "m.gguf", type="f16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    with Server(scratch / "m.gguf", ServeOptions(context=64, threads=1)) as server:
        found = [server.client.tokenize(text) for text in texts]
    wrong = [text for text, ours, theirs in zip(texts, found, expected, strict=True) if ours != theirs]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:5]}"


def test_the_embedded_base_cuts_dialogue_as_in_transformers(tmp_path):
    # Its own expression of words is none that llama.cpp has: an apostrophe before a word, as in ",'tis", and the last
    # of several spaces go to other tokens.
    rows = (json.loads(line)["messages"] for line in DIALOGUE.read_text("utf-8").splitlines())
    said = (message["content"] for row in rows for message in row)
    texts = [text for text in said if not re.search("[^A-Za-z]'|  ", text)][:TEXTS]
    assert len(texts) >= min(TEXTS, 1000)
    assert_equal_tokens(BASE, tmp_path, [*texts, "<|turn>user\nHello<turn|>\n"])


def test_gemma_3_cuts_as_in_transformers(tmp_path):
    folder = with_small_weights(gemma3_270m(), tmp_path / "gemma")
    assert_equal_tokens(folder, tmp_path, [*varied_texts(TEXTS), "<start_of_turn>user\nHello<end_of_turn>\n"])


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("gpt-2", BYTES),
        ("smollm", sequence({"type": "Digits", "individual_digits": True}, BYTES)),
        ("llama-bpe", sequence(split(LLAMA3), INNER)),
        ("qwen2", sequence(split(QWEN2), INNER)),
    ],
)
def test_byte_level_bpe_cuts_as_its_pre_tokenizer_says(name, cut, tmp_path):
    folder = with_small_weights(smollm2_135m(), tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**document, "pre_tokenizer": cut}))
    assert_equal_tokens(folder, tmp_path, [*varied_texts(TEXTS), "<|im_start|>user\nHello<|im_end|>"])
    assert ["tokenizer.ggml.pre", {"type": "string", "value": name}] in gguf.read_header(tmp_path / "m.gguf")[
        "metadata"
    ]


@pytest.mark.parametrize(
    "cut",
    [
        sequence(split(r"\w+|\W+"), INNER),
        sequence(split(LLAMA3), BYTES),
        sequence({"type": "Digits", "individual_digits": False}, BYTES),
        {**BYTES, "add_prefix_space": True},
        sequence({"type": "Digits", "individual_digits": True}, {**BYTES, "add_prefix_space": True}),
        sequence(split(LLAMA3), {**INNER, "add_prefix_space": True}),
        INNER,  # one word, whatever the text
        sequence(split(LLAMA3)),
        sequence({**split(LLAMA3), "pattern": {"Regex": [LLAMA3]}}, INNER),
        sequence(BYTES, split(LLAMA3)),
        {"type": "Whitespace"},
    ],
)
def test_a_cut_that_llama_cpp_has_no_name_for_is_refused(cut):
    with pytest.raises(UnsupportedModelError, match="no pre-tokenizer of llama"):
        pre_tokenizer({"pre_tokenizer": cut}, "llama-bpe", Path("tokenizer.json"))
