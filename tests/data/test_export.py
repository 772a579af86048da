import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data.exchange import PAIR_SCHEMA, export, read_pairs, write_pairs
from selfsteer.records import Dropped, Message, PairRow
from selfsteer.store.folder import Contents, Origin, RunFolder

PROMPT = [Message(role="system", content="Be brief."), Message(role="user", content="Why “so”?\n")]
ROW = PairRow(
    prompt=PROMPT,
    chosen=[Message(role="assistant", content="Because.")],
    rejected=[Message(role="assistant", content="Why not?")],
    query_id="0123456789abcdef",
    kind="alignment",
    chosen_finish="stop",
    rejected_finish="length",
    ref_chosen_logps=-3.5,
    ref_rejected_logps=-4.0,
    chosen_tokens=3,
    rejected_tokens=4,
)


def shared_data(name: str) -> Path:
    folder = os.environ.get("SELFSTEER_DATA")
    if folder is None:
        pytest.skip("SELFSTEER_DATA is not set")
    return Path(folder) / name


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[PairRow]:
    rows = list(read_pairs(path))
    assert not any(isinstance(row, Dropped) for row in rows)
    return [row for row in rows if not isinstance(row, Dropped)]


# ---- writing


def test_trl_form_loads_as_trl_reads_it(tmp_path: Path):
    assert write_pairs([ROW, ROW], tmp_path / "out", "trl") == 2
    files = str(tmp_path / "out/data/*.parquet")
    for loaded in (
        datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "one")),
        datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "other")),
    ):
        assert loaded.column_names == ["prompt", "chosen", "rejected"]
        assert loaded[1] == {"prompt": PROMPT, "chosen": ROW["chosen"], "rejected": ROW["rejected"]}


def test_llamafactory_form_is_the_one_of_its_demo(tmp_path: Path):
    write_pairs([ROW], tmp_path, "llamafactory")
    info = json.loads((tmp_path / "dataset_info.json").read_text())["selfsteer"]
    assert info == {
        "file_name": "selfsteer.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }
    assert json.loads((tmp_path / "selfsteer.json").read_text()) == [
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why “so”?\n"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "Why not?"},
        }
    ]


def test_llamafactory_demo_comes_back_unchanged(tmp_path: Path):
    demo = shared_data("dpo_en_demo/dpo_en_demo.json")
    assert export(demo, tmp_path, "llamafactory") == 300
    assert json.loads((tmp_path / "selfsteer.json").read_text()) == json.loads(demo.read_text())


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_every_column_survives(tmp_path: Path, format: str):
    write_pairs([ROW], tmp_path, format)  # type: ignore[arg-type]
    assert read(next(tmp_path.glob("pairs.*"))) == [ROW]


@pytest.mark.parametrize("format", ["trl", "llamafactory", "parquet", "jsonl"])
def test_no_rows_make_readable_files(tmp_path: Path, format: str):
    assert write_pairs([], tmp_path, format) == 0  # type: ignore[arg-type]
    if format == "llamafactory":
        assert json.loads((tmp_path / "selfsteer.json").read_text()) == []


def test_nothing_is_replaced(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="another folder"):
        write_pairs([ROW], tmp_path, "jsonl")
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"


def test_a_failing_source_leaves_no_half_file(tmp_path: Path):
    source = write(tmp_path / "pairs.jsonl", ROW, {"prompt": "x"})
    with pytest.raises(ValueError, match="line 2"):
        export(source, tmp_path / "out", "jsonl")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_exports_its_last_finished_round(tmp_path: Path):
    schema = PAIR_SCHEMA.append(pa.field("chosen_seed", pa.int64()))
    with RunFolder(tmp_path / "run") as run:
        for round in (1, 2, 10):
            row = {**ROW, "query_id": f"round {round}", "chosen_seed": round}
            stage = run.stage(round, "5-preferences")
            if round < 10:
                stage.seal(Origin(settings={}, inputs={}), Contents(wanted=1, rows=[row], schema=schema), seconds=1.0)
    assert export(tmp_path / "run", tmp_path / "out", "parquet") == 1
    table = pq.read_table(tmp_path / "out/pairs.parquet")
    assert table["query_id"].to_pylist() == ["round 2"]
    assert table["chosen_seed"].to_pylist() == [2]


