"""The proof of an export: it holds for what is written rightly, and fails for every small tensor that is not."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeft import gguf
from moeft.cli import main
from moeft.evaluation.ggml_reference import reference
from moeft.evaluation.llama_cpp import compare
from moeft.runs.gguf_proof import LAYOUT_ERROR, LAYOUT_SHARE, prove
from moeft.serving import ServeOptions, Server
from tests import real_models
from tests.test_gguf_export import BASE, save_model

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
pytest.importorskip("libgguf", reason="needs ggml's quantisers: pip install libgguf")


def test_the_embedded_base_is_proven_in_three_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last word falls into single bytes, and llama.cpp reports no probability of a part of a character.
    (tmp_path / "text").write_text("Restart the service web-3.\n\nThe disk of db-1 is 93 % full, says жар.\n", "utf-8")
    files = [tmp_path / f"{kind}.gguf" for kind in ("q8_0", "q4_k_m")]
    for file in files:
        gguf.export(BASE, file, type=file.stem)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="0"):
        main(["export", "prove", str(BASE), *map(str, files), "--text", str(tmp_path / "text")])
    printed = capsys.readouterr().out
    assert re.search(r"all in f32 .* 100%    100%", printed)
    for file in files:
        counts = re.search(rf"{re.escape(file.name)} .* (\d+) of (\d+) ", printed)
        assert counts is not None
        assert counts[1] == counts[2]
    assert "2 of 2 texts cut alike" in printed
    assert not list(tmp_path.glob(".gguf-proof-*"))


def test_a_block_that_ggml_would_not_write_fails_the_proof(tmp_path: Path) -> None:
    report = gguf.export(BASE, tmp_path / "m.gguf", type="q8_0")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    (tensor,) = (t for t in gguf.read_header(tmp_path / "m.gguf")["tensors"] if t["name"] == "blk.1.attn_q.weight")
    raw[tensor["offset"] + 5] ^= 1
    (tmp_path / "m.gguf").write_bytes(raw)
    (tmp_path / "text").write_text("Restart the service web-3.\n")
    proof = prove(BASE, [tmp_path / "m.gguf"], text=tmp_path / "text")
    assert proof.problems() == ["m.gguf: blk.1.attn_q.weight has other blocks than ggml makes"]
    assert report.bits_per_weight == pytest.approx(proof.files[1].bits_per_weight)


@pytest.mark.parametrize("family", ["gemma4", "gemma4_e4b"])
def test_no_norm_scale_or_factor_can_be_lost_unseen(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, family, torch.float32)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            # The scale of embeddings is computed, not saved.
            if values.ndim < 2 and ("norm" in name or "scal" in name) and "embed_scale" not in name:
                values.mul_(torch.empty_like(values).uniform_(0.5, 1.5))
    model.save_pretrained(folder)
    ids = torch.randint(20, 180, (18,)).tolist()
    spoken = reference(model, [[2, *ids]])
    gguf.export(folder, tmp_path / "m.gguf", type="f32")
    raw = (tmp_path / "m.gguf").read_bytes()

    def error(file: bytes) -> float:
        (tmp_path / "changed.gguf").write_bytes(file)
        with Server(tmp_path / "changed.gguf", ServeOptions(context=64, threads=1, exact=True)) as server:
            return compare(server.client, spoken).error(LAYOUT_SHARE)

    assert error(raw) < LAYOUT_ERROR["f32"]
    kinds = {}
    for tensor in gguf.read_header(tmp_path / "m.gguf")["tensors"]:
        values = np.frombuffer(raw, "<f4", tensor["bytes"] // 4, tensor["offset"])
        # Those that are one in a fresh model: a reader that drops them would not be noticed there.
        if len(tensor["shape"]) == 1 and "rope" not in tensor["name"] and values.std() + abs(values.mean() - 1) > 1e-3:
            kinds.setdefault(re.sub(r"blk\.\d+\.", "", tensor["name"]), tensor)
    assert len(kinds) > 8
    for kind, tensor in kinds.items():
        ones = np.ones(tensor["bytes"] // 4, "<f4").tobytes()
        changed = raw[: tensor["offset"]] + ones + raw[tensor["offset"] + tensor["bytes"] :]
        assert error(changed) > LAYOUT_ERROR["f32"], kind


@pytest.mark.slow
def test_gemma3_270m_is_proven(tmp_path: Path) -> None:
    model = real_models.gemma3_270m()
    (tmp_path / "text").write_text("The river had been rising since noon.\n\nfor i in range(10):\n    print(i * i)\n")
    gguf.export(model, tmp_path / "m.gguf", type="q8_0")
    proof = prove(model, [tmp_path / "m.gguf"], text=tmp_path / "text", max_tokens=12)
    assert proof.problems() == []
    assert proof.files[0].comparison.greedy == 1
    assert proof.files[0].comparison.perplexity == pytest.approx(proof.reference_perplexity, rel=1e-3)
    assert proof.files[1].comparison.perplexity == pytest.approx(proof.reference_perplexity, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_270m", "smollm2_135m"])
def test_llama_cpp_cuts_the_texts_of_a_real_model_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = getattr(real_models, name)()
    gguf.export(folder, tmp_path / "m.gguf", type="q8_0")
    words = (Path(__file__).parents[1] / "docs" / "log.md").read_text().splitlines()
    texts = [line for line in words if line.strip()][:300]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Server(tmp_path / "m.gguf", ServeOptions(context=64, threads=1)) as server:
        different = [
            text
            for text in texts
            if server.client.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
        ]
    assert different == []
