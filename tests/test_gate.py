"""The capability gate: what it lets pass, what it catches, and what it leaves behind, on the embedded MoE."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import moeft
import moeft.demo
from moeft.config.gate import Gate, GateDivergence, GateTask
from moeft.demo.ops_agent import generate
from moeft.errors import RecipeError, TrainingError, UnsupportedModelError
from moeft.evaluation.divergence import BaseDivergence
from moeft.integration.loading import load
from moeft.provenance import RunFolder
from moeft.runs.gate import add_gate
from moeft.training.gate import Bound, Reading
from tests.tiny_models import randomise_lora, tiny_model, token_ids
from tests.tiny_training import adapter_weights, arguments

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
    """General texts may lose 30 % of their perplexity, and move by half a nat per token."""
    settings = {
        "tasks": (GateTask(task="perplexity", path=texts, metric="token_perplexity", change=30.0),),
        "divergence": GateDivergence(path=texts, limit=0.5, max_length=48),
        "every_steps": 2,
        "budget": None,
    }
    return Gate(**{**settings, **changes})


def trainer(folder: Path, **changes) -> moeft.SFTTrainer:
    model, tokenizer = load(BASE, moeft.NF4Config(), dtype="float32")
    examples = generate(5, 24, 8)[0]
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
    }
    return moeft.SFTTrainer(
        model=moeft.add_lora(model, 4, targets=("attention", "experts"), seed=0),
        args=moeft.SFTConfig(**arguments(folder, **{**settings, **changes}), max_length=128),
        train_dataset=examples,
        processing_class=tokenizer,
    )


@contextmanager
def run_folder(folder: Path) -> Iterator[RunFolder]:
    """A run that begins, or one that is gone on with."""
    if (folder / "run.json").exists():
        yield RunFolder.open(folder)
    else:
        with RunFolder.create(folder, "test", {}, {}) as run:
            yield run


def train(folder: Path, settings: Gate | None, resume: str | None = None, said: list[str] | None = None, **changes):
    """Train with a gate; returns the trainer, the gate and its folder."""
    with run_folder(folder) as run:
        trained = trainer(folder / "checkpoints", **changes)
        added = add_gate(settings, trained, run, (said if said is not None else []).append)
        trained.train(resume_from_checkpoint=resume)
    return trained, added, run


DESTRUCTIVE = {"learning_rate": 0.3}
SANE = {"learning_rate": 1e-3}


def test_destructive_rate_is_caught_and_the_last_good_weights_are_back(texts, tmp_path):
    said: list[str] = []
    trained, added, run = train(tmp_path, gate(texts), said=said, **DESTRUCTIVE)
    events = run.events("gate")
    assert trained.state.global_step == 2 < 6
    assert [event["verdict"] for event in events] == ["base", "roll_back"]
    assert added.stopped["rolled_back_to"] == 0
    assert "divergence is" in said[0]
    assert "went back to the weights of step 0 and stopped" in said[0]
    fresh = adapter_weights(trainer(tmp_path / "fresh").model)
    now = adapter_weights(trained.model)
    assert all(torch.equal(now[name], fresh[name]) for name in fresh)


def test_sane_rate_passes_and_the_gate_changes_no_bit_of_training(texts, tmp_path):
    trained, added, run = train(tmp_path / "gated", gate(texts), **SANE)
    assert [event["verdict"] for event in run.events("gate")] == ["base", "passed", "passed", "passed"]
    assert [event["step"] for event in run.events("gate")] == [0, 2, 4, 6]
    assert added.stopped is None
    ungated = trainer(tmp_path / "ungated", **SANE)
    ungated.train()
    theirs = adapter_weights(ungated.model)
    assert all(torch.equal(weight, theirs[name]) for name, weight in adapter_weights(trained.model).items())


def test_run_that_was_rolled_back_stays_stopped_when_it_is_started_again(texts, tmp_path):
    first, _, _ = train(tmp_path, gate(texts), save_strategy="steps", save_steps=1, **DESTRUCTIVE)
    again, added, run = train(
        tmp_path, gate(texts), resume=str(tmp_path / "checkpoints" / "checkpoint-1"), **DESTRUCTIVE
    )
    assert again.state.global_step == 1
    assert added.stopped["step"] == 2
    assert len(run.events("gate")) == 2  # nothing was measured anew
    before = adapter_weights(first.model)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(again.model).items())


def test_resumed_run_is_held_to_the_base_of_its_first_start(texts, tmp_path):
    train(tmp_path, gate(texts), save_strategy="steps", save_steps=2, **{**SANE, "max_steps": 4})
    resumed, added, run = train(tmp_path, gate(texts), resume=str(tmp_path / "checkpoints" / "checkpoint-2"), **SANE)
    assert resumed.state.global_step == 6
    base = run.events("gate")[0]["readings"]
    assert [reading.value for reading in added.base.values()] == [reading["value"] for reading in base]
    # The divergence counts from the base, not from where the run went on.
    ends = [event["readings"][-1]["value"] for event in run.events("gate") if event["step"] in (4, 6)]
    assert all(end > 0 for end in ends)


def test_halving_halves_the_rate_of_all_steps_to_come(texts, tmp_path):
    said: list[str] = []
    strict = gate(texts, divergence=GateDivergence(path=texts, limit=1e-9), action="halve_lr", every_steps=3)
    trained, _, _ = train(tmp_path, strict, said=said, **SANE, logging_steps=1)
    rates = [log["learning_rate"] for log in trained.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4])
    assert "the learning rate is halved" in said[0]


def test_warning_leaves_training_alone(texts, tmp_path):
    strict = gate(texts, divergence=GateDivergence(path=texts, limit=1e-9), action="warn")
    trained, added, run = train(tmp_path, strict, **SANE)
    assert trained.state.global_step == 6
    assert added.stopped is None
    assert [event["verdict"] for event in run.events("gate")] == ["base", "warn", "warn", "warn"]


def test_bound_that_the_base_breaks_stops_before_the_first_step(texts, tmp_path):
    task = GateTask(task="perplexity", path=texts, metric="token_perplexity", limit=1.5)
    with pytest.raises(TrainingError, match=r"the base itself breaks the gate: perplexity token_perplexity is .* 1.5"):
        train(tmp_path, gate(texts, tasks=(task,)))


def test_measurement_that_cannot_be_paid_waits_but_the_last_one_is_taken(texts, tmp_path):
    _, added, run = train(tmp_path, gate(texts, budget=1e-9), **SANE)
    assert [event["step"] for event in run.events("gate")] == [0, 6]
    assert added.summary()["share"] > 0


def test_metric_that_a_task_does_not_have_is_refused(texts, tmp_path):
    task = GateTask(task="perplexity", path=texts, metric="acc", change=0.1)
    with pytest.raises(RecipeError, match="perplexity has no metric 'acc' to bound; it has word_perplexity"):
        train(tmp_path, gate(texts, tasks=(task,)))


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


def test_divergence_from_a_head_that_trains_is_refused():
    with pytest.raises(UnsupportedModelError, match="the head is trained"):
        BaseDivergence(tiny_model("olmoe"), [[3, 4, 5]])
