"""What ``moeft sft`` says before it trains, and that saying it changes nothing."""

from __future__ import annotations

import pytest
import torch

import moeft
from moeft.cli import main
from moeft.data.chat import encode_messages
from moeft.data.preview import bracketed, runs_of
from moeft.errors import RecipeError
from moeft.provenance import RunFolder
from moeft.reports import write_report
from moeft.runs.training_plan import plan_training
from moeft.training.probe import time_micro_batch
from tests.test_runs_sft import base, start, write_recipe, write_rows  # noqa: F401  (base is a fixture)
from tests.tiny_training import (
    adapter_weights,
    load,
    losses,
    packed_with_lora,
    sft_trainer,
    sums,
    tiny_tokenizer,
)


def code_of(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["sft", *map(str, words)])
    return stopped.value.code


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4}, 4),  # 6 batches: 2 steps an epoch
        ({"max_steps": 3}, 3),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 9),
    ],
)
def test_plan_counts_the_steps_and_tokens_that_training_takes(checkpoints, tmp_path, settings, steps):
    trainer = sft_trainer(packed_with_lora(checkpoints["olmoe"]), tmp_path, **settings)
    plan = plan_training(trainer, 1000, None)
    trainer.train()
    assert plan.steps == trainer.state.max_steps == trainer.state.global_step == steps
    assert plan.tokens == pytest.approx(trainer.throughput.total_tokens, rel=0.05)
    assert plan.trainable_parameters == sum(weight.numel() for weight in adapter_weights(trainer.model).values())
    assert plan.seconds > 0


def test_timing_a_micro_batch_leaves_the_training_as_it_was(checkpoints, tmp_path):
    def trainer(folder):
        model = moeft.add_lora(load(checkpoints["qwen3_moe"]), 4, targets=("attention",), seed=0, dropout=0.5)
        return sft_trainer(model, folder, max_steps=3)

    plain, timed = trainer(tmp_path / "plain"), trainer(tmp_path / "timed")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = time_micro_batch(timed)
    assert torch.equal(torch.rand(1), expected)
    assert found.seconds > 0
    assert found.tokens > 0
    assert all(weight.grad is None for weight in timed.model.parameters())
    for one in (plain, timed):
        torch.manual_seed(5)  # of the dropout
        one.train()
    assert losses(timed) == losses(plain)
    assert timed.routing.summary() == plain.routing.summary()
    assert timed.throughput.total_tokens == plain.throughput.total_tokens
    for name, weight in adapter_weights(plain.model).items():
        assert torch.equal(adapter_weights(timed.model)[name], weight), name


def test_example_is_shown_with_its_trained_tokens_in_brackets():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "hi" * 50}, {"role": "assistant", "content": "Yes."}]
    runs = runs_of(encode_messages(messages, tokenizer), tokenizer)
    assert "".join(text for text, _ in runs) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [text for text, trained in runs if trained] == ["Yes.<|im_end|>"]
    short = bracketed(runs, 40)
    assert "⟦Yes.<|im_end|>⟧" in short
    assert "characters …" in short


def test_dry_run_shows_composition_example_and_plan_and_leaves_nothing(base, tmp_path, capsys):  # noqa: F811
    path = write_recipe(tmp_path, base, data={"cache_dir": str(tmp_path / "cache")})
    before = sorted(tmp_path.iterdir())
    assert code_of(path, "--dry-run") == 0
    shown = capsys.readouterr().out
    for line in (
        "source       format             rejected  available  rows",
        "first example, ⟦trained⟧:",
        "<|im_start|>assistant\n⟦",
        "plan: 6 steps of 4 rows, 1 epochs, about ",
        "  weights that train: ",
        "  memory on a GPU: peak ",
        "  time of all steps: about ",
        "dry run: nothing was trained",
    ):
        assert line in shown, line
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cache"])


def test_run_says_what_it_measures_and_where_its_results_lie(base, tmp_path, capsys):  # noqa: F811
    path = write_recipe(tmp_path, base, training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    assert code_of(path, "training.disable_tqdm=false") == 0
    shown = capsys.readouterr()
    assert "step 1: held-out loss " in shown.out + shown.err
    assert ", lr 5.00e-03, " in shown.err
    for name in ("adapter", "report.md"):
        assert f": {tmp_path / 'run' / name}\n" in shown.out
        assert (tmp_path / "run" / name).exists()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| weights that train | " in report
    assert "| train.jsonl | 2 | 24 | 24 | " in report
    assert code_of(path, "training.disable_tqdm=false", "--dry-run") == 1
    assert "nothing is left to do" in capsys.readouterr().err


def test_long_conversations_are_measured_before_and_after_and_reported(base, tmp_path):  # noqa: F811
    talk = [{"role": role, "content": f"{i}"} for i in range(3) for role in ("user", "assistant")]
    too_long = [talk[0], {"role": "assistant", "content": "1" * 99}]
    rows = [{"messages": talk}, {"messages": talk[:4]}, *sums(4), {"messages": too_long}]
    file = tmp_path / "talk.jsonl"
    evaluation = {"turn_perplexity": str(file), "recall": {"filler": str(file), "distances": [0, 1]}}
    write_rows(file, rows)
    path = write_recipe(tmp_path, base, evaluation=evaluation, data={"max_length": 100}, training={"max_steps": 1})
    folder = start(path)
    figures = folder.read_json("metrics.json")["heldout"]
    for when in ("before", "after"):
        assert [turn["perplexity"]["num"] for turn in figures[when]["turns"]] == [6, 2, 1]
        assert [at["distance"] for at in figures[when]["recall"]] == [0, 1]
        assert figures[when]["recall"][0]["accuracy"]["num"] == 24
    report = write_report(folder).read_text()
    assert "## Perplexity by turn" in report
    assert "| 1 | 6 | " in report
    assert "## Recall of early facts" in report
    assert "| 0 | 25.0 % | " in report
    assert "talk.jsonl" in RunFolder.open(folder.path).record["inputs"]["recall"]["path"]


@pytest.mark.parametrize("name", ["tensorboards", ["none", "wnadb"]])
def test_tracker_that_is_not_installed_is_refused_before_anything_is_written(base, tmp_path, name):  # noqa: F811
    path = write_recipe(tmp_path, base, training={"report_to": name})
    with pytest.raises(RecipeError, match=r"training\.report_to names '(tensorboards|wnadb)', which is not installed"):
        start(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_steps", "ten", "a number; its default is -1"),
        ("seed", "abc", "a number; its default is 42"),
        ("learning_rate", None, "a number; its default is 5e-05"),
        ("gradient_accumulation_steps", 0, "a whole number from 1"),
        ("per_device_train_batch_size", 1.5, "a whole number from 1"),
    ],
)
def test_trainer_value_that_is_no_number_is_refused_before_anything_is_written(base, tmp_path, name, value, expected):  # noqa: F811
    path = write_recipe(tmp_path, base, training={name: value})
    with pytest.raises(RecipeError, match=rf"training\.{name} is {value!r}, expected {expected}"):
        start(path)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_figures_of_every_step(base, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboardX", reason='tensorboardX is absent: pip install "moeft[test]"')
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    start(write_recipe(tmp_path, base, training={"max_steps": 2, "report_to": "tensorboard"}))
    seen = {}
    for file in (tmp_path / "board").glob("events*"):
        content = file.read_bytes()
        while content:  # length, its checksum, the record, its checksum
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    logged = [event["loss"] for event in RunFolder.open(tmp_path / "run").events("train_log")]
    assert [seen["train/loss", step] for step in (1, 2)] == pytest.approx(logged)
    assert seen["train/tokens_per_second", 1] > 0
