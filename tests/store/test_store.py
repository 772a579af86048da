"""The run folder: what a damaged line, a full disk, a second process or a changed setting does to it."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsteer.clock import Spent, Taken, count, part
from selfsteer.records import Dropped
from selfsteer.store import folder
from selfsteer.store.durable import canonical_json, digest, file_digest, make_folder, sync
from selfsteer.store.folder import (
    SCHEMA_VERSION,
    Contents,
    Origin,
    RunFolder,
    RunFolderBusy,
    RunFolderGone,
    Stage,
    StageDamaged,
    borrow,
    elapsed,
)
from selfsteer.store.journal import Journal

ORIGIN = Origin(settings={"temperature": 0.7}, inputs={"queries": "ab" * 32})


def missing(journal: Journal, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key not in journal]


def rows(count: int) -> list[dict[str, object]]:
    return [{"query_id": f"q{n}", "prompt": [{"role": "user", "content": f"hello {n} é"}], "n": n} for n in range(count)]


def sealed(path: Path, count: int = 3) -> Stage:
    stage = Stage(path / "round-1" / "2-responses")
    stage.seal(ORIGIN, Contents(wanted=count, rows=rows(count)), taken=lambda: Taken(1.5))
    return stage


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


# Canonical JSON


def test_canonical_json_by_hand():
    """Sorted keys, no spaces, UTF-8; sha256 of the two bytes {} as `printf '{}' | sha256sum` gives it."""
    assert canonical_json({"b": [1, 0.5, None], "a": "é\n"}) == '{"a":"é\\n","b":[1,0.5,null]}'.encode()
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "lone \ud800 surrogate"])
def test_canonical_json_refuses(value: object):
    with pytest.raises(ValueError, match=r"JSON compliant|lone surrogate"):
        canonical_json({"x": value})


def test_file_digest(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"{}")
    assert file_digest(tmp_path / "f") == digest({})


# Journal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.tuples(st.text(), st.dictionaries(st.text(), JSON, max_size=4)), max_size=6))
def test_any_record_comes_back(records: list[tuple[str, dict[str, object]]], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("journal")
    first: dict[str, object] = {}
    for key, data in records:
        first.setdefault(key, data)
    with Journal(folder) as journal:
        journal.append(records)
        assert {key: journal.get(key) for key in first} == first
    with Journal(folder) as journal:
        assert {key: journal.get(key) for key in first} == first
        assert len(journal) == len(first)


def test_key_is_found_whatever_the_data_holds(tmp_path: Path):
    tricky = {"key": "no", 'x","key":"no': ',"key":"no"}', "z": {"key": "no", "sha256": "no"}}
    with Journal(tmp_path) as journal:
        journal.append([('yes","key":"', tricky)])
    with Journal(tmp_path) as journal:
        assert journal.get('yes","key":"') == tricky


def test_a_line_is_plain_json_for_other_tools(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append([("k", {"text": "hi"})])
    line = (tmp_path / "main-0.jsonl").read_bytes()
    record = json.loads(line)
    claimed = record.pop("sha256")
    assert record == {"key": "k", "data": {"text": "hi"}}
    assert claimed == digest(record)
    assert line == canonical_json({**record, "sha256": claimed}) + b"\n"


def test_lone_surrogate_is_refused_and_nothing_is_written(tmp_path: Path):
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="lone surrogate"):
            journal.append([("a", {"text": "fine"}), ("b", {"text": "\udfff"})])
        assert "a" not in journal
    assert list(tmp_path.iterdir()) == []


def test_first_record_of_a_key_wins(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append([("k", {"n": 1}), ("k", {"n": 2})])
        journal.append([("k", {"n": 3})])
        assert journal.get("k") == {"n": 1}
    # A part written by hand, as by a process that did not know of the first.
    (tmp_path / "main-10.jsonl").write_bytes((tmp_path / "main-0.jsonl").read_bytes())
    with Journal(tmp_path / "other") as other:
        other.append([("k", {"n": 4})])
    (tmp_path / "main-2.jsonl").write_bytes((tmp_path / "other" / "main-0.jsonl").read_bytes())
    with Journal(tmp_path) as journal:
        assert journal.get("k") == {"n": 1}
    (tmp_path / "main-0.jsonl").unlink()
    with Journal(tmp_path) as journal:
        assert journal.get("k") == {"n": 4}, "parts count in the order of n: 2 before 10"


def test_torn_last_line_is_set_aside_and_the_next_record_is_whole(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append([("a", {"n": 1}), ("b", {"n": 2})])
    part = tmp_path / "main-0.jsonl"
    whole = part.read_bytes()
    length_of_a = whole.index(b"\n") + 1
    for cut in (length_of_a + 1, len(whole) - 1):  # one byte of b; all of b but its newline
        part.write_bytes(whole[:cut])
        (tmp_path / "main-0.jsonl.torn").unlink(missing_ok=True)
        with Journal(tmp_path) as journal:
            assert missing(journal, ["a", "b", "c"]) == ["b", "c"]
        assert part.read_bytes() == whole[:length_of_a]
        assert (tmp_path / "main-0.jsonl.torn").read_bytes() == whole[length_of_a:cut]
    with Journal(tmp_path) as journal:
        journal.append([("b", {"n": 2}), ("c", {"n": 3})])
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["main-0.jsonl", "main-1.jsonl"]
    with Journal(tmp_path) as journal:
        assert [journal.get(key)["n"] for key in "abc"] == [1, 2, 3]


def test_every_flipped_bit_of_a_line_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with Journal(tmp_path) as journal:
        journal.append([("a", {"n": 1}), ("b", {"n": 2}), ("c", {"n": 3})])
    part = tmp_path / "main-0.jsonl"
    whole = part.read_bytes()
    second = range(whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1))
    for offset in second:
        part.write_bytes(whole)
        flip(part, offset)
        with Journal(tmp_path) as journal:
            assert missing(journal, "abc") == ["b"], offset
            assert journal.get("c") == {"n": 3}
    assert caplog.text.count("skipped 1 damaged lines") == len(second)


def test_lost_newline_costs_its_two_records_only(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append([(key, {"n": 1}) for key in "abc"])
    part = tmp_path / "main-0.jsonl"
    flip(part, part.read_bytes().index(b"\n"))
    with Journal(tmp_path) as journal:
        assert missing(journal, "abc") == ["a", "b"]


def test_damage_while_in_use_is_never_handed_on(tmp_path: Path):
    with Journal(tmp_path) as journal:
        journal.append([("a", {"n": 1})])
        flip(tmp_path / "main-0.jsonl", 12)
        with pytest.raises(ValueError, match=r"main-0\.jsonl: the record at byte 0 was damaged"):
            journal.get("a")


def test_a_live_writer_is_not_cut_off(tmp_path: Path):
    """A second journal sees the line that the first is still writing, and leaves it alone."""
    with Journal(tmp_path, writer="gpu0") as live:
        live.append([("a", {"n": 1})])
        part = tmp_path / "gpu0-0.jsonl"
        with part.open("ab") as file:
            file.write(b'{"data":{"half')
        size = part.stat().st_size
        with Journal(tmp_path, writer="gpu1") as second:
            assert len(second) == 1
            second.append([("b", {"n": 2})])
        assert part.stat().st_size == size
    with Journal(tmp_path) as after:
        assert len(after) == 2
    assert part.stat().st_size < size


def test_a_look_changes_nothing(tmp_path: Path):
    stage = Stage(tmp_path / "1-principles")
    assert stage.finished() == 0
    assert not stage.path.exists()
    with stage.journal() as journal:
        journal.append([("a", {})])
    part = stage.path / "parts" / "main-0.jsonl"
    part.write_bytes(part.read_bytes() + b"torn")
    assert stage.finished() == 1
    assert part.read_bytes().endswith(b"torn")


def test_full_disk_names_the_part_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A limit on the file size stands in for the full disk: the write stops half-way through a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path) as journal:
        journal.append([("a", {"text": "x" * 1000})])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(OSError, match=r"run the same command again.*main-0\.jsonl"):
                journal.append([("b", {"text": "y" * 500}), ("c", {"text": "z" * 5000})])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert missing(journal, "abc") == ["b", "c"], "half a batch does not count"
        journal.append([("c", {"text": "later"})])
    with Journal(tmp_path) as journal:
        assert missing(journal, "abc") == ["b"]
        assert journal.get("c") == {"text": "later"}
    assert caplog.text == "", "no line is torn or damaged"


def test_failing_disk_that_cannot_take_back_leaves_a_part_to_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with Journal(tmp_path) as journal:
        journal.append([("a", {"n": 1})])
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]) if len(data) > 60 else fail())
        monkeypatch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="Input/output error"):
            journal.append([("b", {"n": 2})])
        monkeypatch.undo()
        journal.append([("c", {"n": 3})])
    with Journal(tmp_path) as journal:
        assert missing(journal, "abc") == ["b"]
    assert (tmp_path / "main-0.jsonl.torn").exists()


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with Journal(tmp_path) as journal:
        journal.append([("a", {"text": "x" * 100}), ("b", {})])
    with Journal(tmp_path) as journal:
        assert journal.get("a") == {"text": "x" * 100}


def test_append_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new part forces its name to the disk; each batch then takes one fsync, and what that sees is the whole batch."""
    synced: list[Path] = []
    sizes: list[int] = []
    fsync = os.fsync
    with Journal(tmp_path) as journal:
        with monkeypatch.context() as watched:
            watched.setattr("selfsteer.store.journal.sync", synced.append)
            journal.append([("a", {})])
        assert synced == [tmp_path]
        monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), fsync(fd))[1])
        journal.append([(f"k{n}", {"n": n}) for n in range(100)])
    assert sizes == [(tmp_path / "main-0.jsonl").stat().st_size]


