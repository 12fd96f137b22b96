"""The preference trainer: what it learns, logs, refuses and stops at, and the reference that it compares with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moeft
from moeft.data.pair_batches import PairCollator
from moeft.errors import DataError
from moeft.training.preference.layout import usable_layout
from moeft.training.preference.stop_rules import StopOnCollapse, StopRules
from tests.tiny_models import tiny_model
from tests.tiny_preferences import dpo_trainer, encoded, pairs, policy
from tests.tiny_training import adapter_weights, losses


class Events(list):
    def event(self, kind, **fields):
        self.append({"kind": kind, **fields})


def of_kind(events, kind):
    return [event for event in events if event["kind"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with held-out pairs, measured before and after."""
    events = Events()
    trainer = dpo_trainer(
        policy(), tmp_path_factory.mktemp("run"), pairs(12), pairs(16)[12:], events, max_steps=12, learning_rate=1e-2,
        eval_strategy="no", num_train_epochs=6, logging_steps=2,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    return trainer, events, before, trainer.evaluate()


def test_the_first_loss_is_that_of_no_preference(trained):
    _, _, before, _ = trained
    assert before["eval_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert before["eval_rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert before["eval_kl"] == pytest.approx(0, abs=1e-6)


def test_training_prefers_the_chosen_answers_and_says_how_far_it_went(trained):
    trainer, events, _, after = trained
    assert after["eval_loss"] < np.log(2)
    assert after["eval_rewards/accuracy"] == 1
    assert after["eval_kl"] > 0
    logs = of_kind(events, "train_log")
    assert logs[-1]["rewards/margin"] > logs[0]["rewards/margin"]
    assert {"log_probs/chosen_drift", "rewards/chosen", "rewards/rejected", "lengths/won"} <= logs[-1].keys()
    assert of_kind(events, "eval")[-1]["rewards/accuracy"] == 1
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_the_divergence_is_that_of_full_logits(trained):
    trainer, _, _, after = trained
    found = []
    for pair in trainer.eval_dataset:
        ids = torch.tensor(pair["chosen"]["input_ids"], dtype=torch.int64)[None]
        counted = torch.tensor(pair["chosen"]["labels"][1:] != -100)
        with torch.no_grad():
            now = trainer.model(input_ids=ids).logits[0, :-1][counted].log_softmax(-1)
            with trainer.model.disable_adapter():
                then = trainer.model(input_ids=ids).logits[0, :-1][counted].log_softmax(-1)
        found.append((now.exp() * (now - then)).sum(-1))
    assert after["eval_kl"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)


def test_micro_batches_of_a_step_weigh_every_pair_alike(tmp_path):
    whole, parts = (
        dpo_trainer(
            policy(), tmp_path, pairs(5), max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_grad_norm=0, optim="sgd", learning_rate=1.0,
        )
        for size, steps in ((5, 1), (2, 3))
    )  # fmt: skip
    whole.train()
    parts.train()
    for name, weight in adapter_weights(whole.model).items():
        torch.testing.assert_close(weight, adapter_weights(parts.model)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_reference_stays_that_of_the_start_while_an_adapter_that_had_an_effect_trains(tmp_path):
    first = dpo_trainer(policy(), tmp_path / "first", max_steps=3, learning_rate=1e-2)
    first.train()
    model = first.model
    again = dpo_trainer(model, tmp_path / "again", eval_dataset=pairs(4), max_steps=3, learning_rate=1e-2)
    before = again.evaluate()
    assert before["eval_loss"] == pytest.approx(np.log(2), rel=1e-5)
    again.train()
    kept = adapter_weights(model)
    assert again.evaluate()["eval_kl"] > 0
    for name, weight in adapter_weights(model).items():
        assert torch.equal(weight, kept[name]), name


def test_a_model_that_carries_a_state_gets_a_row_per_answer(caplog):
    model = tiny_model("qwen3_next")
    assert usable_layout(model, "shared_prefix") == "padded"
    assert "cannot compute a prompt once" in caplog.text
    batch = PairCollator(0, "padded")(list(encoded(pairs(2)).pairs))
    assert batch["input_ids"].shape[:2] == (2, 2)


def test_bad_rows_are_listed_with_their_reasons():
    long = {"prompt": "x" * 60, "chosen": "a", "rejected": "b"}
    same = {"prompt": "hi", "chosen": " a", "rejected": "a "}
    empty = {"prompt": "hi", "chosen": "", "rejected": "b"}
    read = encoded([pairs(1)[0], long, same, empty], max_length=70)
    assert [reject.line for reject in read.rejects] == [2, 4]
    assert "tokens, max_length is 70" in read.rejects[0].reason
    assert len(read.pairs) == 2


@pytest.mark.parametrize(
    ("on_too_long", "reason"),
    [("reject", "tokens, max_length is 20"), ("truncate", "nothing is left"), ("truncate_left", "may be cut")],
)
def test_a_pair_that_is_cut_to_nothing_is_refused(on_too_long, reason):
    row = {"prompt": "what is the sum?", "chosen": "a" * 90, "rejected": "b" * 90}
    with pytest.raises(DataError, match=reason):
        encoded([row], max_length=20, on_too_long=on_too_long)


def test_a_pair_that_is_longer_than_the_context_is_named(tmp_path):
    model = policy()
    model.config.max_position_embeddings = 60
    rows = [*pairs(3), {"prompt": "x" * 40, "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"line 4: .* tokens, and the model has 60 positions; set max_length"):
        dpo_trainer(model, tmp_path, rows)


def test_a_pair_whose_difference_is_cut_off_is_refused():
    row = {"prompt": "hi", "chosen": "same words, then this", "rejected": "same words, then that"}
    with pytest.raises(DataError, match="the same tokens"):
        encoded([row], max_length=40, on_too_long="truncate")


def test_a_prompt_is_cut_alike_on_both_sides():
    row = {"prompt": "x" * 50, "chosen": "aaaa", "rejected": "b"}
    whole, cut = encoded([row]).pairs[0], encoded([row], max_length=60, on_too_long="truncate_left").pairs[0]
    assert len(cut["chosen"]["input_ids"]) == 60
    for side in ("chosen", "rejected"):
        num = len(cut[side]["input_ids"])
        assert cut[side]["input_ids"].tolist() == whole[side]["input_ids"][-num:].tolist()
    assert cut["num_shared"] == whole["num_shared"] - (len(whole["chosen"]["input_ids"]) - 60)


def test_only_the_answer_is_compared_and_not_earlier_turns():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "earlier"},
             {"role": "user", "content": "b"}]  # fmt: skip
    pair = encoded([{"prompt": turns, "chosen": "yes", "rejected": "no"}]).pairs[0]
    counts = [(pair[side]["labels"] != -100).sum() for side in ("chosen", "rejected")]
    assert counts == [len("yes") + 1, len("no") + 1]  # and the end marker


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": "orpo", "max_chosen_drop": 1.0}, "a reference, which orpo has not"),
        ({"layout": "flat"}, "layout is 'flat'"),
        ({"on_too_long": "split"}, "on_too_long is 'split'"),
        ({"margin_collapse": 1.0}, "expected a share from 0 to below 1"),
        ({"stop_patience": 0}, "stop_patience is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        moeft.DPOConfig(output_dir=str(tmp_path), **changes)


def test_chosen_answers_that_become_unlikely_stop_the_run(tmp_path):
    events = Events()
    trainer = dpo_trainer(
        policy(), tmp_path, events=events, max_steps=9, learning_rate=1e-9, max_chosen_drop=0.05, stop_patience=2
    )
    trainer.prepare_reference()
    likely = trainer.train_pairs.pairs
    trainer.train_dataset = likely.with_reference(likely.reference + 1.0)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "nats per token, more than 0.05" in trainer.stopping.reason
    assert of_kind(events, "stopped")[0]["step"] == trainer.state.global_step


def test_the_stop_rule_counts_logs_in_a_row_and_goes_on_after_a_resume():
    from transformers import TrainerControl, TrainerState

    state, control = TrainerState(), TrainerControl()

    def log(rule, margin):
        rule.on_log(None, state, control, logs={"loss": 1.0, "rewards/margin": margin})

    rule = StopOnCollapse(StopRules(margin_collapse=0.5, patience=2), None)
    rule.on_train_begin(None, state, control)
    for margin in (1.0, 0.4, 0.6, 0.3):
        log(rule, margin)
    assert not control.should_training_stop
    resumed = StopOnCollapse(StopRules(margin_collapse=0.5, patience=2), None)
    resumed.on_train_begin(None, state, control)
    log(resumed, 0.2)
    assert control.should_training_stop
    assert resumed.reason.startswith("the margin fell to 0.2, below 0.5 of its largest, 1")
