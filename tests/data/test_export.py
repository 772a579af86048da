import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfsteer.data.exchange import FILES, PAIR_SCHEMA, ExportFormat, export, read_pairs, write_pairs
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


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path):
    """Before the pairs are looked for: `selfsteer.export` is called from Python, where no command line checks it."""
    with pytest.raises(ValueError, match="format: 'csv' is none of trl, llamafactory, parquet, jsonl"):
        export(tmp_path / "nosuch", tmp_path / "out", "csv")  # pyright: ignore[reportArgumentType]


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
    assert export(demo, tmp_path, "llamafactory").written == 300
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
    source = write(tmp_path / "pairs.jsonl", {**ROW, "rejected_finish": "stop"}, {"prompt": "x"})
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
                stage.seal(Origin(settings={}, inputs={}), Contents(wanted=1, rows=[row], schema=schema))
    found = export(tmp_path / "run", tmp_path / "out", "parquet", keep_truncated=True)
    assert found.written == 1
    table = pq.read_table(tmp_path / "out/pairs.parquet")
    assert table["query_id"].to_pylist() == ["round 2"]
    assert table["chosen_seed"].to_pylist() == [2]


def test_a_run_without_preferences_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no run here"):
        export(tmp_path, tmp_path / "out", "trl")


def finished_run(path: Path, *rounds: int, aligned: int, ended: str | None = None) -> Path:
    """A run folder whose rounds have sealed pairs; up to round `aligned` the policy was aligned on them."""
    row = {**ROW, "rejected_finish": "stop"}
    with RunFolder(path) as run:
        for number in rounds:
            for name in ("5-preferences", *(["6-policy"] if number <= aligned else [])):
                contents = Contents(wanted=1, rows=[{**row, "query_id": f"round {number}"}], schema=PAIR_SCHEMA)
                run.stage(number, name).seal(Origin(settings={}, inputs={}), contents)
    metrics = {"run": {} if ended is None else {"ended": ended}, "rounds": [{} for _ in rounds]}
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def test_a_stopped_round_is_passed_over_and_named(tmp_path: Path):
    run = finished_run(tmp_path / "run", 1, 2, aligned=1, ended="1 gate failed")
    found = export(run, tmp_path / "out", "jsonl")
    assert json.loads((tmp_path / "out/pairs.jsonl").read_text())["query_id"] == "round 1"
    assert found.warning is not None
    assert "round 2 ended without alignment, because 1 gate failed" in found.warning
    assert "round 2 ended" in (tmp_path / "out/README.md").read_text()
    asked = export(run, tmp_path / "asked", "jsonl", round=2)
    assert json.loads((tmp_path / "asked/pairs.jsonl").read_text())["query_id"] == "round 2"
    assert asked.warning is not None


def test_a_run_whose_only_round_was_stopped_is_refused(tmp_path: Path):
    run = finished_run(tmp_path / "run", 1, aligned=0, ended="1 gate failed")
    with pytest.raises(ValueError, match=r"because 1 gate failed.*--round 1"):
        export(run, tmp_path / "out", "jsonl")


