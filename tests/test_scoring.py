"""Scores of sequences that share rows against one plain forward pass each."""

from __future__ import annotations

import pytest
import torch

from moeft.evaluation.prefix_tree import Scored, trees
from moeft.evaluation.scoring import Scorer
from tests.tiny_models import DENSE_NAMES, MOE_NAMES, tiny_model, token_ids

LINEAR = ("qwen3_next", "qwen3_5_moe", "granitemoehybrid", "minimax", "lfm2_moe")


def branching(longest: int = 30) -> list[Scored]:
    """Stems with several endings, one inside another, one alone, and one twice."""
    ids = [tuple(row) for row in token_ids(6, longest).tolist()]
    stem, other = ids[0][:20], ids[1][:9]
    return [
        Scored(stem + ids[2][:5], 20),
        Scored(stem + ids[3][:1], 20),
        Scored(stem + ids[4][:1], 20),
        Scored(stem + ids[2][:3] + ids[5][:4], 22),
        Scored(other + ids[3][:6], 9),
        Scored(other, 3),
        Scored(ids[4], 1),
        Scored(stem + ids[3][:1], 20),
    ]


def plain(model, scored: Scored) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([scored.tokens])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, scored.tokens[i]]) for i in range(scored.first, len(scored.tokens)))


@pytest.mark.parametrize("name", [*MOE_NAMES, *DENSE_NAMES])
def test_scores_are_those_of_one_pass_for_each_sequence(name):
    model = tiny_model(name)
    scorer = Scorer(model, row_tokens=64)
    assert scorer.shares == (name not in LINEAR)
    sequences = branching()
    found = dict(scorer.score(sequences))
    expected = [plain(model, scored) for scored in sequences]
    # Sums of up to 29 log-probabilities of about 5 nats, float32.
    assert [found[i] for i in range(len(sequences))] == pytest.approx(expected, abs=29 * 5 * 2**-22)


def test_window_of_one_kind_of_layer_holds_in_a_tree():
    model = tiny_model("mixtral")
    model.config.sliding_window = 8
    scorer = Scorer(model)
    assert scorer.shares
    found = dict(scorer.score(branching()))
    assert [found[i] for i in range(len(found))] == pytest.approx([plain(model, s) for s in branching()], abs=1e-4)


def test_common_beginnings_stand_in_a_row_once():
    sequences = branching()
    rows = list(trees(sequences, row_tokens=512))
    assert len(rows) == 1
    beginnings = {scored.tokens[:end] for scored in sequences for end in range(1, len(scored.tokens))}
    assert len(rows[0].tokens) == len(beginnings)


def test_row_is_not_cut_where_much_would_be_computed_twice():
    stem = tuple(range(40))
    sequences = [Scored((*stem, 100 + i, 7), 40) for i in range(30)] + [Scored((*range(50, 90), 7), 40)]
    assert [len(tree.tokens) for tree in trees(sequences, row_tokens=48)] == [70, 40]


@pytest.mark.parametrize("row_tokens", [1, 7, 33, 1000])
def test_every_sequence_is_in_one_row_whatever_the_size(row_tokens):
    sequences = branching()
    numbers = [number for tree in trees(sequences, row_tokens) for number in tree.sequences]
    assert sorted(numbers) == list(range(len(sequences)))


def test_scoring_leaves_a_training_model_in_training():
    model = tiny_model("olmoe").train()
    list(Scorer(model).score(branching()))
    assert all(module.training for module in model.modules())
