"""Merges that are cut short: the disk is full, an input breaks, the process is killed. No output, and a way on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_checkpoints import contents, save_base


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    base = save_base(folder / "base", "mixtral", torch.float32, max_shard_size="60KB")
    tuned = save_base(folder / "tuned", "mixtral", torch.float32, seed=3, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) >= 3
    models = [{"model": str(base)}, {"model": str(tuned)}]
    (folder / "recipe.yaml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    return folder


def run(folder: Path, out: Path, before: str = "", *options: str) -> subprocess.CompletedProcess[str]:
    words = [str(folder / "recipe.yaml"), "--out", str(out), "--quiet", *options]
    script = f"import sys\n{before}\nfrom moeft.cli import main\nmain(['merge', *{words!r}])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


def test_a_full_disk_leaves_no_output_and_the_next_run_goes_on(prepared, tmp_path):
    # Writes beyond 40 KB of a file fail, as they do where a disk is full.
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    done = run(prepared, tmp_path / "out", full)
    assert done.returncode == 3
    assert "cannot write" in done.stderr
    assert ".partial/model-" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(prepared, tmp_path / "out").returncode == 0
    assert run(prepared, tmp_path / "expected").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_input_that_shrinks_while_it_is_read_is_named(prepared, tmp_path):
    tuned = prepared / "tuned"
    shard = sorted(tuned.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    # The file is cut after its header was read: by the first call of the progress bar.
    cut = f"open({str(shard)!r}, 'r+b').truncate({len(whole) // 2})"
    script = (
        "from moeft import _core\n"
        f"def stop(*call): {cut}\n"
        f"_core.merge_checkpoint(open({str(prepared / 'recipe.yaml')!r}).read(), '.', {str(tmp_path / 'out')!r}, stop)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    finally:
        shard.write_bytes(whole)
    assert done.returncode == 1
    assert f"cannot read {shard}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_so_and_exits_with_130(tmp_path):
    # Large enough that the merge is still at work when the signal comes.
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({f"model.x{i}": torch.full((1 << 24,), float(i)) for i in range(6)}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in ("a", "b")]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [
        sys.executable,
        "-m",
        "moeft.cli",
        "merge",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    child = subprocess.Popen([*command, "--quiet"], stderr=subprocess.PIPE, text=True)
    shard = tmp_path / "out.partial" / "model.safetensors"
    while not shard.exists() or shard.stat().st_size < 1 << 20:
        assert child.poll() is None
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted; what is finished was kept" in stderr
    assert not (tmp_path / "out").exists()


def test_a_killed_merge_goes_on_inside_its_only_file_and_makes_damage_anew(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {f"model.x{i}": torch.randn(1024, 1024, generator=generator) for i in range(6)}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    recipe = {"merge_method": "slerp", "models": models, "parameters": {"t": 0.3}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    # Written bytes are kept in the background, so the work pauses a little before it is killed at two thirds.
    script = (
        "import os, signal, time\n"
        "from moeft import _core\n"
        "def progress(done, total, what):\n"
        "    time.sleep(0.02)\n"
        "    if done > total * 2 / 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"text = open({str(tmp_path / 'recipe.yaml')!r}).read()\n"
        f"_core.merge_checkpoint(text, '.', {str(tmp_path / 'out')!r}, progress)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial" / "model.safetensors"
    damaged = bytearray(partial.read_bytes())
    damaged[2_000_000] ^= 1
    partial.write_bytes(damaged)
    again = run(tmp_path, tmp_path / "out", "", "--json")
    report = json.loads(again.stdout)
    # At least two thirds of six tensors of 4 MiB were written: the writer is ahead of what it tells, marks are behind
    # it. Of the first tensor nothing is believed from the damage on.
    tensor = 4 * 1024 * 1024
    assert tensor < report["bytes_resumed"] <= 6 * tensor - (tensor - 2_000_000)
    assert run(tmp_path, tmp_path / "expected").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_damaged_file_is_named(prepared, tmp_path):
    tuned = prepared / "tuned"
    index = json.loads((tuned / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    file = tuned / index["weight_map"][name]
    before = file.read_bytes()
    for damage, message in (
        (before[: len(before) - 100], "truncated or damaged"),
        ((200_000_000).to_bytes(8, "little") + before[8:], "more than the 100 MB"),
        (before[:8] + b"[" + before[9:], "does not start with an opening brace"),
    ):
        file.write_bytes(damage)
        done = run(prepared, tmp_path / "out")
        assert done.returncode == 1
        assert message in done.stderr
        assert str(file) in done.stderr
    file.write_bytes(before)
    assert run(prepared, tmp_path / "out").returncode == 0
