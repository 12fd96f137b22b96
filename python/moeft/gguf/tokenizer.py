"""The tokenizer of a checkpoint as keys of a GGUF file, from ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeft.errors import CheckpointError, UnsupportedModelError
from moeft.gguf.config import TextConfig, read_json
from moeft.gguf.pre_tokenizer import pre_tokenizer
from moeft.gguf.values import Metadata, array, flag, string, uint32

# Types of tokens in llama.cpp.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}


def tokenizer_metadata(folder: Path, settings: Mapping[str, Any], config: TextConfig) -> Metadata:
    """Tokens with their types, merges, ids of special tokens, and the chat template.

    Special tokens are typed by ``added_tokens`` of ``tokenizer.json``: what a config calls special is often less, and a
    special token that is not typed so is split into letters.

    Args:
        folder: The checkpoint.
        settings: ``model``, ``pre`` and ``add_bos`` of the architecture.
        config: The model; its vocabulary may be larger, and the rest is then filled with unused tokens.

    Raises:
        CheckpointError: If ``tokenizer.json`` is missing or damaged.
        UnsupportedModelError: If it is no BPE, or cuts texts into words as no name of llama.cpp says.
    """
    document = read_json(folder / "tokenizer.json")
    model, added = document.get("model"), document.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise UnsupportedModelError(f"{folder / 'tokenizer.json'} is of type {kind!r}, expected BPE")
    tokens = _tokens(folder, model, added, int(config.get("vocab_size")))
    # A vocabulary with byte tokens splits at spaces as SentencePiece does; one without is byte-level BPE.
    name = settings["model"] if model.get("byte_fallback") or settings["model"] == "gpt2" else "gpt2"
    if name == "gpt2" and model.get("byte_fallback"):
        name = "llama"
    keys: Metadata = [("model", string(name))]
    if name == "gpt2":
        name_of_cut = pre_tokenizer(document, settings.get("pre", "default"), folder / "tokenizer.json")
        keys.append(("pre", string(name_of_cut)))
    keys.append(("tokens", array("string", [text for text, _ in tokens])))
    if name != "gpt2":
        # Such vocabularies are sorted by score: the smaller id is merged first.
        scores = [-float(index) if kind == NORMAL else 0.0 for index, (_, kind) in enumerate(tokens)]
        keys.append(("scores", array("float32", scores)))
    keys.append(("token_type", array("int32", [kind for _, kind in tokens])))
    if name != "llama":
        keys.append(("merges", array("string", _merges(folder, model.get("merges")))))
    keys += _special_ids(folder, {text: index for index, (text, _) in enumerate(tokens)}, config)
    own = _settings(folder).get("add_bos_token")
    keys.append(("add_bos_token", flag(settings["add_bos"] if own is None else own)))
    if name != "gpt2":
        keys.append(("add_space_prefix", flag(False)))
    template = chat_template(folder)
    whole: Metadata = [(f"tokenizer.ggml.{key}", value) for key, value in keys]
    return [*whole, ("tokenizer.chat_template", string(template))] if template else whole


def _merges(folder: Path, found: Any) -> list[str]:
    """Pairs that are merged, in order, each as a text with a space."""
    try:
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in found or ()]
    except TypeError as error:
        raise CheckpointError(f"{folder / 'tokenizer.json'} has merges that are no pairs of texts ({error})") from error


def _tokens(folder: Path, model: Mapping[str, Any], added: list[Any], vocab_size: int) -> list[tuple[str, int]]:
    """Text and type of every token."""
    tokens = [(f"[PAD{index}]", UNUSED) for index in range(vocab_size)]
    try:
        for text, index in model["vocab"].items():
            if index < 0:
                raise IndexError(f"token {text!r} has the id {index}")
            tokens[index] = (text, BYTE if BYTE_TOKEN.fullmatch(text) else NORMAL)
        for token in added:
            if token["id"] < 0:
                raise IndexError(f"token {token['content']!r} has the id {token['id']}")
            tokens[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} does not fit the {vocab_size} tokens of config.json ({error!r}); "
            "take both from the same checkpoint"
        ) from error
    return tokens


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _special_ids(folder: Path, ids: Mapping[str, int], config: TextConfig) -> Metadata:
    settings, found = _settings(folder), {}
    for ours, theirs in IDS.items():
        token = settings.get(f"{ours}_token")
        text = token.get("content") if isinstance(token, dict) else token
        known = config.get(f"{ours}_token_id", default=None)
        first = known[0] if isinstance(known, list) and known else known
        index = ids.get(text) if isinstance(text, str) else first
        if isinstance(index, int):
            found[theirs] = index
    # A second end, after a turn, stops generation too.
    ends = config.get("eos_token_id", default=None)
    others = [end for end in ends if end != found.get("eos")] if isinstance(ends, list) else []
    if others:
        found["eot"] = others[0]
    return [(f"{name}_token_id", uint32(index)) for name, index in found.items()]


def chat_template(folder: Path) -> str | None:
    """The default chat template of a checkpoint, if it has one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = _settings(folder).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
