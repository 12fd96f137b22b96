"""``learning_rate: auto``: the rate that is found, and that nothing else is left behind."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

import moeft
from moeft.config import SftRecipe
from moeft.config.dpo import DpoRecipe
from moeft.config.learning_rate import RangeTest, default_rate
from moeft.errors import RecipeError, TrainingError
from moeft.evaluation.divergence import BaseDivergence
from moeft.integration.trained_roles import train_roles
from moeft.reports import write_report
from moeft.runs import preflight
from moeft.runs.sft import run
from moeft.training.range_test import range_test
from moeft.training.trained_weights import FILE
from tests.tiny_models import save_tiny_model, tiny_model, token_ids
from tests.tiny_training import sft_trainer, sums, tiny_tokenizer

RATES = [1e-4, 1e-3, 1e-2, 1e-1]
BOUND = 1e-3


def adapted():
    return moeft.add_lora(tiny_model("olmoe"), 2, targets=("attention", "experts"), seed=0)


def in_full():
    model = tiny_model("olmoe")
    train_roles(model, ["attention"])
    return model


def try_rates(trainer, bound=BOUND):
    base = BaseDivergence(trainer.model, token_ids(2, 12).tolist())

    def moved() -> float:
        nats, tokens = base.measure().sum(axis=0)
        return nats / tokens

    return range_test(trainer, moved, RATES, steps=3, bound=bound)


@pytest.mark.parametrize("make", [adapted, in_full])
def test_everything_is_put_back_bit_for_bit_and_the_curve_is_the_same_again(make, tmp_path):
    trainer = sft_trainer(make(), tmp_path, learning_rate=0.5, gradient_accumulation_steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.manual_seed(7)
    points = try_rates(trainer)
    drawn = torch.rand(3)
    again = try_rates(trainer)
    assert points == again
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.optimizer is None
    assert trainer.args.learning_rate == 0.5
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("make", [adapted, in_full])
def test_larger_rates_move_the_model_further_until_one_breaks_the_bound(make, tmp_path):
    points = try_rates(sft_trainer(make(), tmp_path))
    assert [point.rate for point in points] == RATES[: len(points)]
    moved = [point.divergence for point in points]
    assert moved == sorted(moved)
    assert [point.is_within for point in points] == [True] * (len(points) - 1) + [False]
    assert [value <= BOUND for value in moved] == [point.is_within for point in points]


def test_loss_that_is_not_finite_ends_the_test_and_leaves_the_weights(tmp_path):
    trainer = sft_trainer(in_full(), tmp_path)
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        weight[0, 0] = math.inf
    (point,) = try_rates(trainer, bound=math.inf)
    assert math.isnan(point.divergence)
    assert not point.is_within
    assert weight[0, 0] == math.inf


def test_memory_that_runs_out_is_explained_and_the_weights_are_put_back(tmp_path):
    trainer = sft_trainer(adapted(), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    layer = trainer.model.get_base_model().model.layers[1]
    hook = layer.register_forward_hook(lambda *_: torch.empty(2**50))  # four pebibytes
    with pytest.raises(TrainingError, match=r"out of memory in step 1: [\s\S]*\nheld: "):
        range_test(trainer, lambda: 0.0, RATES, steps=1, bound=BOUND)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.optimizer is None


def test_rates_are_evenly_spaced_and_reach_both_ends():
    assert RangeTest().rates(1e-4) == pytest.approx([1e-5 * 10 ** (i / 3) for i in range(7)])
    assert RangeTest(lowest=1e-6, highest=1e-4, per_decade=1).rates(1.0) == pytest.approx([1e-6, 1e-5, 1e-4])
    assert RangeTest(lowest=3e-4, highest=3e-4).rates(1e-5) == [3e-4]
    assert RangeTest(lowest=1e-5, highest=4e-5, per_decade=1).rates(1.0) == pytest.approx([1e-5, 4e-5])
    assert RangeTest(highest=1e-7).rates(1e-5)[-1] == pytest.approx(1e-7)


def test_default_depends_on_what_trains():
    assert (
        default_rate(["attention"], ()) < default_rate((), ["attention", "experts"]) < default_rate((), ["attention"])
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_model("olmoe", tmp_path_factory.mktemp("base"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(folder, base, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums()))
    training = {
        "learning_rate": "auto",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    content = {
        "model": str(base),
        "output": str(folder / "run"),
        "dtype": "float32",
        "train": ["attention"],
        "data": {"train": str(folder / "rows.jsonl")},
        "gate": {"divergence": {"path": str(folder / "rows.jsonl"), "limit": 1.0}},
        "range_test": {"lowest": 1e-4, "highest": 1.0, "per_decade": 1, "steps": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, **changes, "training": training | changes.get("training", {})}))
    return SftRecipe.load(path)


def test_run_finds_a_rate_stores_the_curve_and_trains_as_if_it_had_been_given(base, tmp_path):
    said: list[str] = []
    found = run(recipe(tmp_path / "auto", base), said.append)
    curve = found.read_json("learning_rate.json")
    assert curve["bound"] == pytest.approx(1.0 * 2 / 4)
    within = [point for point in curve["points"] if point["is_within"]]
    assert within
    assert curve["rate"] == within[-1]["rate"]
    assert found.read_json("metrics.json")["learning_rate"] == curve
    assert any(f"{curve['rate']:.2e}  KL" in line for line in said)
    given = run(recipe(tmp_path / "given", base, training={"learning_rate": curve["rate"]}), said.append)
    first, second = (load_file(done.path / "trained" / FILE) for done in (found, given))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    report = write_report(found.path).read_text()
    assert "## Learning rate" in report
    assert (found.path / "learning_rate.png").stat().st_size > 5_000


def test_second_start_takes_the_rate_that_the_first_one_found(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("moeft.runs.tuning.add_gate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tmp_path, base), lambda text: None)
    kept = json.loads((tmp_path / "run" / "learning_rate.json").read_text())
    said: list[str] = []
    again = run(recipe(tmp_path, base), said.append)
    assert not any("KL(base || model) after" in line for line in said)
    assert again.read_json("metrics.json")["learning_rate"] == kept


def test_range_whose_lowest_rate_moves_too_far_is_an_error(base, tmp_path):
    with pytest.raises(TrainingError, match=r"already 0\.5 moves the model by .* lower range_test\.lowest"):
        run(recipe(tmp_path, base, range_test={"lowest": 0.5, "highest": 0.5, "limit": 1e-6}), lambda text: None)


def test_rate_that_is_neither_a_number_nor_auto_is_refused(base, tmp_path):
    with pytest.raises(RecipeError, match=r"training\.learning_rate is 'fast', expected a number"):
        preflight.check(recipe(tmp_path, base, training={"learning_rate": "fast"}))
    with pytest.raises(RecipeError, match="lowest at most as large as highest"):
        recipe(tmp_path, base, range_test={"lowest": 1.0, "highest": 0.1})


def test_auto_is_refused_for_preference_pairs_and_in_several_processes(base, tmp_path, monkeypatch):
    sft = recipe(tmp_path, base)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="auto tries rates in one process"):
        preflight.check(sft.model_copy(update={"gate": None}))
    monkeypatch.delenv("WORLD_SIZE")
    pairs = {"model": str(base), "output": "run", "data": {"train": "rows.jsonl"}}
    dpo = DpoRecipe.from_content({**pairs, "training": {"learning_rate": "auto"}}, "recipe", tmp_path)
    with pytest.raises(RecipeError, match="'auto', which moeft sft alone can find"):
        preflight.check(dpo)
