"""``moeft.adapters.verify`` and ``moeft adapter``: what is told from data alone, and what is not told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeft.adapters import Layout, convert, verify
from moeft.cli import main
from moeft.errors import AdapterError
from tests.test_lora import with_lora
from tests.tiny_checkpoints import EXPERTS, save_adapter, save_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and a plain PEFT adapter that leaves expert 2 alone: both its factors are zero."""
    root = tmp_path_factory.mktemp("saved")
    base = save_base(root / "base", "gemma4", torch.bfloat16)
    adapter = save_adapter(root / "adapter", base)
    factors = load_file(adapter / WEIGHTS)
    for key, factor in factors.items():
        if ".experts." in key and "lora_B" in key:
            factor.view(factor.shape[0], -1, 7)[:, :, 2] = 0
        elif ".experts." in key:
            factor.view(7, -1, factor.shape[1])[2] = 0
    save_file(factors, adapter / WEIGHTS, {"format": "pt"})
    return base, adapter


def unmarked(adapter, folder, **changes):
    """A copy without any mark of its writer: no header, no version."""
    copy = shutil.copytree(adapter, folder)
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text()) | {"peft_version": None, "base_model_name_or_path": None} | changes
    config.pop("lora_B_layout", None)
    path.write_text(json.dumps(config))
    save_file(load_file(copy / WEIGHTS), copy / WEIGHTS, {"format": "pt"})
    return copy


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("layout", Layout)
def test_layout_is_told_from_sizes_and_zeros_alone(saved, layout, with_base, tmp_path):
    base, adapter = saved
    convert(adapter, tmp_path / "there", layout)
    found = verify(unmarked(tmp_path / "there", tmp_path / "copy"), base if with_base else None)
    assert found.layout is layout
    assert not {evidence.source for evidence in found.detection.evidence} & {"header", "config", "peft", "writer"}
    experts = {part.name: part for part in found.parts if part.name.startswith("experts.")}
    assert {(part.weights, part.changed) for part in experts.values()} == {(21, 18)}


def trained_everywhere(saved, folder, **options):
    return save_adapter(folder, saved[0], seed=3, **options)


def test_order_of_columns_is_not_guessed_for_unsloth(saved, tmp_path):
    """All experts trained, unsloth's mark of itself but not of the order: two layouts remain."""
    adapter = unmarked(trained_everywhere(saved, tmp_path / "a"), tmp_path / "b", auto_mapping={"unsloth_fixed": True})
    found = verify(adapter, saved[0])
    assert found.layout is None
    assert found.detection.possible == {Layout.PEFT, Layout.UNSLOTH}
    assert "it may be peft or unsloth" in found.detection.reason
    assert {part.changed for part in found.parts if part.name.startswith("experts.")} == {None}
    with pytest.raises(AdapterError, match=r"cannot be told: it may be peft or unsloth .* --from"):
        convert(adapter, tmp_path / "out", "vllm", base=saved[0])
    with pytest.raises(AdapterError, match="is not in layout peft018"):
        convert(adapter, tmp_path / "out", "vllm", source_layout="peft018", base=saved[0])
    assert convert(adapter, tmp_path / "out", "vllm", source_layout="unsloth", base=saved[0]) is Layout.UNSLOTH


def test_square_stack_of_unknown_release_is_not_guessed(saved, tmp_path):
    """I = H and one stack alone: nothing but the release of PEFT tells inputs from outputs."""
    base = save_base(tmp_path / "base", "gemma4", torch.float32)
    config = json.loads((base / "config.json").read_text())
    adapter = trained_everywhere(saved, tmp_path / "a", target_parameters=EXPERTS[1:])
    square = {}
    for key, factor in load_file(adapter / WEIGHTS).items():
        square[key] = factor.repeat(1, 2)[:, :64].contiguous() if ".experts.lora_A" in key else factor
    save_file(square, adapter / WEIGHTS)
    tensors = {f"model.layers.{i}.experts.down_proj": torch.zeros(7, 64, 64) for i in range(3)}
    tensors |= {f"model.layers.{i}.experts.gate_up_proj": torch.zeros(7, 128, 64) for i in range(3)}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    assert verify(unmarked(adapter, tmp_path / "none"), base).detection.possible == {Layout.PEFT, Layout.PEFT018}
    for version, layout in (("0.18.1", Layout.PEFT018), ("0.20.0.dev0", Layout.PEFT), ("0.19.1.dev0", None)):
        assert verify(unmarked(adapter, tmp_path / version, peft_version=version), base).layout is layout


def test_evidence_that_contradicts_itself_is_refused(saved, tmp_path):
    convert(saved[1], tmp_path / "there", "unsloth")
    path = tmp_path / "there" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_B_layout": "rank_major"}))
    found = verify(tmp_path / "there", saved[0])
    assert found.layout is None
    assert "the evidence contradicts itself" in found.detection.reason


