"""Preference losses and their gradients against plain PyTorch over full logits, and against TRL."""

from __future__ import annotations

import math

import pytest
import torch

from moeft.config.preference import PreferenceLoss
from moeft.data.pair_batches import PairCollator
from moeft.training.preference.losses import pair_losses
from moeft.training.preference.scores import score_pairs
from tests.tiny_models import randomise_lora, tiny_model
from tests.tiny_preferences import dpo_trainer, encoded, pairs, policy

LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "sigmoid_norm": {},
    "ipo": {},
    "hinge": {"beta": 0.5},
    "robust": {"label_smoothing": 0.2, "sft_weight": 0.3},
    "orpo": {},
    "simpo": {"beta": 2.0, "simpo_margin": 1.0},
}


def plain_log_probs(model, example):
    """Log-probabilities of the compared tokens of one sequence, from full float32 logits."""
    ids = torch.tensor(example["input_ids"], dtype=torch.int64)
    labels = torch.tensor(example["labels"], dtype=torch.int64)[1:]
    log_probs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    return log_probs[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0]


def plain_loss(name, model, reference, pair, beta=0.1, label_smoothing=0.0, sft_weight=0.0, simpo_margin=0.5):
    """The loss of one pair as its paper writes it."""
    chosen, rejected = plain_log_probs(model, pair["chosen"]), plain_log_probs(model, pair["rejected"])
    with torch.no_grad():
        old_chosen, old_rejected = (plain_log_probs(reference, pair[side]) for side in ("chosen", "rejected"))

    def log_sigmoid(x):
        return -torch.log(1 + torch.exp(-x))

    ratio = (chosen.sum() - old_chosen.sum()) - (rejected.sum() - old_rejected.sum())
    mean_ratio = (chosen - old_chosen).mean() - (rejected - old_rejected).mean()
    right, wrong = log_sigmoid(beta * ratio), log_sigmoid(-beta * ratio)
    loss = {
        "sigmoid": lambda: -(1 - label_smoothing) * right - label_smoothing * wrong,
        "sigmoid_norm": lambda: -log_sigmoid(beta * mean_ratio),
        "ipo": lambda: (mean_ratio - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.clamp(1 - beta * ratio, min=0),
        "robust": lambda: (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing),
        "orpo": lambda: -chosen.mean() - beta * log_sigmoid(log_odds(chosen) - log_odds(rejected)),
        "simpo": lambda: -log_sigmoid(beta * (chosen.mean() - rejected.mean()) - simpo_margin),
    }[name]()
    return loss - sft_weight * chosen.mean()


def log_odds(log_probs):
    p = log_probs.mean().exp()
    return torch.log(p / (1 - p))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_plain_pytorch(name, tmp_path):
    reference, layout = policy(), "shared_prefix" if name in ("sigmoid", "orpo") else "packed"
    trainer = dpo_trainer(policy(), tmp_path, pairs(4), loss=name, layout=layout, **LOSSES[name])
    assert trainer.layout == layout
    trainer.prepare_reference()
    randomise_lora(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    options = LOSSES[name]
    plain = torch.stack([plain_loss(name, trainer.model, reference, p, **options) for p in trainer.train_dataset])
    expected = torch.autograd.grad(plain.mean(), list(named.values()))
    # Float32 sums over some 100 products in another order, and differences of sums that nearly cancel.
    assert loss.item() == pytest.approx(plain.mean().item(), rel=1e-5)
    for key, one, other in zip(named, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=float(other.abs().max()) * 1e-4, msg=key)


@pytest.mark.parametrize(("ours", "theirs"), [("sigmoid", "sigmoid"), ("ipo", "ipo"), ("sigmoid_norm", "sigmoid_norm")])
def test_trl_finds_the_same_loss(ours, theirs, tmp_path):
    trl = pytest.importorskip("trl", reason='trl is absent: pip install --no-deps "trl>=1"')
    datasets = pytest.importorskip("datasets")
    trainer = dpo_trainer(tiny_model("qwen3_moe"), tmp_path, pairs(4), loss=ours, layout="shared_prefix")
    trainer.prepare_reference()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    rival_model = tiny_model("qwen3_moe")
    rival_model.load_state_dict(trainer.model.state_dict())
    rival = trl.DPOTrainer(
        model=rival_model,
        ref_model=tiny_model("qwen3_moe"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), loss_type=[theirs], use_cpu=True, bf16=False, router_aux_loss_coef=0.0
        ),
        train_dataset=datasets.Dataset.from_list(pairs(4)),
        processing_class=trainer.processing_class,
    )
    # What a template puts behind an answer is not compared, and TRL compares all that it is given.
    rows = [
        {"prompt_ids": pair["chosen"]["input_ids"][: pair["num_shared"]].tolist()}
        | {
            f"{side}_ids": pair[side]["input_ids"][pair[side]["labels"] != -100].tolist()
            for side in ("chosen", "rejected")
        }
        for pair in trainer.train_dataset
    ]
    theirs_loss = rival.compute_loss(rival_model.eval(), rival.data_collator(rows))
    # Sums of some 10 log-probabilities of magnitude 5 in float32 (1e-6 each), times beta 0.1; IPO's derivative with
    # respect to them is 2 / (2 beta) = 10.
    assert loss.item() == pytest.approx(theirs_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_rewards_are_sums_or_means_as_the_loss_is(name):
    sums, counts = torch.tensor([[-4.0, -9.0]]), torch.tensor([[2, 3]])
    reference = torch.tensor([[-6.0, -6.0]])
    by_sum = pair_losses(PreferenceLoss(name, log_probs="sum"), sums, counts, reference)
    by_mean = pair_losses(PreferenceLoss(name, log_probs="mean"), sums, counts, reference)
    torch.testing.assert_close(by_sum.rewards, torch.tensor([[0.2, -0.3]]))
    torch.testing.assert_close(by_mean.rewards, torch.tensor([[0.1, -0.1]]))


def test_orpo_of_certain_answers_has_finite_gradients():
    sums = torch.tensor([[0.0, -1e-9], [-60.0, -0.0]], requires_grad=True)
    losses = pair_losses(PreferenceLoss("orpo"), sums, torch.ones(2, 2), None)
    losses.loss.sum().backward()
    assert losses.loss.isfinite().all()
    assert sums.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "dpo"}, "loss is 'dpo', expected one of sigmoid"),
        ({"beta": 0}, "beta is 0, expected a positive number"),
        ({"beta": math.nan}, "beta is nan"),
        ({"name": "sigmoid_norm", "log_probs": "sum"}, "take sigmoid for sums"),
        ({"label_smoothing": 0.5}, "expected from 0 to below 0.5"),
        ({"name": "ipo", "label_smoothing": 0.1}, "label_smoothing is for sigmoid, sigmoid_norm, robust, simpo"),
        ({"sft_weight": -1.0}, "sft_weight is -1.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        PreferenceLoss(**options)


@pytest.mark.parametrize("family", ["gemma4", "gpt_oss", "mixtral", "gemma3"])
def test_a_shared_prefix_changes_neither_scores_nor_gradients(family):
    """Prompts are longer than the sliding windows, which count positions and not places."""
    model = tiny_model(family)
    rows = [row | {"prompt": row["prompt"] + " well" * 8} for row in pairs(3)]
    data = list(encoded(rows).pairs)
    found = {}
    for layout in ("padded", "shared_prefix"):
        model.zero_grad()
        scores = score_pairs(model, PairCollator(0, layout)(data))
        (scores.sums * torch.tensor([1.0, -0.5])).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[layout] = scores.sums.detach(), torch.cat(gradients)
    window = model.config.get_text_config().sliding_window
    assert window is None or window < min(pair["num_shared"] for pair in data)
    (sums, gradient), (shared_sums, shared_gradient) = found.values()
    # Float32 sums in another order; 2e-6 was seen, and a window that counts places gives 0.1.
    torch.testing.assert_close(shared_sums, sums, rtol=1e-5, atol=0)
    assert (shared_gradient - gradient).norm() < 1e-5 * gradient.norm()
