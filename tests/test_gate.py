"""The capability gate: what it lets pass, what it catches, and what it leaves behind, on the embedded MoE."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import moeft
import moeft.demo
from moeft.config.gate import Gate, GateDivergence, GateTask
from moeft.demo.ops_agent import generate
from moeft.errors import RecipeError, TrainingError
from moeft.evaluation.divergence import BaseDivergence
from moeft.integration.loading import load
from moeft.provenance import RunFolder
from moeft.reports import write_report
from moeft.runs.gate import add_gate
from moeft.training.gate import Bound, Reading
from tests.tiny_models import randomise_lora, tiny_model, token_ids
from tests.tiny_training import adapter_weights, arguments, sft_trainer

BASE = Path(moeft.demo.__file__).parent / "base"
GENERAL = [
    "My fellow citizens, the state of our Union is strong, and the work of the year that lies before us is plain.",
    "The Congress has before it the question of the public lands, on which the prosperity of the West depends.",
    "What say you, my lord? The night is dark, and I have seen a thing upon the wall that no man should see.",
    "Let us therefore go forward with firmness in the right, as it is given to us to see the right.",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "general.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in GENERAL), "utf-8")
    return path


def gate(texts: Path, **changes) -> Gate:
    """General texts may lose 30 of their perplexity, and move by half a nat per token."""
    settings = {
        "tasks": (GateTask(task="perplexity", path=texts, metric="token_perplexity", change=30.0),),
        "divergence": GateDivergence(path=texts, limit=0.5, max_length=48),
        "every_steps": 2,
        "budget": None,
    }
    return Gate(**{**settings, **changes})


def strict(texts: Path, **changes) -> Gate:
    """No movement at all is allowed."""
    return gate(texts, tasks=(), divergence=GateDivergence(path=texts, limit=1e-9, max_length=48), **changes)


def lenient(texts: Path, **changes) -> Gate:
    return gate(texts, tasks=(), divergence=GateDivergence(path=texts, limit=1e9, max_length=48), **changes)


def embedded(folder: Path, **changes) -> moeft.SFTTrainer:
    """Four steps of the demo's task on the embedded MoE."""
    model, tokenizer = load(BASE, moeft.NF4Config(), dtype="float32")
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    return moeft.SFTTrainer(
        model=moeft.add_lora(model, 4, targets=("attention", "experts"), seed=0),
        args=moeft.SFTConfig(**arguments(folder, **{**settings, **changes}), max_length=128),
        train_dataset=generate(5, 24, 8)[0],
        processing_class=tokenizer,
    )


def tiny(folder: Path, **changes) -> moeft.SFTTrainer:
    """Four steps of a model that learns nothing."""
    model = moeft.add_lora(tiny_model("olmoe"), 2, targets=("attention",), seed=0)
    return sft_trainer(model, folder, **{"max_steps": 4, "lr_scheduler_type": "constant", **changes})


@contextmanager
def run_folder(folder: Path) -> Iterator[RunFolder]:
    """A run that begins, or one that is gone on with."""
    if (folder / "run.json").exists():
        yield RunFolder.open(folder)
    else:
        with RunFolder.create(folder, "test", {}, {}) as run:
            yield run


def train(make, folder: Path, settings: Gate, resume: int | None = None, said: list[str] | None = None, **changes):
    """Train with a gate, perhaps from the checkpoint of a step; returns the trainer, the gate and its folder."""
    checkpoints = folder / "checkpoints"
    with run_folder(folder) as run:
        trained = make(checkpoints, **changes)
        added = add_gate(settings, trained, run, (said if said is not None else []).append)
        trained.train(resume_from_checkpoint=None if resume is None else str(checkpoints / f"checkpoint-{resume}"))
    return trained, added, run


def verdicts(run: RunFolder) -> list[tuple[int, str]]:
    return [(event["step"], event["verdict"]) for event in run.events("gate")]


def test_destructive_rate_is_caught_and_the_last_good_weights_are_back(texts, tmp_path):
    said: list[str] = []
    trained, added, run = train(embedded, tmp_path, gate(texts), said=said, learning_rate=0.3)
    assert verdicts(run) == [(0, "base"), (2, "roll_back")]
    assert trained.state.global_step == 2 < 4
    assert added.stopped["rolled_back_to"] == 0
    assert "divergence is" in said[1]
    assert "went back to the weights of step 0 and stopped" in said[1]
    fresh = adapter_weights(embedded(tmp_path / "fresh").model)
    now = adapter_weights(trained.model)
    assert all(torch.equal(now[name], fresh[name]) for name in fresh)