def test_memory_holds_an_index_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """20,000 records of 2 KB are 40 MB on disk; the index stays below 50 bytes a record, that is 1 MB."""
    monkeypatch.setattr("selfsteer.store.journal._RECENT", 500)
    keys = [digest(n) for n in range(20_000)]
    with Journal(tmp_path) as journal:
        for start in range(0, len(keys), 1000):
            journal.append([(key, {"text": "x" * 2000}) for key in keys[start : start + 1000]])
    tracemalloc.start()
    try:
        with Journal(tmp_path) as journal:
            held, peak = tracemalloc.get_traced_memory()
            assert not missing(journal, keys)
    finally:
        tracemalloc.stop()
    assert held / len(keys) < 50
    assert peak < 4 * len(keys) * 50


# Samples of other runs


def finished(stage: Stage, *keys: str, n: int = 1) -> Stage:
    """With these samples in its journal."""
    with stage.journal() as journal:
        journal.append([(key, {"n": n}) for key in keys])
    return stage


def test_lenders_of_one_name_lend_what_each_has(tmp_path: Path):
    own, one, other = (Stage(tmp_path / place / "run/round-1/2-responses") for place in ("own", "one", "other"))
    borrow(own, [finished(one, "a")])
    borrow(own, [one, finished(other, "b")])
    assert own.finished() == 2
    borrow(last := Stage(tmp_path / "last/run/round-1/2-responses"), [one, other, finished(own, "c")])
    assert last.finished() == 3
    assert len(list((last.path / "parts").iterdir())) == 3, "what was lent twice is there once"


