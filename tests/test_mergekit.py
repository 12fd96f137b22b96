"""Merge methods against mergekit 0.1.5: stored results of it, and itself where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeft.merging import merge
from tests.mergekit_cases import CASES, RANDOM, run_mergekit, save_models
from tests.tiny_checkpoints import disk_tensors

VECTORS = Path(__file__).parent / "vectors" / "mergekit.safetensors"
EXACT = [name for name in CASES if name not in RANDOM]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def merged(models: Path, case: str, out: Path) -> dict[str, torch.Tensor]:
    recipe = json.loads(json.dumps(CASES[case])) | {"out_dtype": "bfloat16"}
    if recipe["merge_method"] in ("slerp", "nuslerp"):
        recipe.setdefault("parameters", {})["unit"] = "tensor"
    for model in recipe["models"]:
        model["model"] = str(models / model["model"])
    if "base_model" in recipe:
        recipe["base_model"] = str(models / recipe["base_model"])
    merge(recipe, out, progress=False)
    return disk_tensors(out)


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Distance in bf16 values between them: neighbours are one apart."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(ours) - ordered(theirs)).abs()


def check_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    # Where terms cancel, the last bits of f32 sums decide many bf16 steps of a value near zero: these are held to f32.
    apart = torch.cat([steps_apart(ours[name], theirs[name]).flatten() for name in ours])
    close = torch.cat([((ours[name].float() - theirs[name].float()).abs() <= 1e-7).flatten() for name in ours])
    assert ((apart <= 1) | close).all(), f"{apart.max()} steps apart"
    assert (apart != 0).double().mean() <= 0.01


@pytest.mark.parametrize("case", EXACT)
def test_method_equals_the_stored_result_of_mergekit(models, tmp_path, case):
    theirs = {key.partition("/")[2]: value for key, value in load_file(VECTORS).items() if key.startswith(f"{case}/")}
    assert theirs
    check_equal(merged(models, case, tmp_path / "out"), theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mergekit's own
@pytest.mark.parametrize("case", ["slerp", "ties"])
def test_method_equals_mergekit_itself(models, tmp_path, case):
    pytest.importorskip("mergekit", reason="pip install mergekit==0.1.5")
    run_mergekit(CASES[case], models, tmp_path / "theirs")
    check_equal(merged(models, case, tmp_path / "out"), disk_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("case", RANDOM)
def test_random_methods_keep_as_much_as_mergekit(models, tmp_path, case):
    base, tuned = disk_tensors(models / "base"), disk_tensors(models / "a")
    theirs = {key.partition("/")[2]: value for key, value in load_file(VECTORS).items() if key.startswith(f"{case}/")}
    ours = merged(models, case, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    large = (tuned[name].float() - base[name].float()).abs() > 0.01  # a kept delta changes the rounded weight
    kept = [(found[name] != base[name])[large].double().mean().item() for found in (ours, theirs)]
    # Two binomial shares of some 300 values: five standard deviations of their difference.
    assert abs(kept[0] - kept[1]) < 5 * (2 * 0.25 / large.sum().item()) ** 0.5
