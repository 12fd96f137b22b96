"""The README's lines of Python run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import save_tiny_model
from tests.tiny_training import tiny_tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    path = save_tiny_model("gemma4", tmp_path / "base", torch.bfloat16)
    tiny_tokenizer().save_pretrained(path)
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}] * 8
    exec(code, {"path": path, "out": str(tmp_path / "out"), "merged": tmp_path / "merged", "rows": rows})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_commands_of_the_readme_exist(target):
    assert f"make {target}" in README.read_text("utf-8")
    assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text("utf-8"), re.MULTILINE)
