"""Reading queries: every format, what is dropped and why, and what every kind of bad file is told."""

import json
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from selfsteer.data.queries import CHARACTERS_PER_TOKEN, fold, read_queries
from selfsteer.recipe import sections
from selfsteer.records import Dropped, Query
from selfsteer.store.durable import digest

QUICKSTART = "shipped:quickstart-queries.jsonl"


def read(path: Path, **settings: object) -> list[Query | Dropped]:
    return list(read_queries(sections.Queries.model_validate({"path": str(path), **settings})))


def texts(path: Path, **settings: object) -> list[str]:
    return [row.text for row in read(path, **settings) if isinstance(row, Query)]


def reasons(path: Path, **settings: object) -> list[str]:
    return [row.reason for row in read(path, **settings) if isinstance(row, Dropped)]


def write(path: Path, *values: object, column: str = "query") -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")
    return path


# --- formats ---------------------------------------------------------------------------------------------------------------


def test_the_same_queries_from_every_format(tmp_path: Path):
    wanted = ["Why is the sky blue?", 'Say "hello", then stop.', "Zwei Zeilen:\nä, ö"]
    rows = [{"query": text, "more": 1} for text in wanted]
    jsonl = tmp_path / "q.jsonl"
    jsonl.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "q.csv").write_text(
        'more,query\n1,Why is the sky blue?\n1,"Say ""hello"", then stop."\n1,"Zwei Zeilen:\nä, ö"\n', encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.json", "q.csv", "q.parquet"):
        assert texts(tmp_path / name) == wanted, name
        assert read(tmp_path / name) == read(jsonl), name


def test_an_id_is_the_digest_of_the_messages(tmp_path: Path):
    [query] = read(write(tmp_path / "q.jsonl", "Hi there"))
    assert query == Query(
        id=digest([{"role": "user", "content": "Hi there"}])[:16], messages=({"role": "user", "content": "Hi there"},)
    )


def test_byte_order_marks_blank_lines_and_windows_ends_are_read(tmp_path: Path):
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a b"}\r\n\r\n{"query": "c d"}')
    (tmp_path / "q.csv").write_bytes(b"\xef\xbb\xbfquery\r\na b\r\n\r\nc d\r\n")
    (tmp_path / "q.json").write_bytes(b'\xef\xbb\xbf[{"query": "a b"}, {"query": "c d"}]')
    for name in ("q.jsonl", "q.csv", "q.json"):
        assert texts(tmp_path / name) == ["a b", "c d"], name


def test_line_separators_of_unicode_end_no_line(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "one\u2028two"}\n', encoding="utf-8")
    assert texts(path) == ["one\u2028two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_chat_messages_end_in_the_users_request(tmp_path: Path, suffix: str):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Why?"},
    ]
    path = tmp_path / f"q{suffix}"
    rows = [{"messages": [*chat, {"role": "assistant", "content": "Because."}]}]
    if suffix == ".jsonl":
        write(path, rows[0]["messages"], column="messages")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    [query] = read(path, column="messages")
    assert isinstance(query, Query)
    assert (list(query.messages), query.text) == (chat, "Why?")


def test_sharegpt_turns_become_messages(tmp_path: Path):
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    [query] = read(write(tmp_path / "q.jsonl", turns))
    assert isinstance(query, Query)
    assert query.messages == ({"role": "system", "content": "S"}, {"role": "user", "content": "Q"})