def test_sane_rate_passes_and_the_gate_changes_no_bit_of_training(texts, tmp_path):
    trained, added, run = train(embedded, tmp_path / "gated", gate(texts), learning_rate=1e-3)
    assert verdicts(run) == [(0, "base"), (2, "passed"), (4, "passed")]
    assert added.stopped is None
    ungated = embedded(tmp_path / "ungated", learning_rate=1e-3)
    ungated.train()
    theirs = adapter_weights(ungated.model)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapter_weights(trained.model).items())
    report = write_report(run.path).read_text("utf-8")
    assert "## Capability gate" in report
    assert (run.path / "gate.png").stat().st_size > 10_000


def test_run_that_was_rolled_back_stays_stopped_when_it_is_started_again(texts, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    first, _, _ = train(tiny, tmp_path, strict(texts), **saving)
    again, added, run = train(tiny, tmp_path, strict(texts), resume=1, **saving)
    assert again.state.global_step == 1
    assert added.stopped["step"] == 2
    assert verdicts(run) == [(0, "base"), (2, "roll_back")]  # nothing was measured anew
    before = adapter_weights(first.model)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(again.model).items())


def test_resumed_run_is_held_to_the_base_of_its_first_start(texts, tmp_path):
    whole, _, unbroken = train(tiny, tmp_path / "whole", lenient(texts))
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tiny, tmp_path / "broken", lenient(texts), max_steps=2, **saving)
    resumed, _, run = train(tiny, tmp_path / "broken", lenient(texts), resume=2, **saving)
    assert verdicts(run) == [(0, "base"), (2, "passed"), (4, "passed")]
    # The divergence counts from the base, not from where the run went on.
    assert run.events("gate")[-1]["readings"] == unbroken.events("gate")[-1]["readings"]
    theirs = adapter_weights(whole.model)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapter_weights(resumed.model).items())


def test_halving_halves_the_rate_of_all_steps_to_come(texts, tmp_path):
    said: list[str] = []
    trained, _, run = train(tiny, tmp_path, strict(texts, action="halve_lr"), said=said, learning_rate=1e-3)
    assert verdicts(run) == [(0, "base"), (2, "halve_lr"), (4, "halve_lr")]
    rates = [log["learning_rate"] for log in trained.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert "the learning rate is halved" in said[1]


@pytest.mark.parametrize(("action", "steps"), [("warn", 4), ("stop", 2)])
def test_breach_warns_or_stops_and_leaves_the_weights(texts, tmp_path, action, steps):
    trained, added, _ = train(tiny, tmp_path / "gated", strict(texts, action=action))
    assert trained.state.global_step == steps
    assert (added.stopped is None) == (action == "warn")
    ungated = tiny(tmp_path / "ungated", max_steps=steps)
    ungated.train()
    theirs = adapter_weights(ungated.model)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapter_weights(trained.model).items())


def test_bound_that_the_base_breaks_stops_before_the_first_step(texts, tmp_path):
    task = GateTask(task="perplexity", path=texts, metric="token_perplexity", limit=1.5)
    with pytest.raises(TrainingError, match=r"the base itself breaks the gate: perplexity token_perplexity is .* 1.5"):
        train(tiny, tmp_path, gate(texts, tasks=(task,)))


def test_measurement_that_cannot_be_paid_waits_but_the_last_one_is_taken(texts, tmp_path):
    _, added, run = train(tiny, tmp_path, lenient(texts, budget=1e-9))
    assert verdicts(run) == [(0, "base"), (4, "passed")]
    assert added.summary()["share"] > 0


def test_gate_measures_every_epoch(texts, tmp_path):
    _, _, run = train(tiny, tmp_path, lenient(texts, every_steps=None), max_steps=-1, num_train_epochs=2)
    assert verdicts(run) == [(0, "base"), (6, "passed"), (12, "passed")]  # 24 rows, 4 a step


