"""The reader of foreign files: every kind of fault has its file and place, and nothing ends in a traceback."""

import csv
import gzip
import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfsteer.data.exchange import read_pairs
from selfsteer.data.files import all_rows, check_source, is_blank, read_chat, source_rows
from selfsteer.data.queries import read_queries
from selfsteer.recipe import sections
from selfsteer.records import Dropped, Query

OK = b'{"query": "a", "prompt": "q", "chosen": "a", "rejected": "b"}\n'


def queries(path: Path) -> list[Query | Dropped]:
    return list(read_queries(sections.Queries(path=str(path))))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"query": "a", "trace": ' + b"[" * 3000 + b"]" * 3000 + b"}", "line 2, 'trace': nested too deeply"),
        (b'{"query": "a", "n": ' + b"1" * 5000 + b"}", "line 2, 'n': a number of 5,000 digits"),
        (b'{"query": "a", "m": {"k": [' + b"1" * 5000 + b"]}}", "line 2, 'm': a number of 5,000 digits"),
        (b'{"query": "a", "query": "b"}', "line 2: the key 'query' stands there twice"),
        (b'{"query": "a", "m": {"x": 1, "x": 2}}', "line 2: the key 'x' stands there twice"),
    ],
)
def test_json_that_parsers_disagree_on_is_refused_by_line_and_key(tmp_path: Path, row: bytes, says: str):
    for name, content in (("q.JSONL", OK + row), ("q.json", b"[" + OK.strip() + b",\n" + row + b"]")):
        (tmp_path / name).write_bytes(content)
        says_here = says if name == "q.JSONL" else says.replace("line 2", "item 2")
        with pytest.raises(ValueError, match=f"{name}: {says_here}"):
            queries(tmp_path / name)


def test_nan_is_null_in_json_and_in_parquet(tmp_path: Path):
    (tmp_path / "q.jsonl").write_text('{"query": NaN}\n{"query": "a", "n": NaN}\n')
    pq.write_table(pa.table({"query": [float("nan")]}), tmp_path / "q.parquet")
    assert [getattr(item, "reason", "kept") for item in queries(tmp_path / "q.jsonl")] == ["empty", "kept"]
    assert [getattr(item, "reason", "kept") for item in queries(tmp_path / "q.parquet")] == ["empty"]


def test_a_long_csv_field_is_a_long_text_and_other_columns_do_not_matter(tmp_path: Path):
    long = "word " * 80_000
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["query", "context"], ["a", long], [long, ""], ["b", ""]])
    section = sections.Queries(path=str(tmp_path / "q.csv"), max_prompt_tokens=100)
    assert [getattr(item, "reason", "kept") for item in read_queries(section)] == ["kept", "too long", "kept"]


def test_two_parquet_columns_of_a_name_are_refused(tmp_path: Path):
    for name in ("query", "chosen"):
        pq.write_table(pa.table([["a"], ["b"]], names=[name, name]), tmp_path / "q.parquet")
        with pytest.raises(ValueError, match=rf"q\.parquet: repeats the columns \['{name}'\]"):
            list(source_rows(tmp_path / "q.parquet"))


def test_foreign_types_beside_the_columns_do_not_matter(tmp_path: Path):
    """A year that Python has not, nanoseconds, bytes that are no text."""
    times = pa.array([253_402_300_800], pa.timestamp("s"))
    table = pa.table({"query": ["a"], "when": times, "ns": pa.array([1], pa.timestamp("ns")), "raw": [b"\xff"]})
    pq.write_table(table, tmp_path / "q.parquet")
    assert isinstance(queries(tmp_path / "q.parquet")[0], Query)
    assert [row.fields for row in all_rows(tmp_path / "q.parquet")] == [{"query": "a", "raw": b"\xff"}]
    for other in (datetime(2026, 1, 1), b"bytes", 7):
        pq.write_table(pa.table({"query": [other]}), tmp_path / "q.parquet")
        with pytest.raises(ValueError, match=r"q\.parquet: row 1, 'query' is .*; expected text"):
            queries(tmp_path / "q.parquet")