def test_a_round_before_its_alignment_is_taken_with_a_warning(tmp_path: Path):
    found = export(finished_run(tmp_path / "run", 1, 2, aligned=1), tmp_path / "out", "jsonl")
    assert found.warning is not None
    assert "round 2 has not aligned the policy" in found.warning


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"run": []', '{"run": 3, "rounds": []}', "[" * 5000])
def test_damaged_metrics_are_named(tmp_path: Path, content: str):
    run = finished_run(tmp_path / "run", 1, aligned=1)
    (run / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json: damaged.*delete it"):
        export(run, tmp_path / "out", "jsonl")


@pytest.mark.parametrize(("source", "says"), [("nosuch", "no such run folder"), ("nosuch.jsonl", "no such file")])
def test_what_is_not_there_is_said(tmp_path: Path, source: str, says: str):
    with pytest.raises(ValueError, match=rf"{source}: {says}"):
        export(tmp_path / source, tmp_path / "out", "trl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["trl", "llamafactory", "parquet", "jsonl"])
def test_cut_off_pairs_are_left_out_or_flagged(tmp_path: Path, format: ExportFormat):
    source = write(tmp_path / "pairs.jsonl", ROW, {**ROW, "rejected_finish": "stop"})
    found = export(source, tmp_path / "out", format)
    assert (found.written, found.dropped) == (1, {"cut off by the length limit": 1})
    assert "1 cut off by the length limit" in (tmp_path / "out/README.md").read_text()
    assert export(source, tmp_path / "all", format, keep_truncated=True).written == 2
    written = tmp_path / "all" / FILES[format][0]
    match written.suffix:
        case ".parquet":
            rows = pq.read_table(written).to_pylist()
        case ".json":
            rows = json.loads(written.read_text())
        case _:
            rows = list(map(json.loads, written.read_text().splitlines()))
    assert [(row["chosen_truncated"], row["rejected_truncated"]) for row in rows] == [(False, True), (False, False)]


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path):
    source = write(tmp_path / "pairs.jsonl", ROW, {"prompt": "a", "chosen": "b", "rejected": "b"})
    with pytest.raises(ValueError, match=r"no pair is left of 2: .*1 chosen equal to rejected.*--keep-truncated"):
        export(source, tmp_path / "out", "jsonl")


def test_the_card_is_read_as_one(tmp_path: Path):
    """The folder loads by its name, with the card in it; the command names the folder."""
    source = write(tmp_path / "pairs.jsonl", {**ROW, "rejected_finish": "stop"})
    found = export(source, tmp_path / "out", "trl")
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    assert str(tmp_path / "out") in found.command
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text(), "no path of this machine"


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    run = finished_run(tmp_path / "run", 1, aligned=1)
    data = run / "round-1/5-preferences/data.parquet"
    content = bytearray(data.read_bytes())
    content[4:200] = bytes(196)
    data.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.parquet: not a readable Parquet file"):
        export(run, tmp_path / "out", "jsonl")


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
@pytest.mark.parametrize("suffix", [".jsonl", ".JSON", ".parquet"])
def test_every_form_reads_alike(tmp_path: Path, row: dict[str, object], suffix: str):
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".JSON" else row))
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


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "prompt": "Why?", "chosen": "Yes.", "rejected": "No."},
        {"system_prompt": "Be brief.", "prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"system": "Be brief.", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"system": "Be brief.", "prompt": "Why?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"system": "Be brief.", "prompt": [SYSTEM, USER], "chosen": "Yes.", "rejected": "No."},
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_a_system_column_is_used_in_every_form(tmp_path: Path, row: dict[str, object]):
    (pair,) = read(write(tmp_path / "p.jsonl", row))
    assert pair["prompt"] == [SYSTEM, USER]
    assert (pair["chosen"], pair["rejected"]) == ([YES], [NO])


@pytest.mark.parametrize(
    "prompt",
    ["Why?", [USER], [SYSTEM, {"role": "user", "content": "Hi"}], "Hi", None],
    ids=["last turn", "last turn as message", "beginning", "first user turn", "none"],
)
def test_a_prompt_may_be_a_part_of_whole_conversations(tmp_path: Path, prompt: object):
    start = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]
    (pair,) = read(write(tmp_path / "p.jsonl", {"prompt": prompt, "chosen": [*start, YES], "rejected": [*start, NO]}))
    assert pair["prompt"] == start
    assert (pair["chosen"], pair["rejected"]) == ([YES], [NO])


def test_conversations_that_part_earlier_are_no_pair(tmp_path: Path):
    one, other = ([USER, turn, USER, turn] for turn in (YES, NO))
    (row,) = read_pairs(write(tmp_path / "p.jsonl", {"prompt": "Why?", "chosen": one, "rejected": other}))
    assert isinstance(row, Dropped)
    assert row.reason == "the conversations part before their last turn"