def test_untrained_experts_and_broken_values_are_problems(saved, tmp_path):
    adapter = trained_everywhere(saved, tmp_path / "a")
    factors = load_file(adapter / WEIGHTS)
    for key, factor in factors.items():
        if ".experts." in key and "lora_B" in key:
            factor.zero_()
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(factors, adapter / WEIGHTS, {"format": "pt"})
    problems = verify(adapter).problems
    assert sum("is zero: it was never trained" in problem for problem in problems) == 2
    assert any("q_proj.lora_A.weight holds values that are not finite" in problem for problem in problems)


def test_base_is_compared_by_its_fingerprint(checkpoints, tmp_path):
    with_lora(checkpoints["olmoe"]).save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", checkpoints["olmoe"])
    assert (found.layout, found.base, found.problems) == (Layout.PEFT, "same", ())
    other = save_base(tmp_path / "other", "olmoe", torch.float32, seed=5)
    found = verify(tmp_path / "adapter", other)
    assert found.base == "other"
    assert "it was trained on another base" in found.problems[0]
    with pytest.raises(AdapterError, match="is this the right base model"):
        verify(tmp_path / "adapter", save_base(tmp_path / "gemma4", "gemma4", torch.float32))


def test_adapter_without_experts_is_the_same_in_every_layout(saved, tmp_path):
    adapter = trained_everywhere(saved, tmp_path / "a", target_parameters=None)
    found = verify(unmarked(adapter, tmp_path / "b"))
    assert found.layout is Layout.PEFT
    assert [part.name for part in found.parts] == ["k_proj", "o_proj", "q_proj"]


def test_chosen_experts_are_counted(checkpoints, tmp_path):
    with_lora(checkpoints["olmoe"], targets=("experts",), experts=[0, 3]).save_pretrained(tmp_path)
    (down, _) = verify(tmp_path).parts
    assert (down.name, down.weights, down.changed) == ("experts.down_proj", 10, 4)


def command(*arguments):
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_command_converts_and_tells(saved, tmp_path, capsys):
    base, adapter = saved
    assert command("adapter", "convert", adapter, tmp_path / "old", "--to", "peft018") == 0
    assert capsys.readouterr().out == f"{adapter} (peft) written to {tmp_path / 'old'} (peft018)\n"
    assert command("adapter", "verify", tmp_path / "old", "--base", base) == 0
    printed = capsys.readouterr().out
    assert "layout                peft018\n" in printed
    assert "experts.down_proj           21       18  4         1.5\n" in printed


def test_command_exits_with_2_when_it_cannot_tell(saved, tmp_path, capsys):
    marks = {"auto_mapping": {"unsloth_fixed": True}}
    adapter = unmarked(trained_everywhere(saved, tmp_path / "a"), tmp_path / "b", **marks)
    assert command("adapter", "verify", adapter, "--base", saved[0]) == 2
    printed = capsys.readouterr()
    assert "layout                cannot be told\n" in printed.out
    assert "cannot be told: it may be peft or unsloth" in printed.err


def test_command_exits_with_1_for_a_problem_or_an_error(saved, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "a", saved[0], spread=0.0)
    assert command("adapter", "verify", adapter) == 1
    assert "problem: every factor B of experts.down_proj is zero" in capsys.readouterr().out
    assert command("adapter", "convert", adapter, tmp_path / "out", "--to", "pefd") == 1
    assert "moeft: error: to is 'pefd', expected one of peft" in capsys.readouterr().err


def test_single_experts_for_vllm_are_whole_and_of_the_shapes_of_the_base(saved, tmp_path):
    base, adapter = saved
    convert(adapter, tmp_path / "vllm", "vllm", base=base)
    whole = verify(tmp_path / "vllm", base)
    assert (whole.layout, whole.problems) == (Layout.VLLM, ())
    factors = load_file(tmp_path / "vllm" / WEIGHTS)
    # Gemma 4: 3 layers of 7 experts, three projections each, all below the module that vLLM has.
    assert sum(".moe.experts." in key for key in factors) == 3 * 7 * 3 * 2
    prefix = "base_model.model.model.layers.1.moe.experts.3"
    lacking = {key: factor for key, factor in factors.items() if not key.startswith(f"{prefix}.up_proj")}
    narrow = factors | {f"{prefix}.down_proj.lora_A.weight": torch.ones(4, 5)}
    for name, changed, problem in (
        ("lacking", lacking, f"{prefix}.up_proj is missing, expected all 7 experts of the layer"),
        ("narrow", narrow, f"{prefix}.down_proj has A [4, 5] and B"),
    ):
        copy = shutil.copytree(tmp_path / "vllm", tmp_path / name)
        save_file(changed, copy / WEIGHTS)
        (found,) = [text for text in verify(copy, base).problems if prefix in text]
        assert found.startswith(problem)
        with pytest.raises(SystemExit, match="1"):
            main(["adapter", "verify", str(copy), "--base", str(base)])
