"""Dialogue as calls of a visual novel: the conversion, its stage, and the task that grades what a model writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeft.config.stages import ScenesRecipe
from moeft.data.tool_schemas import ToolSchemas
from moeft.errors import DataError
from moeft.evaluation.measure import measure
from moeft.evaluation.request import Chat
from moeft.evaluation.samples import draws, pooled
from moeft.evaluation.tasks import build_task
from moeft.evaluation.text_metrics import moving_average_ratio, words
from moeft.runs.scenes import run
from moeft.tool_protocols import PROTOCOLS, protocol
from moeft.tool_protocols.scenes import TOOLS, as_scene, split_speaker
from moeft.tool_protocols.validity import problem_of_reply

BRACKET, SCHEMAS = protocol("bracket"), ToolSchemas(TOOLS)


def dialogue(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def test_a_speech_becomes_a_call_and_the_turns_that_follow_become_choices():
    turns = dialogue(
        "ROMEO:\nIs the day\nso young?",
        'BENVOLIO:\nBut new "struck" nine.',
        "ROMEO: Ay me! sad hours.",
        "What?",
        "Out.",
    )
    scene = as_scene(turns, BRACKET, SCHEMAS)
    assert [turn["content"] for turn in scene] == [
        "ROMEO: Is the day so young?",
        '[TOOL: say speaker="BENVOLIO" text="But new \\"struck\\" nine."]\n'
        '[TOOL: choose choices=\'["Ay me!", "Out."]\']',
        "ROMEO: Ay me! sad hours.",
        '[TOOL: say speaker="Narrator" text="What?"]',
        "Out.",
    ]


def test_calls_that_a_row_has_stay():
    written = '[TOOL: say speaker="A" text="as it is"]'
    call = {"type": "function", "function": {"name": "say", "arguments": {"speaker": "A", "text": "as it is"}}}
    for reply in ({"content": f" {written}\n"}, {"content": "", "tool_calls": [call]}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", **reply}]
        assert as_scene(turns, BRACKET, SCHEMAS)[1] == {"role": "assistant", "content": written}


@pytest.mark.parametrize(
    ("text", "speaker", "said"),
    [
        ("First Citizen:\nBefore we\nproceed", "First Citizen", "Before we proceed"),
        ("It ends at 10: the last bell.", None, "It ends at 10: the last bell."),
        ("note: small letters name nobody", None, "note: small letters name nobody"),
        ("ROMEO:", None, "ROMEO:"),
        ("Élise : non", None, "Élise : non"),
        ("Élise: oui", "Élise", "oui"),
    ],
)
def test_a_name_before_a_colon_speaks(text, speaker, said):
    assert split_speaker(text) == (speaker, said)


@given(st.lists(st.text(), min_size=2, max_size=6), st.sampled_from(sorted(PROTOCOLS)))
def test_every_row_becomes_valid_calls_with_all_its_words_or_is_refused(texts, name):
    spoken = protocol(name)
    try:
        scene = as_scene(dialogue(*texts), spoken, SCHEMAS)
    except DataError:
        return
    for before, after in zip(texts[1::2], scene[1::2], strict=False):
        calls = spoken.parse(after["content"]).calls
        assert problem_of_reply(after["content"], spoken, SCHEMAS) is None
        if not spoken.parse(before).calls:
            assert calls[0].arguments["text"] == split_speaker(before)[1]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Good evening.", "calls no tool"),
        ('[TOOL: say speaker="A" text="b"', "expected ' ' and an argument"),
        ('[TOOL: shout text="b"]', "no tool"),
        ('[TOOL: say text="b"]', "'speaker' is a required"),
        ("[TOOL: choose choices='[\"one\"]']", "too short"),
        ('[TOOL: say speaker="A" text="b" mood="sad"]', "no parameter"),
    ],
)
def test_a_reply_that_nobody_could_carry_out_is_invalid(reply, reason):
    assert reason in str(problem_of_reply(reply, BRACKET, SCHEMAS))


def write(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
    return path


def test_the_stage_keeps_valid_scenes_apart_and_lists_the_rest(tmp_path):
    rows = [dialogue(f"A: question {n}", f"B: answer {n}") for n in range(12)]
    rows += [
        dialogue("A: Question  3", "B: again"),
        dialogue("x", '[TOOL: say speaker="A"]'),
        dialogue("y", "B: " + "z" * 401),
    ]
    rows.append(dialogue("as it is", '[TOOL: say speaker="A" text="kept"]'))
    recipe = ScenesRecipe(rows=(write(tmp_path / "rows.jsonl", rows),), heldout=4, seed=1, system="Calls only.")
    folder = run(recipe, tmp_path / "out", show=lambda line: None).path
    train, heldout, prompts = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl", "prompts.jsonl")
    )
    assert (len(train), len(heldout)) == (9, 4)
    opened = [row["messages"][1]["content"] for row in train + heldout]
    assert len(set(opened)) == 13
    assert all(row["messages"][0] == {"role": "system", "content": "Calls only."} for row in train + heldout)
    assert [prompt["messages"] for prompt in prompts] == [row["messages"][:2] for row in heldout]
    reasons = [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [reason.split(":")[0] for reason in reasons] == ["opens as an earlier row does", "turn 2", "turn 2"]


def test_rows_of_which_too_few_are_valid_are_refused_with_the_reasons(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [dialogue("a", "B: b"), dialogue("c", "B: " + "d" * 500)])
    with pytest.raises(DataError, match=r"1 rows are valid scenes, expected more than the 5 .* too long"):
        run(ScenesRecipe(rows=(rows,), heldout=5), tmp_path / "out", show=lambda line: None)
    (tmp_path / "tools.json").write_text("{")
    with pytest.raises(DataError, match=r"tools\.json: tools is text that is not valid JSON"):
        run(ScenesRecipe(rows=(rows,), tools=tmp_path / "tools.json"), tmp_path / "third", show=lambda line: None)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="no turn of the assistant"):
        run(ScenesRecipe(rows=(tmp_path / "text.jsonl",)), tmp_path / "fourth", show=lambda line: None)


REPLIES = {
    "p0": '[TOOL: say speaker="THE ENEMY" text="the whisper of the night the whisper of the sea"]',
    "p1": '[TOOL: choose choices=\'["the whisper of the night", "a tapestry"]\']',
    "p2": "no call, the whisper of the night",
    "p3": '[TOOL: say speaker="A" text="half',
}


class Actor:
    """Says what stands in the table, and in draws of odd seeds nothing that is valid."""

    def __init__(self, failing: str = ""):
        self.identity, self.failing = {"model": "actor"}, failing

    def answer(self, requests):
        for index, request in enumerate(requests):
            assert isinstance(request, Chat)
            text = request.messages[-1]["content"]
            failed = text == self.failing and request.seed
            yield index, {"error": "timeout"} if failed else {"reply": "odd" if request.seed % 2 else REPLIES[text]}


@pytest.fixture
def task(tmp_path):
    prompts = [
        {"prompt": name, "protocol": "bracket", "prose": ["text", "choices"], "tools": TOOLS} for name in REPLIES
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "slop").mkdir()
    (tmp_path / "slop" / "slopscore_words.txt").write_text("tapestry\nenemy\n")
    return build_task("scenes", tmp_path / "prompts.jsonl", tmp_path)


def test_the_task_counts_valid_replies_and_the_prose_in_their_calls(task):
    (result,) = measure(Actor(), [task])
    values = {metric.name: result.estimate(metric).value for metric in result.metrics}
    assert values["valid_protocol"] == 0.5
    prose = [
        "the whisper of the night the whisper of the sea",
        "the whisper of the night a tapestry",
        REPLIES["p2"],
        REPLIES["p3"],
    ]
    counted = [words(text) for text in prose]
    assert values["words"] == sum(map(len, counted)) / 4
    assert values["mattr"] == pytest.approx(sum(map(moving_average_ratio, counted)) / 4)
    # Names of speakers are no prose: one word of the list in 32.
    assert values["slop_per_1k_words"] == pytest.approx(1000 / sum(map(len, counted)))
    grams = [{tuple(of[i : i + 3]) for i in range(len(of) - 2)} for of in counted]
    shared = [sum(any(gram in other for other in grams if other is not own) for gram in own) for own in grams]
    assert values["cross_document_trigrams"] == pytest.approx(sum(shared) / sum(map(len, grams)))


def test_samples_of_a_prompt_are_one_item_and_a_failed_one_takes_it_out(task):
    result = pooled(measure(Actor(), draws(task, 4, 0.8, seed=0)))
    valid = result.estimate(result.metrics[0])
    assert (valid.value, valid.num) == (0.25, 4)
    assert result.figures["1"]["valid_protocol"] == (2.0, 4.0)
    assert result.requests != pooled(measure(Actor(), draws(task, 3, 0.8, seed=0))).requests
    partly = pooled(measure(Actor("p1"), draws(task, 4, 0.8, seed=0)))
    assert partly.failed == {"2": "timeout"}
    assert partly.estimate(partly.metrics[0]).num == 3
    with pytest.raises(ValueError, match="4 samples at temperature 0"):
        draws(task, 4, 0.0, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "xml"}, "row 1: there is no tool protocol 'xml'"),
        ({"tools": []}, "row 1: there are no tools"),
        ({"prose": [3]}, "in `prose`"),
        ({"prompt": ""}, "row 1 has no `prompt`"),
    ],
)
def test_prompts_that_cannot_be_graded_are_refused(tmp_path, change, message):
    row = {"prompt": "a", "protocol": "bracket", "prose": "text", "tools": TOOLS, **change}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        build_task("scenes", tmp_path / "prompts.jsonl")