@pytest.mark.parametrize(("value", "text"), [(17, "17"), (17.0, "17"), ("17", "17"), (1.5, "1.5")])
def test_an_id_that_is_a_number_is_text(tmp_path: Path, value: object, text: str):
    (pair,) = read(write(tmp_path / "p.jsonl", {"query_id": value, "prompt": "a", "chosen": "b", "rejected": "c"}))
    assert pair["query_id"] == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("query_id", [1]),
        ("query_id", True),
        ("chosen_finish", "eos"),
        ("chosen_finish", {}),
        ("ref_chosen_logps", "many"),
        ("ref_chosen_logps", [1]),
        ("chosen_tokens", 1.5),
        ("chosen_tokens", 10**400),
        ("system", 3),
    ],
)
def test_what_a_file_says_of_its_rows_is_checked(tmp_path: Path, key: str, value: object):
    with pytest.raises(ValueError, match=rf"p\.jsonl: line 1, '{key}'"):
        read(write(tmp_path / "p.jsonl", {key: value, "prompt": "a", "chosen": "b", "rejected": "c"}))


def test_a_foreign_column_named_kind_is_no_kind(tmp_path: Path):
    (pair,) = read(write(tmp_path / "p.jsonl", {"kind": 3, "prompt": "a", "chosen": "b", "rejected": "c"}))
    assert pair["kind"] == "given"


def test_useless_rows_are_dropped_with_their_place(tmp_path: Path):
    rows = read_pairs(
        write(
            tmp_path / "p.jsonl",
            {"prompt": "a", "chosen": "same", "rejected": "same "},
            {"prompt": "a", "chosen": "", "rejected": "no"},
            {"prompt": "a", "chosen": "yes", "rejected": " "},
            {"prompt": " ", "chosen": "yes", "rejected": "no"},
            {"prompt": "a", "chosen": "yes", "rejected": "\ud800"},
            {"prompt": "a", "chosen": None, "rejected": "no"},
            {"prompt": "a", "chosen": "\u200b\ufeff", "rejected": "no"},
            {"prompt": json.dumps([{"role": "user", "content": "a"}]), "chosen": "yes", "rejected": "no"},
            {"prompt": "a", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}], "rejected": "no"},
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
        ("empty chosen", "line 6"),
        ("empty chosen", "line 7"),
        ("JSON in a string", "line 8"),
        ("content that is not text", "line 9"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 2 has no 'rejected'.*\['chosen', 'prompt'\]"),
        ({"chosen": "b", "rejected": "c"}, "line 2 has no 'prompt'"),
        (["a"], "line 2 is a list; expected one object a line"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "line 2, 'chosen' is a number; expected text or a list"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "line 2, 'prompt' must end in a user turn"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, "must end in a user turn"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "other"}], "rejected": "c"},
            "line 2, 'chosen' must be one assistant turn",
        ),
        (
            {"conversations": [{"from": "martian", "value": "a"}], "chosen": "b", "rejected": "c"},
            "line 2, 'conversations', message 1 has the role 'martian'",
        ),
        (
            {"conversations": 3, "chosen": "b", "rejected": "c"},
            "line 2, 'conversations' is a number",
        ),
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
        ("p.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("p.jsonl", b'{"prompt": ', "line 1: malformed JSON"),
        ("p.json", b'{"prompt": "a"}', "the file is an object .*; expected a list of objects"),
        ("p.parquet", b"no parquet at all", "not a readable Parquet file"),
        ("p.txt", b"", "unknown kind of file"),
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
    # One rejected response is a zero-width space: nothing to read.
    assert sorted(reasons) == ["chosen equal to rejected"] * 4 + ["empty chosen"] + ["empty rejected"] * 2


def test_a_prompt_beside_conversations_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    asked = [{"from": "human", "value": "Why?"}]
    path = write(tmp_path / "p.jsonl", {"conversations": asked, "prompt": "How?", "chosen": "So.", "rejected": "No."})
    [pair] = read_pairs(path)
    assert not isinstance(pair, Dropped)
    assert pair["prompt"] == [{"role": "user", "content": "Why?"}]
    assert "p.jsonl: the column 'prompt' is not used" in caplog.text