def test_metric_that_a_task_does_not_have_is_refused(texts, tmp_path):
    task = GateTask(task="perplexity", path=texts, metric="acc", change=0.1)
    with pytest.raises(RecipeError, match="perplexity has no metric 'acc' to bound; it has word_perplexity"):
        train(tiny, tmp_path, gate(texts, tasks=(task,)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"suite": None}, "suite, tasks or divergence; a gate that watches nothing"),
        ({"suite": "slow"}, "'default' or 'quick'"),
        ({"tasks": ({"task": "piqa"},)}, "at least one of limit, change and intervals"),
        ({"tasks": ({"task": "piqa", "change": 0.1}, {"task": "piqa", "limit": 0.1})}, "each task once"),
        ({"tasks": ({"task": "piqa", "change": -0.1},)}, "greater than 0"),
        ({"tasks": ({"task": "piqa", "change": 0.1},), "action": "panic"}, "warn"),
    ],
)
def test_section_that_bounds_nothing_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        Gate.model_validate_json(json.dumps(section))


BASE_READING = Reading("acc", 0.5, 0.4, 0.6, 100)


@pytest.mark.parametrize(
    ("bound", "value", "breached"),
    [
        (Bound(limit=0.45), 0.46, False),
        (Bound(limit=0.45), 0.44, True),
        (Bound(change=0.05), 0.46, False),
        (Bound(change=0.05), 0.44, True),
        (Bound(intervals=0.5), 0.46, False),
        (Bound(intervals=0.5), 0.44, True),
        (Bound(change=0.5), 0.9, False),
        (Bound(change=0.5), float("nan"), True),
    ],
)
def test_bounds_are_absolute_or_in_units_of_the_interval(bound, value, breached):
    reading = dataclasses.replace(BASE_READING, value=value)
    assert (bound.breach(reading, BASE_READING) is not None) == breached
    # The same for a figure that is better the lower it is, mirrored.
    base = dataclasses.replace(BASE_READING, better="lower", value=-0.5, low=-0.6, high=-0.4)
    mirrored = Bound(None if bound.limit is None else -bound.limit, bound.change, bound.intervals)
    reading = dataclasses.replace(base, value=-value)
    assert (mirrored.breach(reading, base) is not None) == breached


@pytest.mark.parametrize(("num", "is_of_few"), [(29, True), (30, False)])
def test_breach_of_few_items_says_so(num, is_of_few):
    reading = dataclasses.replace(BASE_READING, value=0.3, num=num, is_of_few=is_of_few)
    breach = Bound(limit=0.45).breach(reading, BASE_READING)
    assert breach.startswith("acc is 0.3, beyond 0.45 (its limit)")
    assert breach.endswith(", of fewer than 30 items") == is_of_few


@pytest.mark.parametrize("name", ["gemma4", "olmoe"])
def test_divergence_is_that_of_the_full_distributions(name):
    model = moeft.add_lora(tiny_model(name), 4, targets=("attention",), seed=0)
    ids = token_ids(3, 20)
    texts = [row.tolist() for row in ids]
    divergence = BaseDivergence(model, texts)
    with torch.no_grad():
        base = model(ids).logits.double().log_softmax(-1)
        assert divergence.measure()[:, 0] == pytest.approx(0, abs=1e-6)
        randomise_lora(model)
        now = model(ids).logits.double().log_softmax(-1)
    expected = (base.exp() * (base - now)).sum((1, 2)).numpy()
    measured = divergence.measure()
    assert measured[:, 0] == pytest.approx(expected, rel=1e-4)
    assert measured[:, 1].tolist() == [20, 20, 20]


def test_divergence_counts_from_the_head_as_it_was_where_the_head_trains():
    model = tiny_model("olmoe")
    ids = token_ids(2, 12)
    divergence = BaseDivergence(model, [row.tolist() for row in ids])
    with torch.no_grad():
        base = model(ids).logits.double().log_softmax(-1)
        model.get_output_embeddings().weight.mul_(1.5)
        now = model(ids).logits.double().log_softmax(-1)
    expected = (base.exp() * (base - now)).sum((1, 2)).numpy()
    assert divergence.measure()[:, 0] == pytest.approx(expected, rel=1e-4)


def test_share_of_one_may_lose_what_chance_explains():
    base = Reading("language", 1.0, 1.0, 1.0, 36)
    bound = Bound(intervals=1)
    assert bound.breach(dataclasses.replace(base, value=35 / 36), base) is None
    assert bound.breach(dataclasses.replace(base, value=33 / 36), base) is not None
