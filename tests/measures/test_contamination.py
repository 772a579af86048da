import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from selfsteer.data.queries import make_query
from selfsteer.measures.contamination import Evaluation, Overlap, contamination, overlaps, read_evaluation
from selfsteer.records import Message, Query

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def query(text: str, *earlier: str) -> Query:
    return make_query(tuple(Message(role="user", content=each) for each in (*earlier, text)))


def evaluation(path: Path, *texts: str) -> Evaluation:
    path.write_text("\n".join(json.dumps({"question": text}) for text in texts))
    return read_evaluation([path])


def hits(text: str, held: Evaluation) -> int:
    return sum(overlap.ngrams for overlap in overlaps(query(text), held))


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", f"before {THIRTEEN} after")
    assert hits(f"Please: {THIRTEEN}!", held) == 1
    assert hits(f"please {THIRTEEN.rpartition(' ')[0]} fourteen", held) == 0
    assert hits(f"zero before {THIRTEEN} after", held) == 3


def test_case_and_punctuation_do_not_count(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", THIRTEEN)
    assert hits(THIRTEEN.upper().replace(" ", ", "), held) == 1


def test_shorter_texts_are_compared_whole(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", "Who wrote this book?", "Yes")
    assert hits("who wrote this book", held) == 1
    assert hits("who wrote this long book", held) == 0
    assert hits("Tell me: who wrote this book?", held) == 0
    assert hits("Yes", held) == 0


def test_a_whole_text_is_no_beginning_of_a_longer_one(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", f"{THIRTEEN} fourteen")
    assert hits("one two three four", held) == 0


def test_all_strings_of_every_kind_of_file_count(tmp_path: Path):
    turns = {"id": 1, "turns": [{"role": "user", "content": "short"}, {"role": "user", "content": THIRTEEN}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(turns))
    (tmp_path / "b.json").write_text(json.dumps([{"x": "nothing"}, turns]))
    (tmp_path / "c.csv").write_text(f'number,text\n1,"{THIRTEEN}"\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([turns, turns]), tmp_path / "d.parquet")
    held = read_evaluation([tmp_path / name for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")])
    found = [overlap.place.removeprefix(f"{tmp_path}/") for overlap in overlaps(query(THIRTEEN), held)]
    assert found == ["a.jsonl: line 1", "b.json: item 2", "c.csv: line 2", "d.parquet: row 1"]


def test_of_each_file_the_row_that_shares_most_is_named(tmp_path: Path):
    path = tmp_path / "eval.jsonl"
    held = evaluation(path, THIRTEEN, f"{THIRTEEN} and more", THIRTEEN)
    asked = query(f"{THIRTEEN} and more")
    assert list(overlaps(asked, held)) == [Overlap(asked.id, str(path), f"{path}: line 2", 3)]


def test_earlier_turns_count(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", THIRTEEN)
    assert len(list(overlaps(query("And now?", THIRTEEN), held))) == 1


def test_no_n_gram_crosses_two_strings(tmp_path: Path):
    first, last = THIRTEEN.split(" seven ")
    (tmp_path / "eval.json").write_text(json.dumps([{"a": f"{first} seven", "b": last}]))
    held = read_evaluation([tmp_path / "eval.json"])
    assert hits(THIRTEEN, held) == 0


def test_the_measure_counts_queries_by_file(tmp_path: Path):
    held = evaluation(tmp_path / "eval.jsonl", THIRTEEN)
    texts = (THIRTEEN, "What is the time?", "How are you all?", "Where do we go?")
    found = contamination(list(overlaps(query(text), held)) for text in texts)
    assert found is not None
    assert (found["share"].mean, found["share"].n) == (0.25, 4)
    assert found["files"] == {str(tmp_path / "eval.jsonl"): 1}
    assert contamination([]) is None


def test_nothing_overlaps_with_no_evaluation(tmp_path: Path):
    assert list(overlaps(query(THIRTEEN), read_evaluation([]))) == []


@pytest.mark.parametrize(("content", "says"), [("", "the file is empty"), ("\n", "no rows")])
def test_an_evaluation_file_without_rows_is_refused(tmp_path: Path, content: str, says: str):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"empty\.jsonl: {says}"):
        read_evaluation([tmp_path / "empty.jsonl"])


@pytest.mark.parametrize(("name", "says"), [("a.txt", "unknown kind"), ("a.jsonl", "no such file")])
def test_files_that_cannot_be_read_are_refused_before_any_is_read(tmp_path: Path, name: str, says: str):
    with pytest.raises(ValueError, match=says):
        read_evaluation([tmp_path / name])


def test_malformed_files_are_refused_by_place(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n{"a": ')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2"):
        read_evaluation([tmp_path / "a.jsonl"])


def test_real_benchmarks_are_found_in_themselves():
    data = os.environ.get("SELFSTEER_DATA")
    if not data:
        pytest.skip("SELFSTEER_DATA names no folder of real data")
    path = Path(data, "gsm8k/test.jsonl")
    held = read_evaluation([path])
    rows = [json.loads(line) for line in path.read_text().splitlines()[:50]]
    found = contamination(list(overlaps(query(row["question"]), held)) for row in rows)
    assert found is not None
    assert found["share"].mean == 1.0
