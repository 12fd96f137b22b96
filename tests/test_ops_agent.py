"""The demo's data: what is held out, and that a seed fixes every byte."""

import hashlib
import json

import pytest

from moeft.data.reading import read_rows
from moeft.demo.ops_agent import generate, write_jsonl
from moeft.demo.ops_vocabulary import TOOLS, VALUES
from moeft.tool_protocols.bracket import canonical, parse_tool_call


@pytest.fixture(scope="module")
def rows():
    return generate(seed=0)


def request(row):
    return row["messages"][0]["content"]


def call(row):
    return parse_tool_call(row["messages"][1]["content"])


def test_asked_number_of_rows_is_written(rows):
    train, heldout = rows
    assert (len(train), len(heldout)) == (3000, 200)
    assert [len(side) for side in generate(1, train_rows=31, heldout_rows=7)] == [31, 7]


@pytest.mark.parametrize("seed", range(5))
def test_heldout_combinations_never_occur_in_training(seed):
    train, heldout = generate(seed)
    trained = {canonical(row["messages"][1]["content"]) for row in train}
    assert trained.isdisjoint(canonical(row["messages"][1]["content"]) for row in heldout)


@pytest.mark.parametrize("seed", range(5))
def test_no_request_occurs_twice(seed):
    train, heldout = generate(seed)
    texts = [request(row) for row in train + heldout]
    assert len(set(texts)) == len(texts)


def test_every_value_of_every_argument_occurs_in_training(rows):
    seen = {(call(row).name, key, value) for row in rows[0] for key, value in call(row).arguments.items()}
    for tool in TOOLS:
        for key, kind in tool.arguments.items():
            assert {(tool.name, key, value) for value in VALUES[kind]} <= seen


def test_every_tool_occurs_on_both_sides_equally_often(rows):
    for side, share in zip(rows, (200, 13), strict=True):
        names = [call(row).name for row in side]
        assert all(names.count(tool.name) in (share, share + 1) for tool in TOOLS)


def test_request_names_every_argument_value(rows):
    for row in rows[0] + rows[1]:
        words = request(row).lower().replace(",", " ").replace(".", " ").split()
        assert set(call(row).arguments.values()) <= set(words)


def test_tools_are_at_least_twelve_with_distinct_names():
    assert len({tool.name for tool in TOOLS}) == len(TOOLS) >= 12


def test_phrasing_names_each_argument_once():
    for tool in TOOLS:
        for phrasing in tool.phrasings:
            assert all(phrasing.count("{" + key + "}") == 1 for key in tool.arguments), phrasing


def test_seed_fixes_the_rows_on_every_python_version(rows):
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == "2f2852a1656a034ed68081387ddd297fe5ee21f9089a9e8eb81af95621061190"
    assert generate(seed=1) != rows


def test_more_rows_than_distinct_requests_are_refused():
    with pytest.raises(ValueError, match="distinct requests"):
        generate(0, train_rows=10, heldout_rows=100_000)


def test_written_file_reads_back_without_rejects(rows, tmp_path):
    write_jsonl(rows[1], tmp_path / "heldout.jsonl")
    read = read_rows(tmp_path / "heldout.jsonl")
    assert [{"messages": row.messages} for row in read.rows] == rows[1]
    assert read.rejects == []