def test_text_that_is_not_utf8_is_told_by_row_and_column(tmp_path: Path):
    values = pa.array([b"fine"] * 300 + [b"\xff"]).cast(pa.binary())
    broken = pa.StringArray.from_buffers(len(values), values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"prompt": broken, "chosen": broken, "rejected": broken}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet: row 301, 'prompt': not UTF-8"):
        list(read_pairs(tmp_path / "p.parquet"))


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    says = {"folder": "a folder", "pipe": "a pipe", "loop": "Too many levels", "null": "a device", "gone": "no such file"}
    for name, words in says.items():
        with pytest.raises(ValueError, match=rf"{name}\.jsonl: {words}"):
            check_source(tmp_path / f"{name}.jsonl", "queries.path")
    with pytest.raises(ValueError, match="File name too long"):
        check_source(tmp_path / ("a" * 300 + ".jsonl"), "queries.path")
    with pytest.raises(ValueError, match="null byte"):
        check_source("a\0b.jsonl", "queries.path")
    with pytest.raises(ValueError, match="hub: names no data set"):
        check_source("hub:", "queries.path")


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: the file is empty"):
        queries(tmp_path / name)


def test_a_csv_file_read_whole_needs_no_header(tmp_path: Path):
    """MMLU's files: the first row is a question, two of its options may be equal, rows may differ in length."""
    (tmp_path / "a.csv").write_text("What is two and two,4,4,A\nAnd three,6,B\n")
    assert [list(row.fields.values()) for row in all_rows(tmp_path / "a.csv")] == [
        ["What is two and two", "4", "4", "A"],
        ["And three", "6", "B"],
    ]


@pytest.mark.parametrize(("separator", "says"), [(";", "';'"), ("\t", r"'\\t'"), ("|", r"'\|'")])
def test_a_csv_file_with_other_separators_is_refused_by_them(tmp_path: Path, separator: str, says: str):
    """Read whole, each line would be one text, and no question of it would be found again."""
    path = tmp_path / "a.csv"
    path.write_text(f"question{separator}answer\n\nHow, and why?{separator}So.\nWhat is it?{separator}A fox.\n")
    with pytest.raises(ValueError, match=rf"a\.csv: its fields are separated by {says}; save it with commas"):
        list(all_rows(path))


@pytest.mark.parametrize("text", ["query\nOne; two\n", "One; two\n", "Why?,a;b\nHow?,c;d\n", "a;b,c\nd,e\n", "a; b\nc\n"])
def test_marks_in_the_text_separate_nothing(tmp_path: Path, text: str):
    (tmp_path / "a.csv").write_text(text)
    assert [list(row.fields.values()) for row in all_rows(tmp_path / "a.csv")] == [
        line.split(",") for line in text.splitlines()
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("query,id\nWhy?,1\n".encode("utf-16-le"), "zero bytes in the text .*UTF-16"),
        ("query,id\nWhy?,1\n".encode("utf-16-be"), "zero bytes in the text .*UTF-16"),
        ("query,id\nWhy?,1\n".encode("utf-16"), "it looks like UTF-16"),
        (gzip.compress(b"query,id\nWhy?,1\n", mtime=0), "it looks compressed by gzip"),
    ],
)
def test_a_text_in_another_encoding_is_named(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv: line 1: .*{says}"):
        list(all_rows(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "text", ["", " \t", "\u200b", "\ufeff\u200d \u2060", "\u3164", "\u2800", "\u034f\ufe0f\u180b\u17b4\U000e0101"]
)
def test_what_shows_nothing_is_blank(text: str):
    assert is_blank(text)
    assert not is_blank(f"{text}.")


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "What is "}, "this", {"text": "?"}]
    assert read_chat([{"role": "user", "content": parts}], "user", "x") == [{"role": "user", "content": "What is this?"}]
    image = [{"type": "image", "url": "u"}, {"type": "text", "text": "?"}]
    assert read_chat([{"role": "user", "content": image}], "user", "x") == "content that is not text"
    assert read_chat([{"role": "user", "content": None}], "user", "x") == "null content"


