"""Folders whose names are no UTF-8, which Linux allows: written like others, shown with replacement characters."""

import json
import os
import sys

import pytest
import torch

from moeft import _core
from tests.tiny_checkpoints import save_adapter, save_base


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose file names are any bytes")
def test_checkpoints_are_read_and_written_in_folders_that_are_not_utf8(tmp_path):
    save_adapter(tmp_path / "plain" / "adapter", save_base(tmp_path / "plain" / "base", "qwen3_moe", torch.bfloat16))
    folder = (tmp_path / "plain").rename(tmp_path / os.fsdecode(b"\xff"))
    recipe = {"merge_method": "lora", "base_model": "base", "models": [{"adapter": "adapter"}]}
    reports = {
        "merged": _core.merge_checkpoint(json.dumps(recipe), folder, folder / "merged"),
        "fused": _core.convert_layout(folder / "base", folder / "fused", "fuse"),
        "packed": _core.quantize_checkpoint(folder / "base", folder / "packed", "{}"),
    }
    for name, report in reports.items():
        assert json.loads(report)["out"] == f"{tmp_path}/\ufffd/{name}"
        assert _core.tensors(folder / name) != "[]"
