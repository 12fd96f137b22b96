"""Perplexity of a model whose linear layers were quantised with and without an importance matrix, on held-out text.

    python benches/gguf_imatrix.py MODEL --calibration wikitext2/valid.txt --text wikitext2/test.txt

The blocks of exported files are restored into the model in memory and scored in float32, so that the figures show the
weights alone, without llama.cpp's rounding of activations. Rows of neither text are in the other.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeft import _core, gguf
from moeft.evaluation.prefix_tree import Scored
from moeft.evaluation.scoring import Scorer
from moeft.integration import model_family
from moeft.runs import imatrix

VARIANTS: dict[str, dict[str, Any]] = {
    "q4_k_m": {"type": "q4_k_m"},
    "all q4_0": {"type": "q4_k_m", "tensor_types": {"blk.*weight": "q4_0"}},
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("--calibration", type=Path, required=True)
    words.add_argument("--text", type=Path, required=True)
    words.add_argument("--rows", type=int, default=64, help="of the matrix, 512 tokens each at most")
    words.add_argument("--windows", type=int, default=16, help="of 256 tokens of the text")
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = folder / "rows.jsonl"
        texts = pages(given.calibration)
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        imatrix.run(given.model, rows, folder / "imatrix.gguf", rows=given.rows, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        windows = windows_of(given.text, AutoTokenizer.from_pretrained(given.model), given.windows)
        print("| linear layers | without | with a matrix |\n|---|---:|---:|")
        print(f"| as they are | {perplexity(model, windows):.3f} | |", flush=True)
        for number, (name, options) in enumerate(VARIANTS.items()):
            found = []
            for matrix in (None, folder / "imatrix.gguf"):
                file = folder / f"{number}-{matrix is None}.gguf"
                gguf.export(given.model, file, imatrix=matrix, **options)
                restore(model, file)
                found.append(f"{perplexity(model, windows):.3f}")
            print(f"| {name} | {' | '.join(found)} |", flush=True)


def pages(path: Path) -> list[str]:
    """Pieces of some 2,000 characters."""
    text = path.read_text("utf-8")
    return [text[start : start + 2000] for start in range(0, len(text), 2000)]


def windows_of(path: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Stretches of 256 tokens from all over a text."""
    ids = tokenizer(path.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    starts = np.linspace(0, len(ids) - 256, count).astype(int)
    return [first + ids[start : start + 256] for start in starts]


def restore(model: Any, file: Path) -> None:
    """Put the weights of the linear layers of a file into a model of the same shapes."""
    names = gguf.weight_names(model_family.of_model(model), (path for path, _ in model.named_modules()))
    places = {tensor: path for path, tensor in names.linears.items()}
    raw = np.memmap(file, np.uint8, "r")
    for tensor in gguf.read_header(file)["tensors"]:
        if tensor["name"] in places:
            weight = model.get_submodule(places[tensor["name"]]).weight
            values = np.empty(weight.numel(), np.float32)
            blocks = np.ascontiguousarray(raw[tensor["offset"] : tensor["offset"] + tensor["bytes"]])
            _core.gguf_dequantize(blocks, tensor["type"], values)
            weight.data.copy_(torch.from_numpy(values).reshape(weight.shape))


def perplexity(model: Any, windows: list[list[int]]) -> float:
    """Of every token after the first of its window."""
    sequences = [Scored(tuple(ids), 1) for ids in windows]
    total = sum(log_prob for _, log_prob in Scorer(model).score(sequences))
    return math.exp(-total / sum(len(ids) - 1 for ids in windows))


if __name__ == "__main__":
    main()