@pytest.mark.parametrize(
    ("text", "chat"),
    [
        ('[{"role": "user", "content": "a"}]', True),
        ("[{'content': 'a', 'role': 'user'}]", True),
        ('{"from": "human", "value": "a"}', True),
        ('{"messages": [{"role": "user", "content": "a"}]}', True),
        ("{'conversations': [{'from': 'human', 'value': 'a'}]}", True),
        ('[{"type": "text", "text": "a"}]', True),
        ('[{"name": "Ann", "role": "user", "content": "a"}]', True),
        ('{"id": 3, "source": "x, y", "messages": [{"role": "user", "content": "a"}]}', True),
        ('{"id": 3, "messages": [{"role": "user", "content": "a"}]}', True),
        (json.dumps('[{"role": "user", "content": "a"}]'), True),
        ("array([{'role': 'user', 'content': 'a'}], dtype=object)", True),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]", True),
        ('[{"id": 1, "value": 3}]', False),
        ('{"type": "object", "properties": {}}', False),
        ('{"answer": 3}', False),
        ('Explain [{"role": "user", "content": "a"}]', False),
        ("[1, 2]", False),
    ],
)
def test_a_chat_that_stands_in_a_string_is_named(text: str, chat: bool):
    assert (read_chat(text, "user", "x") == "JSON in a string") == chat


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "System"])
def test_a_system_column_beside_a_query_is_its_system_message(name: str, tmp_path: Path):
    (tmp_path / "q.jsonl").write_text(json.dumps({name: "Be brief.", "query": "Why?"}) + "\n")
    [query] = queries(tmp_path / "q.jsonl")
    assert isinstance(query, Query)
    assert query.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})


def test_what_stands_beside_a_query_and_is_not_used_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Alpaca's input, without which its instruction asks for nothing; not where it is the query itself."""
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "Translate it.", "input": "Un renard."}\n')
    assert len(queries(path)) == 1
    assert "the column 'input' is not used" in caplog.text
    caplog.clear()
    (tmp_path / "other.jsonl").write_text('{"input": "Why?"}\n')
    assert len(list(read_queries(sections.Queries(path=str(tmp_path / "other.jsonl"), column="input")))) == 1
    assert not caplog.records


# --- anything at all -------------------------------------------------------------------------------------------------------

KEYS = ["role", "content", "from", "value", "type", "text", "prompt", "chosen", "rejected", "query_id", "kind", "system"]
KEYS += ["conversations", "chosen_finish", "chosen_tokens", "ref_chosen_logps", "query", "user", "assistant"]
keys = st.sampled_from(KEYS) | st.text(max_size=4)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, anything)) | st.fixed_dictionaries(
    {"prompt": st.text() | anything, "chosen": st.text() | anything, "rejected": st.text() | anything, "query": anything}
)
often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: Path) -> None:
    """Every reader either reads or says which file, and where."""
    for reader in (queries, lambda file: list(read_pairs(file)), lambda file: list(all_rows(file))):
        said = str(path)
        try:
            reader(path)
        except ValueError as error:
            said = str(error)
        assert said.startswith(str(path))


@often
@given(row=rows)
def test_any_row_is_read_dropped_or_refused_by_place(tmp_path: Path, row: dict[str, object]):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    read_all(path)


@often
@given(data=st.data(), form=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_damage_to_a_file_is_told_by_its_name(tmp_path: Path, data: st.DataObject, form: str):
    whole = [{"query": f"q{n}", "prompt": "p", "chosen": "c" * n, "rejected": "é", "n": n} for n in range(1, 30)]
    path = tmp_path / f"a.{form}"
    match form:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in whole))
        case "json":
            path.write_text(json.dumps(whole, indent=1))
        case "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([list(whole[0]), *(list(row.values()) for row in whole)])
        case _:
            pq.write_table(pa.Table.from_pylist(whole), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    read_all(path)
