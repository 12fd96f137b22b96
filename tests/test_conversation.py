"""Multi-turn figures against plain transformers: perplexity by turn and recall of an early fact."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeft.demo
from moeft.data.reading import read_rows
from moeft.data.rows import Row
from moeft.errors import DataError
from moeft.evaluation.conversation import conversation_perplexity
from moeft.evaluation.recall import Fact, facts, recall
from moeft.evaluation.statistics import bootstrap
from moeft.evaluation.turn_scores import score_turns

BASE = Path(moeft.demo.__file__).parent / "base"
TURNS = [("Who goes there?", "A friend."), ("What news?", "None, my lord."), ("And the war?", "It is over.")]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def chat(*turns):
    pairs = [({"role": "user", "content": ask}, {"role": "assistant", "content": reply}) for ask, reply in turns]
    return {"messages": [message for pair in pairs for message in pair]}


def rows(*chats):
    return read_rows(list(chats)).rows


def plain_turn_log_prob(model, tokenizer, messages):
    """Sum over the tokens of the last turn, from transformers' logits and prefix renders alone."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits[0].double().log_softmax(-1)
    return float(log_probs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()), ids.shape[1] - start


def test_turns_are_scored_as_plain_transformers_scores_them(model, tokenizer):
    given = rows(chat(*TURNS), chat(*TURNS[:1]), {"messages": [*chat(*TURNS[:2])["messages"]]})
    scored = score_turns(model, tokenizer, given, batch_size=2)
    assert [len(turns) for turns in scored] == [3, 1, 2]
    for row, turns in zip(given, scored, strict=True):
        for index, turn in enumerate(turns):
            expected, tokens = plain_turn_log_prob(model, tokenizer, row.messages[: 2 * index + 2])
            assert turn.tokens == tokens
            # Sums of up to ten float32 log-probabilities near 10, of logits in another order of additions.
            assert turn.log_prob == pytest.approx(expected, rel=1e-5)


def test_perplexity_by_turn_is_that_of_all_tokens_at_the_turn(model, tokenizer):
    given = rows(chat(*TURNS), chat(*TURNS[1:]), chat(*TURNS[:1]))
    scored = score_turns(model, tokenizer, given)
    found = conversation_perplexity(model, tokenizer, given, batch_size=1)
    assert [(entry.turn, entry.perplexity.num) for entry in found] == [(1, 3), (2, 2), (3, 1)]
    for index, entry in enumerate(found):
        turns = [turns[index] for turns in scored if len(turns) > index]
        tokens = sum(turn.tokens for turn in turns)
        assert entry.tokens == tokens
        assert entry.perplexity.value == pytest.approx(
            math.exp(-sum(turn.log_prob for turn in turns) / tokens), rel=1e-5
        )
    assert found[0].perplexity.low < found[0].perplexity.value < found[0].perplexity.high
    assert math.isnan(found[2].perplexity.low)


def test_training_mode_of_the_model_is_put_back(model, tokenizer):
    model.train()
    score_turns(model, tokenizer, rows(chat(*TURNS[:1])))
    assert model.training
    model.eval()


def test_flags_of_training_do_not_change_the_measurement(model, tokenizer):
    flagged = chat(*TURNS[:2])
    flagged["messages"][1]["train"] = False
    assert score_turns(model, tokenizer, rows(flagged)) == score_turns(model, tokenizer, rows(chat(*TURNS[:2])))


def test_recall_compares_the_answers_given_the_whole_conversation(model, tokenizer):
    fact = Fact("My dog is called Bruno.", "I see.", "What is my dog called?", "Bruno", ("Luna", "Rex"))
    filler = rows(
        chat(*TURNS),
        chat(
            ("Tell me of Bruno", "A dog."),
        ),
    )
    found = recall(model, tokenizer, filler, distances=(0, 3), of=[fact])
    prompt = [{"role": "user", "content": fact.statement}, {"role": "assistant", "content": fact.reply},
              {"role": "user", "content": fact.question}]  # fmt: skip
    scores = [
        plain_turn_log_prob(model, tokenizer, [*prompt, {"role": "assistant", "content": f"{name}."}])[0]
        for name in ("Bruno", "Luna", "Rex")
    ]
    assert found[0].margin.value == pytest.approx(scores[0] - max(scores[1:]), rel=1e-4)
    assert found[0].accuracy.value == (scores[0] > max(scores[1:]))
    assert found[0].chance == pytest.approx(1 / 3)
    assert [entry.distance for entry in found] == [0, 3]
    with pytest.raises(DataError, match=r"the filler holds 3 exchanges without an answer.*at least 4"):
        recall(model, tokenizer, filler, distances=(4,), of=[fact])
    with pytest.raises(ValueError, match="none below 0"):
        recall(model, tokenizer, filler, distances=(-1,), of=[fact])


def test_built_in_facts_balance_their_answers():
    found = facts()
    assert len({fact.statement for fact in found}) == len(found) == 24
    for fact in found:
        same_question = [other for other in found if other.question == fact.question]
        assert {fact.answer, *fact.distractors} == {other.answer for other in same_question}


def test_generated_replies_are_searched_for_the_answer(model, tokenizer):
    fact = Fact("The end.", "Well.", "Speak of the budget.", "zzz", ("a",))
    found = recall(model, tokenizer, [], distances=(0,), of=[fact], max_new_tokens=4)
    assert found[0].generated.value == 0
    fact = Fact("The end.", "Well.", "Speak of the budget.", "", ("a",))
    assert recall(model, tokenizer, [], distances=(0,), of=[fact], max_new_tokens=4)[0].generated.value == 1


def test_row_that_cannot_be_scored_is_named(model, tokenizer):
    with pytest.raises(DataError, match="line 7"):
        score_turns(model, tokenizer, [Row([{"role": "user", "content": "alone"}], 7)])
    with pytest.raises(DataError, match="no held-out conversations"):
        conversation_perplexity(model, tokenizer, [])


def test_interval_holds_the_mean_of_the_population_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        estimate = bootstrap(rng.exponential(2.0, size=60), level=0.9, resamples=300, seed=seed)
        hits += estimate.low <= 2.0 <= estimate.high
    # 200 trials at 0.9: standard deviation 4.2; the percentile interval of a skewed mean holds a little less.
    assert 165 <= hits <= 192


def test_bootstrap_refuses_what_makes_no_sense():
    assert bootstrap([3.0]).value == 3.0
    assert str(bootstrap([3.0])) == "3"
    assert str(bootstrap([1.0, 1.0])) == "1 (1 to 1)"
    for sample, options in (([], {}), ([1.0], {"level": 1.0}), ([1.0], {"resamples": 0}), (np.zeros((1, 1, 1)), {})):
        with pytest.raises(ValueError, match="expected"):
            bootstrap(sample, **options)
