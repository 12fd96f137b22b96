"""Files of rows: every kind gives the same records, and what is damaged is named."""

import bz2
import gzip
import json
import tracemalloc

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from moeft.data.files import json_document, open_records
from moeft.data.files.tables import read_hub_dataset
from moeft.errors import DataError

ROWS = [
    {"messages": [{"role": "user", "content": f"hi {i}é"}, {"role": "assistant", "content": "x" * i}]} for i in range(5)
]
FLAT = [{"prompt": f'say "{i}",\nplease', "completion": "é" * (i + 1)} for i in range(5)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def records(path, data=None):
    if data is not None:
        path.write_bytes(data)
    return list(open_records(path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", lines(ROWS)),
        ("rows.ndjson", lines(ROWS)),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS))),
        ("rows.jsonl.bz2", bz2.compress(lines(ROWS))),
        ("rows.jsonl.zst", zstd(lines(ROWS))),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS, indent=2).encode())),
        ("rows.json", b"\xef\xbb\xbf  \n" + json.dumps(ROWS, ensure_ascii=False).encode() + b"\n"),
        ("lines.json", lines(ROWS)),
        ("columns.json", json.dumps({"messages": [row["messages"] for row in ROWS], "id": list(range(5))}).encode()),
        ("inside.json", json.dumps({"data": ROWS}).encode()),
    ],
    ids=range(11),
)
def test_every_kind_of_json_gives_the_records_in_order(tmp_path, name, data):
    read = records(tmp_path / name, data)
    assert [line for line, _ in read] == [1, 2, 3, 4, 5]
    assert [record["messages"] for _, record in read] == [row["messages"] for row in ROWS]


def test_one_pretty_printed_object_is_one_row(tmp_path):
    assert records(tmp_path / "row.json", json.dumps(ROWS[0], indent=1).encode()) == [(1, ROWS[0])]


def test_tables_give_the_records(tmp_path):
    table = datasets.Dataset.from_list(FLAT)
    table.to_csv(str(tmp_path / "rows.csv"), index=False)
    table.to_csv(str(tmp_path / "rows.tsv"), index=False, sep="\t")
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    for name in ("rows.csv", "rows.tsv", "rows.csv.gz", "rows.parquet", "saved", "splits"):
        assert [record for _, record in records(tmp_path / name)] == FLAT, name


def test_keys_that_arrow_adds_to_a_row_are_left_out(tmp_path):
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    parquet.write_table(pyarrow.Table.from_pylist([{"call": call} for call in calls]), tmp_path / "rows.parquet")
    assert [record["call"] for _, record in records(tmp_path / "rows.parquet")] == calls


def test_rows_of_a_shuffled_dataset_come_in_its_order(tmp_path):
    shuffled = datasets.Dataset.from_list(FLAT).shuffle(seed=1)
    shuffled.save_to_disk(str(tmp_path / "saved"))
    assert [record for _, record in records(tmp_path / "saved")] == list(shuffled)


@pytest.mark.parametrize("cut", [1, 2, 20, 63, 64, 65])
def test_cut_off_array_gives_what_is_whole_and_says_what_is_lost(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(json_document, "CHUNK_BYTES", 16)
    data = json.dumps(ROWS, ensure_ascii=False).encode()
    read = records(tmp_path / "rows.json", data[:-cut])
    *good, (number, lost) = read
    assert [record for _, record in good] == ROWS[: len(good)]
    assert number == len(good) + 1
    assert isinstance(lost, DataError)
    assert "the file ends" in str(lost)
    assert len(good) == (5 if cut == 1 else 4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_array_read_in_pieces_equals_the_whole_wherever_it_is_cut(tmp_path_factory, data):
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
    rows = data.draw(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=5))
    text = json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.none() | st.just(1)))
    kept = data.draw(st.integers(1, len(text)))
    path = tmp_path_factory.mktemp("cut") / "rows.json"
    path.write_text(text[:kept], "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_document, "CHUNK_BYTES", data.draw(st.integers(1, 40)))
        read = [record for _, record in open_records(path)]
    good = [record for record in read if not isinstance(record, DataError)]
    assert good == rows[: len(good)]
    assert len(read) - len(good) == (kept < len(text))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.json", b"[{}, {'a': 1}, {}, {}, {}, {}, {}, {}]", "record 2 is malformed JSON: Expecting property name"),
        ("rows.json", b'[{"a": "\xff"}]', "not UTF-8 near byte 9"),
        ("rows.json", "[{}]".encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        ("rows.jsonl", "{}".encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16 text, expected UTF-8"),
        ("rows.json", b"hello", "begins with b'hello', expected an array or an object"),
        ("rows.json", b'{"a": [1], "b": [1, 2]}', "columns of unequal length: a 1, b 2"),
        ("rows.json", b'{"a": 1,\n"b" 2}', "malformed JSON at line 2, column 5"),
        ("rows.json", b"[" * 100_000, "record 1 is nested too deeply"),
        ("rows.csv", b"a,a\n1,2\n", "a column is named twice in a, a"),
        ("rows.csv", b'a,b\n1,"2\n', "is no CSV.*are its quotes closed"),
        ("rows.csv", b"a,b\n1,\xff\n", "is not UTF-8"),
        ("rows.jsonl.gz", gzip.compress(lines(ROWS) * 99)[:-9], "is no .gz file, or a cut-off one"),
        ("rows.jsonl.bz2", b"BZh nonsense", "is no .bz2 file"),
        ("rows.jsonl.zst", zstd(lines(ROWS) * 99)[:9] + b"x" * 99, "is no .zst file"),
        ("rows.parquet", b"PAR1nonsense", "is no Parquet file, or a cut-off one"),
    ],
)
def test_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, data, reason):
    with pytest.raises(DataError, match=reason) as raised:
        records(tmp_path / name, data)
    assert str(tmp_path / name) in str(raised.value)


def test_folders_without_a_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a folder without a data set of datasets\.save_to_disk"):
        records(tmp_path)
    datasets.DatasetDict(one=datasets.Dataset.from_list(FLAT)).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="holds the splits one"):
        records(tmp_path / "splits")


def test_damaged_lines_cost_one_row_each(tmp_path):
    read = records(tmp_path / "rows.csv", b"a,b\n1,2\n3\n5,6\n")
    assert [line for line, _ in read] == [2, 3, 4]
    assert str(read[1][1]) == "1 fields, the header has 2"


def test_hub_without_connection_says_what_to_do_instead():
    with pytest.raises(DataError, match=r"nobody/nothing \(split train\) cannot be had.*give the path of a file"):
        read_hub_dataset("nobody/nothing")


def test_large_array_is_read_in_little_memory(tmp_path):
    row = json.dumps({"text": "word " * 1000})
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join([row] * 8000) + "]", "utf-8")  # 40 MB
    tracemalloc.start()
    count = sum(1 for _ in open_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 12 * json_document.CHUNK_BYTES