def test_a_run_without_preferences_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no finished preference data"):
        export(tmp_path, tmp_path / "out", "trl")


# ---- reading


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Yes.", "rejected": "No."},
        {
            "prompt": [{"role": "user", "content": "Why?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
        {  # UltraFeedback-binarized: the prompt as a string, and again as the first turn
            "prompt": "Why?",
            "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}],
        },
        {
            "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}],
        },
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
    ids=["plain", "mixed", "conversational", "binarized", "implicit prompt", "sharegpt"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_form_reads_alike(tmp_path: Path, row: dict[str, object], suffix: str):
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    (pair,) = read(path)
    assert pair["prompt"] == [{"role": "user", "content": "Why?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "Yes."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "No."}]
    assert pair["kind"] == "given"
    assert len(pair["query_id"]) == 16
    assert "ref_chosen_logps" not in pair


def test_multi_turn_conversations_share_their_beginning(tmp_path: Path):
    start = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    (pair,) = read(write(tmp_path / "p.jsonl", {"chosen": [*start, answers[0]], "rejected": [*start, answers[1]]}))
    assert pair["prompt"] == start


def test_useless_rows_are_dropped_with_their_place(tmp_path: Path):
    rows = read_pairs(
        write(
            tmp_path / "p.jsonl",
            {"prompt": "a", "chosen": "same", "rejected": "same "},
            {"prompt": "a", "chosen": "", "rejected": "no"},
            {"prompt": "a", "chosen": "yes", "rejected": " "},
            {"prompt": " ", "chosen": "yes", "rejected": "no"},
            {"prompt": "a", "chosen": "yes", "rejected": "\ud800"},
            {"prompt": "a", "chosen": "yes", "rejected": "no"},
        )
    )
    dropped = [(row.reason, row.detail.rpartition(": ")[2]) for row in rows if isinstance(row, Dropped)]
    assert dropped == [
        ("chosen equal to rejected", "line 1"),
        ("empty chosen", "line 2"),
        ("empty rejected", "line 3"),
        ("empty prompt", "line 4"),
        ("lone surrogate", "line 5"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 2 has no 'rejected'.*\['chosen', 'prompt'\]"),
        ({"chosen": "b", "rejected": "c"}, "line 2 has no 'prompt'"),
        (["a"], "line 2 is not an object but list"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "line 2, 'chosen' has a turn without"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "line 2, 'prompt' must end in a user turn"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, "must end in a user turn"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "other"}], "rejected": "c"},
            "line 2, 'chosen' must be one assistant turn",
        ),
        (
            {"conversations": [{"from": "martian", "value": "a"}], "chosen": {}, "rejected": {}},
            "line 2, 'conversations' has a turn from 'martian'",
        ),
        ({"conversations": "a", "chosen": {}, "rejected": {}}, "line 2, 'conversations' must be a list"),
    ],
)
def test_malformed_rows_name_file_line_and_key(tmp_path: Path, row: object, message: str):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(ValueError, match=message) as error:
        list(read_pairs(path))
    assert "p.jsonl: line 2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "\xff"}', "line 1 is not UTF-8"),
        ("p.jsonl", b'{"prompt": ', "line 1 is not JSON"),
        ("p.json", b'{"prompt": "a"}', "not a list of rows"),
        ("p.parquet", b"no parquet at all", "is not a Parquet file"),
        ("p.txt", b"", "cannot read .txt"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_pairs(tmp_path / name))


def test_ultrafeedback_loses_its_known_dirt():
    rows = list(read_pairs(shared_data("ultrafeedback/train_clean.jsonl")))
    reasons = [row.reason for row in rows if isinstance(row, Dropped)]
    assert len(rows) == 1000
    assert sorted(reasons) == ["chosen equal to rejected"] * 4 + ["empty chosen", "empty rejected"]