def test_a_hub_data_set_is_streamed_by_name_and_split(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, split, streaming) == ("some/set", "test", True)
        return [{"query": "a"}, {"prompt": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read_queries(sections.Queries(path="hub:some/set", split="test"))
    assert isinstance(next(rows), Query)
    with pytest.raises(ValueError, match=r"hub:some/set: row 2 has no 'query'; found the keys \['prompt'\]"):
        next(rows)


# --- drops -----------------------------------------------------------------------------------------------------------------


def test_every_row_is_a_query_or_a_drop_with_its_reason_in_order(tmp_path: Path):
    path = write(
        tmp_path / "q.jsonl",
        "What is a cat?",
        "",
        " \t\n",
        None,
        [],
        "What  is a\ncat? ",
        "\x1b[2J What is a dog?",
        "What is\x00 this?",
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": " "}],
        [{"role": "assistant", "content": "Hello."}],
        "What is a cow?",
    )
    rows = read(path)
    assert [row.text if isinstance(row, Query) else row.reason for row in rows] == [
        "What is a cat?",
        "empty",
        "empty",
        "empty",
        "empty",
        "duplicate",
        "control character",
        "control character",
        "no user turn at the end",
        "empty",
        "empty",
        "What is a cow?",
    ]
    assert rows[1] == Dropped(id=f"{path}: line 2", reason="empty")
    assert isinstance(rows[5], Dropped)
    assert rows[5].detail == f"{path}: line 6"
    assert rows[6] == Dropped(id=f"{path}: line 7", reason="control character", detail="U+001B")


def test_a_lone_surrogate_is_dropped_and_a_pair_is_a_character(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "bad \\ud800 one"}\n{"query": "a \\ud83d\\ude00 smile"}\n', encoding="utf-8")
    assert (reasons(path), texts(path)) == (["lone surrogate"], ["a 😀 smile"])


def test_composed_and_decomposed_letters_are_the_same_query(tmp_path: Path):
    text = "What is a café?"
    path = write(tmp_path / "q.jsonl", text, unicodedata.normalize("NFD", text))
    assert (texts(path), reasons(path)) == ([text], ["duplicate"])
    assert fold(unicodedata.normalize("NFD", " é\u00a0 x\n")) == "é x"


def test_conversations_differ_by_their_earlier_turns(tmp_path: Path):
    def chat(first: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": first}, {"role": "user", "content": "Why?"}]

    path = write(tmp_path / "q.jsonl", chat("A"), chat("B"), chat("A "))
    assert [isinstance(row, Query) for row in read(path)] == [True, True, False]


def test_the_raw_guard_is_at_the_characters_that_can_never_fit(tmp_path: Path):
    most = 3 * CHARACTERS_PER_TOKEN
    path = write(tmp_path / "q.jsonl", "a" * most, "b" * (most + 1))
    assert [row.reason if isinstance(row, Dropped) else len(row.text) for row in read(path, max_prompt_tokens=3)] == [
        most,
        "too long",
    ]


def test_the_limit_counts_what_passes_and_reads_no_further(tmp_path: Path):
    path = write(tmp_path / "q.jsonl", "", "one", "one", "two", "three")
    with path.open("a", encoding="utf-8") as file:
        file.write("this line is never read\n")
    assert (texts(path, limit=2), reasons(path, limit=2)) == (["one", "two"], ["empty", "duplicate"])


def test_reading_is_lazy(tmp_path: Path):
    path = write(tmp_path / "q.jsonl", "one")
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    rows = read_queries(sections.Queries(path=str(path)))
    assert isinstance(next(rows), Query)
    with pytest.raises(ValueError, match="malformed JSON"):
        next(rows)


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"query": "a"}\n{"query": "b"\n', r"q\.jsonl: line 2: malformed JSON .*; expected one object a line"),
        ("q.jsonl", b'{"query": "a"}\n["b"]\n', r"q\.jsonl: line 2 is a list; .* one JSON list is named \.json"),
        ("q.jsonl", b'"a"\n', r"q\.jsonl: line 1 is text; expected one object a line"),
        ("q.jsonl", b"[" * 100_000, r"q\.jsonl: line 1: nested too deeply"),
        (
            "q.jsonl",
            b'{"text": "a", "id": 1}\n',
            r"q\.jsonl: line 1 has no 'query'; found the keys \['id', 'text'\]\. .*queries\.column",
        ),
        ("q.jsonl", b'{"query": "a"}\n{"query": 7}\n', r"q\.jsonl: line 2, 'query' is a number; expected text or a list"),
        ("q.jsonl", b'{"query": {"a": 1}}\n', r"q\.jsonl: line 1, 'query' is an object"),
        (
            "q.jsonl",
            b'{"query": ["a"]}\n',
            r"q\.jsonl: line 1, 'query', message 1 is text; expected an object",
        ),
        (
            "q.jsonl",
            b'{"query": [{"role": "user"}]}\n',
            r"q\.jsonl: line 1, 'query', message 1 needs role .*\['role'\]",
        ),
        (
            "q.jsonl",
            b'{"query": [{"role": "elf", "content": "x"}]}\n',
            r"q\.jsonl: line 1, 'query', message 1 has",
        ),
        ("q.jsonl", b'{"query": "a"}\n{"query": "caf\xe9"}\n', r"q\.jsonl: line 2: not UTF-8 at byte 29 of the file .*save"),
        ("q.jsonl", '{"query": "a"}\n'.encode("utf-16"), r"q\.jsonl: line 1: not UTF-8 at byte 0 of the file"),
        ("q.csv", b"query\ncaf\xe9\n", r"q\.csv: line 2: not UTF-8 at byte 9 of the file"),
        ("q.json", b'[{"query": "caf\xe9"}]', r"q\.json: line 1: not UTF-8 at byte 15 of the file"),
        ("q.json", b'[\n{"query": "a"}\n{"query": "b"}]', r"q\.json: line 3: malformed JSON \(Expecting ',' delimiter\)"),
        (
            "q.json",
            b'{"query": "a"}\n{"query": "b"}\n',
            r"q\.json: the file is an object .* is named \.jsonl",
        ),
        ("q.json", b'{"data": []}', r"q\.json: the file is an object .*; expected a list of objects"),
        ("q.json", b'[{"query": "a"}, 3]', r"q\.json: item 2 is a number; expected an object"),
        ("q.json", b'[{"query": "a"}, {"q": 3}]', r"q\.json: item 2 has no 'query'; found the keys \['q'\]"),
        (
            "q.csv",
            b"query,id\na,1\nb, c,2\n",
            r"q\.csv: line 3: 3 fields under a header of 2; put text with commas in double quotes",
        ),
        ("q.csv", b'query,id\n"never closed,1\nb,2\n', r"q\.csv: line 3: malformed CSV .*double quote left open"),
        ("q.csv", b"query,query\na,b\n", r"q\.csv: line 1: the header repeats \['query'\]"),
        ("q.csv", b"text\na\n", r"q\.csv: line 2 has no 'query'; found the keys \['text'\]"),
        ("q.parquet", b"no parquet", r"q\.parquet: not a readable Parquet file"),
        ("q.txt", b"a", r"q\.txt: unknown kind of file; queries\.path takes \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_place_and_the_way_out(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_without_the_column_or_with_other_types_is_named(tmp_path: Path):
    path = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"q\.parquet: row 1 has no 'query'; found the keys \['n', 'text'\]"):
        read(path)
    with pytest.raises(ValueError, match=r"q\.parquet: row 1, 'n' is a number"):
        read(path, column="n")


def test_a_parquet_file_with_broken_text_is_named(tmp_path: Path):
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pyarrow.py_buffer(b"a\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"query": broken}), tmp_path / "q.parquet")
    with pytest.raises(ValueError, match=r"q\.parquet: row 1, 'query': not UTF-8"):
        read(tmp_path / "q.parquet")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"q\.jsonl: no such file; queries\.path takes"):
        read(tmp_path / "q.jsonl")


# --- the queries that the project ships ------------------------------------------------------------------------------------


def test_the_quickstart_queries_all_pass():
    rows = read(QUICKSTART)
    assert len(rows) == 120
    assert all(isinstance(row, Query) and 6 <= len(row.text.split()) <= 40 for row in rows)