def test_parts_from_another_device_are_copied_to_the_disk_and_grow_with_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    synced: list[Path] = []
    own, other = (Stage(tmp_path / name / "round-1/2-responses") for name in ("own", "other"))
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(folder, "sync", synced.append)
    with other.journal() as journal:
        journal.append([("a", {})])
        borrow(own, [other])
        assert [path.suffix for path in synced] == [".tmp", ""], "the bytes, then the name"
        journal.append([("b", {})])
        borrow(own, [other])
    assert own.finished() == 2


@pytest.mark.parametrize("lender", ["base", "main"])
def test_the_run_s_own_record_goes_before_a_lent_one(lender: str, tmp_path: Path):
    own = finished(Stage(tmp_path / "run/round-1/2-responses"), "a", n=1)
    borrow(own, [finished(Stage(tmp_path / lender / "round-1/2-responses"), "a", n=2)])
    with own.journal() as journal:
        assert journal.get("a") == {"n": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to every file")
def test_a_lender_that_nobody_may_write_to_lends(tmp_path: Path):
    own, other = (Stage(tmp_path / name / "round-1/2-responses") for name in ("own", "other"))
    part = finished(other, "a").path / "parts/main-0.jsonl"
    part.write_bytes(part.read_bytes() + b"torn")
    part.chmod(0o444)
    borrow(own, [other])
    assert finished(own, "b").finished() == 2
    assert part.read_bytes().endswith(b"torn")


# Stage


def test_seal_and_read_back(tmp_path: Path):
    stage = Stage(tmp_path / "round-1" / "2-responses")
    dropped = {n: Dropped(id=f"q{n}", reason="empty", detail="é") for n in (0, 300)}
    stream = (dropped.get(row["n"], row) for row in rows(602))

    assert stage.manifest() is None
    sealed_as = stage.seal(ORIGIN, Contents(wanted=602, rows=stream), taken=lambda: Taken(2.5))
    manifest = stage.verify()
    assert manifest == sealed_as == stage.manifest()
    assert (manifest.wanted, manifest.kept, manifest.dropped) == (602, 600, {"empty": 2})
    assert (manifest.stage, manifest.settings, manifest.seconds) == ("round-1/2-responses", {"temperature": 0.7}, 2.5)
    assert set(manifest.outputs) == {"data.parquet", "dropped.jsonl"}
    assert list(stage.rows()) == [row for row in rows(602) if row["n"] not in dropped]
    assert list(stage.dropped()) == list(dropped.values())
    assert stage.is_current(ORIGIN.fingerprint)
    assert not stage.is_current(Origin(settings={"temperature": 0.8}, inputs=ORIGIN.inputs).fingerprint)


def test_rows_of_some_queries(tmp_path: Path):
    """600 rows in three row groups, two a query; of the middle one nothing is wanted."""
    stage = Stage(tmp_path / "3-steering")
    every = [{"query_id": str(n // 2), "n": n} for n in range(600)]
    stage.seal(ORIGIN, Contents(wanted=300, rows=every, rows_each=2))
    assert [row["n"] for row in stage.rows(of={"299", "0", "1", "no such"})] == [0, 1, 2, 3, 598, 599]
    assert list(stage.rows(of=())) == []


def test_a_row_that_vanished_is_noticed(tmp_path: Path):
    stage = Stage(tmp_path / "2-responses")
    with pytest.raises(ValueError, match=r"wanted 4, dropped 0, but wrote 3 rows where 4 x 1 were due"):
        stage.seal(ORIGIN, Contents(wanted=4, rows=rows(3)))
    assert stage.manifest() is None
    stage.seal(ORIGIN, Contents(wanted=2, rows=rows(2), rows_each=1))
    stage.reopen()
    items = [*rows(4), Dropped(id="q", reason="identical")]
    manifest = stage.seal(ORIGIN, Contents(wanted=3, rows=items, rows_each=2))
    assert (manifest.kept, manifest.dropped) == (2, {"identical": 1})


def test_columns_are_never_lost(tmp_path: Path):
    schema = pa.schema([("query_id", pa.string()), ("note", pa.string())])
    stage = Stage(tmp_path / "3-steering")
    with pytest.raises(ValueError, match=r"row 1 has \['extra'\], not in the schema"):
        stage.seal(ORIGIN, Contents(wanted=2, rows=[{"query_id": "a"}, {"extra": 1}], schema=schema))
    assert [path.name for path in stage.path.iterdir()] == []
    stage.seal(ORIGIN, Contents(wanted=1, rows=[{"query_id": "a"}], schema=schema))
    assert list(stage.rows()) == [{"query_id": "a", "note": None}]


@pytest.mark.parametrize("schema", [None, pa.schema([("query_id", pa.string())])])
def test_everything_dropped_is_still_a_result(tmp_path: Path, schema: pa.Schema | None):
    stage = Stage(tmp_path / "3-steering")
    stage.seal(ORIGIN, Contents(wanted=1, rows=[Dropped(id="q", reason="empty")], schema=schema))
    assert stage.verify().kept == 0
    assert list(stage.rows()) == []


def test_model_folder_is_sealed_file_by_file(tmp_path: Path):
    stage = Stage(tmp_path / "6-policy")
    (stage.path / "model" / "sub").mkdir(parents=True)
    (stage.path / "model" / "model.safetensors").write_bytes(b"weights")
    (stage.path / "model" / "sub" / "config.json").write_bytes(b"{}")
    (stage.path / "checkpoint-1").mkdir()
    manifest = stage.seal(ORIGIN, Contents(wanted=10, files=("model",)))
    assert set(manifest.outputs) == {"dropped.jsonl", "model/model.safetensors", "model/sub/config.json"}
    assert manifest.outputs["model/sub/config.json"] == digest({})
    flip(stage.path / "model" / "model.safetensors", 3)
    with pytest.raises(StageDamaged, match=r"model/model\.safetensors: changed since it was sealed"):
        stage.verify()
    stage.reopen()
    assert sorted(path.name for path in stage.path.iterdir()) == ["checkpoint-1"]


def test_flipped_byte_in_the_data_names_the_file_and_the_way_out(tmp_path: Path):
    stage = sealed(tmp_path)
    flip(stage.path / "data.parquet", 40)
    with pytest.raises(StageDamaged, match=r"data\.parquet: changed since.*delete .*MANIFEST\.json.*same command again"):
        stage.verify()
    (stage.path / "data.parquet").unlink()
    with pytest.raises(StageDamaged, match=r"data\.parquet: missing"):
        stage.verify()


def test_every_damaged_manifest_is_noticed(tmp_path: Path):
    stage = sealed(tmp_path)
    path = stage.path / "MANIFEST.json"
    whole = path.read_bytes()
    last = len(whole) - 2  # the closing brace; after it stands only a newline
    for offset in range(0, last + 1, 7):
        path.write_bytes(whole)
        flip(path, offset)
        if path.read_bytes().strip() != whole.strip():
            try:
                manifest = stage.manifest()
            except StageDamaged:
                continue
            path.write_bytes(whole)
            assert manifest == stage.manifest(), "a changed space between values changes nothing"
    for text in (b"", b"[]", b"null", whole[:50]):
        path.write_bytes(text)
        with pytest.raises(StageDamaged, match=r"MANIFEST\.json: (damaged|not as it was written)"):
            stage.manifest()


def test_a_strangers_manifest_cannot_reach_outside(tmp_path: Path):
    stage = sealed(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    path = stage.path / "MANIFEST.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    for name in ("../../../precious", str(tmp_path / "precious")):
        forged = {**fields, "outputs": {name: "0" * 64}}
        path.write_text(json.dumps({**forged, "sha256": digest(forged)}))
        with pytest.raises(StageDamaged, match="outside its own folder"):
            stage.reopen()
    assert (tmp_path / "precious").exists()


def test_reopen_keeps_the_journal(tmp_path: Path):
    stage = sealed(tmp_path)
    with stage.journal() as journal:
        journal.append([("a", {"n": 1})])
    stage.reopen()
    assert stage.manifest() is None
    assert [path.name for path in stage.path.iterdir()] == ["parts"]
    with stage.journal() as journal:
        assert journal.get("a") == {"n": 1}
    stage.reopen()  # never sealed since: nothing to do
    assert stage.finished() == 1


def test_reopen_killed_half_way_is_finished_by_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with RunFolder(tmp_path / "run") as run:
        stage = run.stage(1, "2-responses")
        (stage.path / "model").mkdir()
        (stage.path / "model" / "shard-2").write_bytes(b"old")
        stage.seal(ORIGIN, Contents(wanted=3, rows=rows(3), files=("model",)))
        with monkeypatch.context() as broken:
            broken.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                stage.reopen()
        assert (stage.path / "model" / "shard-2").exists()
        assert stage.manifest() is None
    with RunFolder(tmp_path / "run") as run:
        assert list(run.stage(1, "2-responses").path.iterdir()) == []


def test_a_sealed_stage_is_not_overwritten(tmp_path: Path):
    stage = sealed(tmp_path)
    with pytest.raises(ValueError, match="sealed already"):
        stage.seal(ORIGIN, Contents(wanted=0, rows=[]))
    assert len(list(stage.rows())) == 3


def test_unsealed_rows_are_not_read(tmp_path: Path):
    for read in (Stage(tmp_path).rows, Stage(tmp_path).dropped, Stage(tmp_path).verify):
        with pytest.raises(ValueError, match=r"not finished \(no MANIFEST\.json\)"):
            read()


def test_order_of_sealing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each file is forced to the disk before it gets its name, and its folder after; the manifest is the last of all."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(f"sync {name_of(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append(f"name {b.name}"), replace(a, b))[1])
    stage = Stage(tmp_path / "stage")
    (stage.path / "model").mkdir(parents=True)
    (stage.path / "model" / "weights").write_bytes(b"w")
    stage.seal(ORIGIN, Contents(wanted=3, rows=rows(3), files=("model",)))

    def written(name: str) -> list[str]:
        return [f"sync {name}.tmp", f"name {name}", "sync stage"]

    settled = ["sync dropped.jsonl", "sync stage", "sync weights", "sync model", "sync data.parquet", "sync stage"]
    assert steps == [*written("data.parquet"), *written("dropped.jsonl"), *settled, *written("MANIFEST.json")]


def test_full_disk_while_sealing(tmp_path: Path):
    stage = Stage(tmp_path / "2-responses")
    many = [{"text": os.urandom(2000).hex()} for _ in range(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*same command again.*data\.parquet"):
            stage.seal(ORIGIN, Contents(wanted=200, rows=many))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(stage.path.iterdir()) == []
    stage.seal(ORIGIN, Contents(wanted=200, rows=many))
    assert list(stage.rows()) == many


def test_reading_holds_a_row_group_not_the_file(tmp_path: Path):
    """20 row groups of 256 rows, 2 MB each."""
    stage = Stage(tmp_path / "2-responses")
    count = 20 * 256
    stage.seal(ORIGIN, Contents(wanted=count, rows=({"blob": os.urandom(8000)} for _ in range(count))))
    before = pa.total_allocated_bytes()
    most = 0
    for row in stage.rows():
        assert len(row["blob"]) == 8000
        most = max(most, pa.total_allocated_bytes() - before)
    assert (stage.path / "data.parquet").stat().st_size > 40e6
    assert most < 12e6


# Run folder


@pytest.mark.parametrize("name", ["", ".", "..", "-x", ".hidden", "a b", "ä", "a" * 65, "a\n"])
def test_run_names(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"Name another output folder, such as runs/NAME"):
        RunFolder("/" if name == "" else tmp_path / "x" / name if name != "." else ".")
    assert list(tmp_path.iterdir()) == []


def test_run_names_that_pass(tmp_path: Path):
    for name in ("a", "0.9_b-C", "a" * 64):
        assert RunFolder(f"{tmp_path}/{name}/").path.name == name


def test_sessions_add_up(tmp_path: Path):
    with RunFolder(tmp_path / "run") as run:
        run.describe("seed: 0\n", {"torch": "2.13"})
    with RunFolder(tmp_path / "run") as run:
        run.describe("seed: 1\n", {"torch": "2.14"})
    view = RunFolder.view(tmp_path / "run")
    assert [session["torch"] for session in view.sessions()] == ["2.13", "2.14"]
    assert [session["recipe"] for session in view.sessions()] == [digest("seed: 0\n"), digest("seed: 1\n")]
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "seed: 1\n"
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: damaged"):
        view.sessions()


DAMAGED = ["", "null", "[]", "3", '"x"', "{}", '{"', "[" * 5000, "\xff\xfe", '{"sessions": {}, "seconds": null}']


@pytest.mark.parametrize("content", [*DAMAGED, '{"sessions": [3]}'])
def test_a_damaged_run_json_is_named_with_the_way_out(tmp_path: Path, content: str):
    with RunFolder(tmp_path / "run") as run:
        run.describe("seed: 0\n", {})
        (run.path / "run.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=r"run\.json: damaged.*move it away"):
            run.describe("seed: 0\n", {})


@pytest.mark.parametrize(
    "content", [*DAMAGED, '{"seconds": NaN}', '{"seconds": -1}', '{"seconds": true}', '{"seconds": 1e999}']
)
def test_a_damaged_clock_begins_at_zero_and_says_so(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / "elapsed.json").write_bytes(content.encode("latin-1"))
    with elapsed(tmp_path) as taken:
        assert 0 <= taken().seconds < 60
    assert "elapsed.json: damaged" in caplog.text


def test_a_clock_adds_up(tmp_path: Path):
    (tmp_path / "elapsed.json").write_text('{"seconds": 1000, "parts": {"score": [600.5, 70], "load": [2, 0]}}')
    with elapsed(tmp_path) as taken:
        with part("score"):
            count("score", 5)
        seconds, parts, _ = taken()
    assert 1000 <= seconds < 1060
    assert 600.5 <= parts["score"].seconds < 660
    assert parts["score"].tokens == 75
    assert parts["load"] == (2.0, 0)
    assert json.loads((tmp_path / "elapsed.json").read_text())["parts"]["load"] == [2.0, 0], "kept for the next session"


def test_a_clock_without_room_is_named_and_hides_no_error(tmp_path: Path):
    """A limit on the file size stands in for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"make room.*elapsed\.json"), elapsed(tmp_path):
            pass
        with pytest.raises(KeyboardInterrupt), elapsed(tmp_path):
            raise KeyboardInterrupt
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lock_without_room_is_named(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"make room.*run/LOCK"), RunFolder(tmp_path / "run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with RunFolder(tmp_path / "run"):
        pass


def test_a_disk_that_forces_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=rf"repair the disk.*{tmp_path.name}"):
        sync(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_peak_of_memory_is_of_the_work_alone_and_the_larger_of_two_sessions(tmp_path: Path):
    held = bytearray(b"1") * 300_000_000
    del held
    with elapsed(tmp_path) as taken:
        before = taken().memory["ram"]
        held = bytearray(b"1") * 100_000_000
        del held
        peak = taken().memory["ram"]
    assert 90e6 < peak - before < 250e6, "what was held before the work began is not its"
    with elapsed(tmp_path) as taken:
        assert taken().memory["ram"] == peak, "the earlier session held more"
    (tmp_path / "elapsed.json").write_text('{"seconds": 1, "memory": {"ram": 1, "gpu": 7}}')
    with elapsed(tmp_path) as taken:
        found = taken().memory
    assert found["gpu"] == 7
    assert found["ram"] > 1e6


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_folder_that_can_t_be_made_names_what_stands_in_its_place(tmp_path: Path, below: str):
    (tmp_path / "file").touch()
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    for name in ("file", "loose"):
        path = tmp_path / name / below
        with (
            pytest.raises(ValueError, match=rf"{path} can't be made: {tmp_path / name} is no folder\. .*output folder"),
            RunFolder(path),
        ):
            pass


def test_a_model_s_folder_takes_no_run(tmp_path: Path):
    """The run's own JSON files would be taken for the model's, which then is another one in the next session."""
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(ValueError, match=rf"{tmp_path} holds a model \(config\.json\)\. .*output folder"),
        RunFolder(tmp_path),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_what_is_no_lock_file_is_refused(tmp_path: Path):
    for number, make in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink("LOCK", path))):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        make(folder / "LOCK")
        with pytest.raises(ValueError, match=r"LOCK: .*remove it"), RunFolder(folder):
            pass


def test_damaged_rows_are_told_by_file_and_way_out(tmp_path: Path):
    stage = sealed(tmp_path)
    data = stage.path / "data.parquet"
    whole = data.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:4] + bytes(60) + whole[64:]):
        data.write_bytes(damaged)
        with pytest.raises(StageDamaged, match=r"data\.parquet: not a readable Parquet file.*MANIFEST\.json"):
            list(stage.rows())
    data.unlink()
    with pytest.raises(StageDamaged, match=r"data\.parquet.*MANIFEST\.json"):
        list(stage.rows())


def test_a_run_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path):
    folder = tmp_path / "run"
    with RunFolder(folder) as run:
        run.describe("seed: 0\n", {})
    described = json.loads((folder / "run.json").read_text())
    assert described.pop("schema_version") == SCHEMA_VERSION
    (folder / "run.json").write_text(json.dumps(described))  # as the first version wrote it
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=rf"run: a run of version 1, and this selfsteer reads version {SCHEMA_VERSION}"):
        RunFolder(folder).__enter__()
    with pytest.raises(ValueError, match="of version 1"):
        RunFolder.view(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_view_of_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="no run here"):
        RunFolder.view(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_view_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with RunFolder(tmp_path / "run") as run:
        run.describe("", {})
        stages = run.stage(1, "2-responses").path.parent
    for inside, name in ((run.path, "."), (stages, "..")):
        monkeypatch.chdir(inside)
        assert RunFolder.view(name).path == run.path


def test_view_creates_nothing_and_needs_no_lock(tmp_path: Path):
    with RunFolder(tmp_path / "run") as run:
        run.describe("", {})
        assert RunFolder.view(tmp_path / "run").stage(1, "2-responses").manifest() is None
        assert not (tmp_path / "run" / "round-1").exists()
        run.stage(1, "2-responses")
        assert (tmp_path / "run" / "round-1" / "2-responses").is_dir()


HOLD = """
import sys, time
from selfsteer.store.folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_learns_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path: Path):
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunFolderBusy, match=rf"in use by process {holder.pid} on .* since \d{{4}}-.*output folder"),
            RunFolder(path),
        ):
            pass
        holder.kill()
    assert f"process {holder.pid}" in (path / "LOCK").read_text(), "the killed process left its name, and it is no obstacle"
    with RunFolder(path):
        assert f"process {os.getpid()}" in (path / "LOCK").read_text()
    with RunFolder(path):
        pass


def test_make_folder_forces_each_new_name_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr("selfsteer.store.durable.sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_what_a_stage_took_is_in_its_manifest(tmp_path: Path):
    with RunFolder(tmp_path / "run") as run:
        stage = run.stage(1, "2-responses")
        taken = Taken(7.0, {"sample": Spent(3.0, 50)})
        sealed = stage.seal(ORIGIN, Contents(wanted=1, rows=rows(1)), taken=lambda: taken)
        assert stage.verify() == sealed
    assert (sealed.parts, sealed.memory, sealed.cleaned, sealed.seconds) == ({"sample": [3.0, 50]}, {}, [], 7.0)


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
def test_a_folder_that_goes_away_under_its_owner_is_told(how: str, tmp_path: Path):
    """Where the next stage begins, and whatever fails in between; nothing is begun in its place."""

    def take_away() -> None:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if how == "deleted":
            shutil.rmtree(tmp_path / "elsewhere")
        if how == "replaced":
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")

    def next_stage() -> None:
        with RunFolder(tmp_path / "run") as run:
            run.stage(1, "1-principles")
            take_away()
            run.stage(1, "2-responses")

    def within_a_stage() -> None:
        with RunFolder(tmp_path / "run") as run, elapsed(run.stage(1, "1-principles").path):
            take_away()
            raise OSError("some file is not there")

    for work in (next_stage, within_a_stage):
        with pytest.raises(RunFolderGone, match="moved, deleted or replaced while"):
            work()
        assert not (tmp_path / "run" / "round-1" / "2-responses").exists()
        for left in ("elsewhere", "run"):
            shutil.rmtree(tmp_path / left, ignore_errors=True)


def test_the_clock_s_thread_says_nothing_of_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would be a traceback; whoever works in the folder says it."""
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    monkeypatch.setattr(folder, "_EVERY_SECONDS", 0.01)

    def work() -> None:
        with elapsed(tmp_path):
            shutil.rmtree(tmp_path)
            time.sleep(0.2)

    with pytest.raises(FileNotFoundError):
        work()
    assert said == []
