"""The command: what it calls and prints, its exit statuses, that nothing is written on a mistake, that it answers at once.

`main` is called in this process with a scripted pipeline; logging and start-up are tested in a process of their own.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.core import TyperGroup

import selfsteer
from selfsteer import __main__ as entry
from selfsteer import cli, runtime
from selfsteer.data.exchange import Exported
from selfsteer.measures.estimates import Estimate
from selfsteer.recipe.sections import Recipe, dump, load
from selfsteer.store.folder import RunFolder

QUICKSTART = "quickstart"


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_configure_logging", lambda *, verbose: None)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the modules that the commands call; a test sets the functions that it expects to be called."""
    fake = SimpleNamespace()
    fake.check_recipe = fake.check_pairs = fake.check_order = fake.check_source = lambda *_, **__: None
    for name in ("pipeline", "given", "data.exchange", "data.files", "data.named", "evaluating", "rewards"):
        monkeypatch.setitem(sys.modules, f"selfsteer.{name}", fake)
    for name in ("pipeline", "evaluating", "rewards"):
        monkeypatch.setattr(selfsteer, name, fake, raising=False)
    monkeypatch.setattr("selfsteer.data.exchange", fake, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return fake


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["selfsteer", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "selfsteer", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


# ---- show -----------------------------------------------------------------------------------------------------------


def test_show_prints_a_recipe_that_loads_back(tmp_path: Path):
    shown = process("show", QUICKSTART, "generator.beta=0.5", "output=runs/other", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "beta: 0.5  # default: 0.1" in shown.stdout
    path = tmp_path / "shown.yaml"
    path.write_text(shown.stdout, encoding="utf-8")
    assert load(path) == load(QUICKSTART, ["generator.beta=0.5", "output=runs/other"])


def test_show_and_help_leave_the_heavy_libraries_alone(tmp_path: Path):
    code = """
import sys
from selfsteer import cli
sys.argv = ["selfsteer", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as ended:
    assert ended.code == 0
print("\\n".join(sys.modules), file=sys.stderr)
"""
    run = tmp_path / "run"
    with RunFolder(run) as folder:
        folder.describe(dump(load(QUICKSTART)), {})
    tables = {"numpy", "pyarrow"}  # the journal and the sealed tables are of these
    for arguments in (["show", QUICKSTART], ["--help"], ["run", "--help"], ["--version"], ["status", str(run)]):
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        loaded = {"torch", "transformers", "datasets", "peft", "pyarrow", "numpy"} & set(ended.stderr.split())
        assert loaded <= (tables if arguments[0] == "status" else set()), arguments


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("selfsteer 0.")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "show"])
def test_an_unknown_key_ends_with_2_and_writes_nothing(tmp_path: Path, name: str):
    ended = process(name, QUICKSTART, "generator.bata=1", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "selfsteer: error: command line: generator.bata: unknown key; did you mean generator.beta?\n"
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert command(monkeypatch, "run", "nowhere.yaml") == 2
    expected = "selfsteer: error: nowhere.yaml: no such recipe file. With the package come authors-qwen2-7b, "
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    "arguments", [["run"], ["dance"], ["measure"], ["export", "runs/a", "--to", "out", "--format", "xml"]]
)
def test_usage_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]):
    assert command(monkeypatch, *arguments) == 2
    assert "Usage: selfsteer" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "says"), [("", "is a folder"), ("nowhere/found.json", "can't be written")])
def test_where_nothing_can_be_written_is_said_before_the_work(monkeypatch, capsys, tmp_path: Path, name: str, says: str):
    assert command(monkeypatch, "measure", "runs/none", "--json", str(tmp_path / name)) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_terminal_obeys_nothing_in_what_is_told(monkeypatch, capsys, tmp_path: Path):
    """Neither a file's name nor a stranger's words colour, erase or turn round what stands on the screen."""
    file = tmp_path / "pairs\x1b]0;title\x07\u202e\udc80.jsonl"
    file.write_text("[]")
    command(monkeypatch, "measure", str(file))
    told = capsys.readouterr().err
    assert "pairs\\x1b]0;title\\x07\\u202e\\udc80.jsonl" in told
    record = logging.LogRecord("selfsteer", logging.WARNING, __file__, 1, "dropped: %s", ("\x1b[2J\r\x9b1m",), None)
    assert cli._make_visible(record)
    assert record.getMessage() == "dropped: \\x1b[2J\\r\\x9b1m"


@pytest.mark.parametrize(
    "error", [ValueError("queries.jsonl: line 3 has no 'query'"), OSError(28, "No space left", "a.jsonl")]
)
def test_what_the_user_can_mend_has_no_traceback(monkeypatch, capsys, pipeline, error: Exception):
    def run(_recipe: Recipe, **_: object) -> dict[str, object]:
        raise error

    pipeline.run = run
    assert command(monkeypatch, "run", QUICKSTART) == 2
    assert capsys.readouterr().err == f"selfsteer: error: {error}\n"


def test_a_device_without_memory_is_no_defect(monkeypatch, capsys, pipeline):
    def run(_recipe: Recipe, **_: object) -> dict[str, object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    pipeline.run = run
    assert command(monkeypatch, "run", QUICKSTART) == 2
    told = capsys.readouterr().err
    assert told.startswith("selfsteer: error: CUDA out of memory. Tried to allocate 2.00 GiB. Lower training.micro_batch")
    assert told.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch, pipeline):
    """Python prints it and exits with 1."""

    def run(_recipe: Recipe, **_: object) -> dict[str, object]:
        raise ZeroDivisionError

    pipeline.run = run
    monkeypatch.setattr(sys, "argv", ["selfsteer", "run", QUICKSTART])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_continue(monkeypatch, capsys, pipeline, signum: signal.Signals, status: int):
    def run(_recipe: Recipe, **_: object) -> dict[str, object]:
        os.kill(os.getpid(), signum)
        runtime.raise_if_stopped()
        raise AssertionError("the signal was not seen")

    pipeline.run = run
    before = signal.getsignal(signum)
    assert command(monkeypatch, "run", QUICKSTART, "output=runs of today/a") == status
    assert signal.getsignal(signum) is before
    assert capsys.readouterr().err == (
        f"stopped by {signum.name}; the same command continues:\n  selfsteer run {QUICKSTART} 'output=runs of today/a'\n"
    )


# ---- what the commands call and print -------------------------------------------------------------------------------


def metrics(output: str) -> dict[str, object]:
    """The smallest `Metrics`: a run of one round with one stage."""
    stage = {"wanted": 1000, "kept": 812, "dropped": {"identical": 120, "empty": 68}, "seconds": 61.0}
    return {
        "run": {
            "name": "a",
            "folder": output,
            "model": "m",
            "seed": 7,
            "seconds": 61.0,
            "policy_folder": f"{output}/policy",
        },
        "rounds": [{"stages": {"2-responses": stage}}],
    }


def test_run_prints_the_verdict(monkeypatch, capsys, pipeline):
    given: list[Recipe] = []
    pipeline.run = lambda recipe, **_: given.append(recipe) or metrics(recipe.output)
    assert command(monkeypatch, "run", QUICKSTART, "seed=7") == 0
    assert given == [load(QUICKSTART, ["seed=7"])]
    printed = capsys.readouterr().out
    assert "policy aligned in 1 min 01 s" in printed
    assert "model   runs/quickstart/policy\n" in printed


def test_train_and_measure_pass_on_what_they_are_given(monkeypatch, capsys, pipeline):
    given: list[object] = []
    pipeline.train_pairs = lambda pairs, recipe, **_: given.append((pairs, recipe)) or metrics("runs/trained")
    pipeline.measure_pairs = lambda *arguments: given.append(arguments) or {"pairs": 4321}
    assert command(monkeypatch, "train", "pairs.jsonl", QUICKSTART, "seed=3") == 0
    options = ("--policy", "some/model", "--judge", "other/model", "--template-arguments", "{thinking: false}")
    assert command(monkeypatch, "measure", "pairs.jsonl", *options) == 0
    train, measure = given
    assert train == (Path("pairs.jsonl"), load(QUICKSTART, ["seed=3"]))
    assert measure == (Path("pairs.jsonl"), "some/model", "other/model", {"thinking": False})
    printed = capsys.readouterr().out
    assert "runs/trained/policy" in printed
    assert "4,321" in printed


@pytest.mark.parametrize("given", ["thinking", "[1]", "{1: 2}", "{a: b: c}"])
def test_template_arguments_are_names_and_values(given: str, monkeypatch, capsys, pipeline):
    pipeline.measure_pairs = lambda *_: {"pairs": 1}
    assert command(monkeypatch, "measure", "pairs.jsonl", "--policy", "m", "--template-arguments", given) == 2
    assert "--template-arguments" in capsys.readouterr().err


def test_export_passes_on_what_it_is_given(monkeypatch, capsys, caplog):
    given: list[object] = []

    def export(*arguments: object, **options: object) -> Exported:
        given.append((arguments, options))
        return Exported(1234, {"empty chosen": 2}, None, "trl dpo")

    monkeypatch.setattr("selfsteer.data.exchange.export", export)
    assert command(monkeypatch, "export", "runs/a", "--to", "out", "--format", "trl", "--round", "3") == 0
    ((arguments, options),) = given
    assert arguments == (Path("runs/a"), Path("out"), "trl")
    assert (options["keep_truncated"], options["round"]) == (False, 3)
    captured = capsys.readouterr()
    assert captured.out == "wrote 1,234 pairs to out\nuse them with  trl dpo\n"
    assert "dropped 2 of 1,236: 2 empty chosen" in caplog.text


def test_status_shows_stages_drops_and_what_comes_next(monkeypatch, capsys):
    def status(run: Path) -> dict[str, object]:
        return {
            "run": str(run),
            "stages": [
                {
                    "round": 1,
                    "name": "2-responses",
                    "state": "sealed",
                    "wanted": 1000,
                    "kept": 3000,
                    "dropped": {"empty": 68, "identical": 1120},
                    "seconds": 3725.4,
                },
                {
                    "round": 1,
                    "name": "3-steering",
                    "state": "waiting",
                    "wanted": None,
                    "kept": None,
                    "dropped": {},
                    "seconds": None,
                },
            ],
            "next": "round 1, 3-steering",
        }

    monkeypatch.setattr("selfsteer.stages.status.status", status)
    monkeypatch.setenv("COLUMNS", "100")
    assert command(monkeypatch, "status", "runs/[a]") == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines() if "│" in line]
    assert rows == [
        ["1", "2-responses", "sealed", "3,000", "1,000", "1,120 identical, 68 empty", "1 h 02 min"],
        ["1", "3-steering", "waiting", "-", "-", "", "-"],
    ]
    assert "runs/[a]" in printed
    assert printed.endswith("next: round 1, 3-steering\n")


# ---- logging --------------------------------------------------------------------------------------------------------


def test_messages_go_to_stderr_and_others_chatter_nowhere(tmp_path: Path):
    """A scripted pipeline in a process of its own: our INFO is shown, others' INFO and warnings are not."""
    code = """
import logging, sys, types, warnings
import selfsteer
from selfsteer import cli
def run(recipe, **_):
    logging.getLogger("selfsteer.stage").info("kept 812 of 1,000")
    logging.getLogger("selfsteer.stage").debug("not shown")
    logging.getLogger("httpx").info("not shown")
    logging.getLogger("httpx").warning("shown too")
    warnings.warn("not shown")
    facts = {"name": "a", "folder": "runs/a", "model": "m", "seed": 0, "seconds": 1.0}
    return {"run": facts, "rounds": []}
selfsteer.pipeline = types.SimpleNamespace(run=run)
sys.argv = ["selfsteer", "run", sys.argv[1]]
cli.main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, QUICKSTART], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert [line.split(" ", 2)[2] for line in ended.stderr.splitlines()] == [
        "INFO run folder runs/quickstart: loading the libraries",
        "INFO kept 812 of 1,000",
        "WARNING shown too",
    ]
    assert "runs/a" in ended.stdout


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluate_passes_on_what_it_is_given(monkeypatch, capsys, pipeline, tmp_path: Path):
    seen: list[object] = []
    estimate = Estimate(0.25, 0.1, 0.5, 8)
    row = {"task": "ifeval", "metric": "acc", "before": estimate, "after": estimate, "difference": estimate, "items": 8}
    row |= {
        "of": 541,
        "limited": True,
        "judge": None,
        "remarks": ["limited: 8 of 541 items"],
        "form": "share",
        "part_of": None,
    }

    def evaluate_models(*given: object) -> dict[str, object]:
        seen.extend(given)
        return {"models": {when: {"seconds": 1.0, "tasks": []} for when in ("before", "after")}, "rows": [row]}

    pipeline.evaluate_models, pipeline.read_engine = evaluate_models, lambda file: file
    out = tmp_path / "found.json"
    options = ["--before", "b", "--limit", "8", "--data", "d", "--json", str(out), "--output", "o"]
    assert command(monkeypatch, "evaluate", "a", "--tasks", "ifeval, gsm8k", *options) == 0
    policies, section, engine, judge, output = seen
    assert [policy.model for policy in policies] == ["b", "a"]
    assert (section.tasks, section.limit, section.data) == (["ifeval", "gsm8k"], 8, "d")
    assert (engine, judge, output) == (None, None, Path("o"))
    shown = capsys.readouterr().out
    assert "8 of 541" in shown
    assert "+25.0 points" in shown
    assert json.loads(out.read_text())["rows"][0]["after"] == {"mean": 0.25, "low": 0.1, "high": 0.5, "n": 8}


def test_recorded_judgements_need_no_model(monkeypatch, capsys, tmp_path: Path):
    rows = [
        {
            "instruction": str(i),
            "output_1": "b",
            "output_2": "m",
            "generator_1": "base",
            "generator_2": "mine",
            "annotator": "someone",
            "preference": 1 + (i % 4 > 0),
        }
        for i in range(8)
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert command(monkeypatch, "evaluate", "mine", "--annotations", str(file)) == 0
    shown = capsys.readouterr().out
    assert "mine against base, judged by someone" in shown
    assert "75.0%" in shown
    assert command(monkeypatch, "evaluate", "mine", "--annotations", str(file), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["win_rate"]["mean"] == 0.75
    assert command(monkeypatch, "evaluate", "mine", "--annotations", str(file), "--tasks", "ifeval") == 2


def test_reward_passes_on_what_it_is_given(monkeypatch, capsys, tmp_path: Path):
    seen: list[Any] = []

    def train_reward_model(*given: Any) -> dict[str, Any]:
        seen.extend(given)
        return {"held_out": {"a.jsonl": {"pairs": 9, "accuracy": Estimate(0.75, 0.5, 0.9, 9)}}, "model": "out/model"}

    monkeypatch.setattr("selfsteer.rewards.train_reward_model", train_reward_model)
    monkeypatch.setattr("selfsteer.data.named.check_pairs", lambda *_: None)
    options = ["--model", "m", "--output", "out", "--weights", "1,0.5", "--lora-rank", "8", "--margin", "--center", "0.01"]
    assert command(monkeypatch, "reward", "a.jsonl", "b.jsonl", *options) == 0
    sources, model, output, settings, training = seen
    assert [(str(source.path), source.weight) for source in sources] == [("a.jsonl", 1.0), ("b.jsonl", 0.5)]
    assert (model, output, settings.holdout) == ("m", Path("out"), 0.1)
    assert (training.lora_rank, training.margin, training.center, training.learning_rate) == (8, True, 0.01, 1e-4)
    assert "75.0%" in capsys.readouterr().out
    assert command(monkeypatch, "reward", "a.jsonl", "--model", "m", "--output", "out", "--weights", "1,2") == 2
    assert "2 weights for 1 datasets" in capsys.readouterr().err


def test_reward_bench_prints_every_subset(monkeypatch, capsys):
    def reward_bench(model: str, files: list[Path], output: Path, settings: object) -> dict[str, Any]:
        assert (model, files, output) == ("rm", [Path("f.jsonl")], Path("evaluations"))
        subset = Estimate(0.5, 0.3, 0.7, 20)
        found = {"format": "llmbar", "items": 20, "of": 20, "subsets": {"llmbar": subset}, "sections": {}, "score": subset}
        return {"f.jsonl": found | {"ties": 1, "kappa": 0.1, "missing": [], "refused": {"too long": 2}}}

    monkeypatch.setattr("selfsteer.rewards.reward_bench", reward_bench)
    monkeypatch.setattr("selfsteer.data.named.check_pairs", lambda *_: None)
    monkeypatch.setattr("selfsteer.data.files.check_source", lambda *_: None)
    assert command(monkeypatch, "reward-bench", "rm", "--data", "f.jsonl") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("f.jsonl (llmbar)", "50.0%", "Cohen's kappa", "20 of 20 items scored; 1 ties; 2 not scored (too long)"):
        assert text in shown


# ---- what is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "runs/no"], "runs/no: no run here"),
        (["view", "runs/no"], "runs/no: no run here"),
        (["chat", "./no"], "MODEL: './no': there is no such folder"),
        (["chat", "m/m", "--before", "./no"], "--before: './no': there is no such folder"),
        (["clean", "runs/no"], "runs/no: no run here"),
        (["report", "runs/no"], "runs/no/metrics.json is missing"),
        (["plan", QUICKSTART, "policy.model=./my-model"], "policy.model: './my-model': there is no such folder"),
        (["export", "runs/no", "--to", "out", "--format", "trl"], "runs/no: no such run folder and no such file"),
        (["measure", "no.jsonl", "--policy", "m/m"], "no.jsonl: no such file"),
        (["measure", "pairs.jsonl", "--policy", "./no"], "--policy: './no': there is no such folder"),
        (["run", QUICKSTART, "queries.path=no.jsonl"], "no.jsonl: no such file; queries.path takes"),
        (["run", QUICKSTART, "policy.model=./my-model"], "policy.model: './my-model': there is no such folder"),
        (["run", QUICKSTART, "policy.model=my.gguf"], "policy.model: my.gguf: there is no such file"),
        (["compare", QUICKSTART, "principles.path=no.jsonl"], "no.jsonl: no such file; principles.path"),
        (["run", QUICKSTART, "launcher={kind: accelerate, config: no.yaml}"], "no.yaml: no such file; name an ordinary"),
        (["train", "no.jsonl", QUICKSTART], "no.jsonl: no such file"),
        (
            ["train", QUICKSTART, "pairs.jsonl"],
            "quickstart is a recipe, and the pairs come first: pairs.jsonl, then",
        ),
        (["evaluate", "./no", "--tasks", "ifeval"], "MODEL: './no': there is no such folder"),
        (["compare-answers", "a/a", "b/b", "--queries", "no.csv", "--judge", "j/j"], "no.csv: no such file; --queries"),
        (["reward", "no.jsonl", "--model", "m/m", "--output", "out"], "no.jsonl: no such file"),
        (["reward-bench", "m/m", "--data", "no.jsonl"], "no.jsonl: no such file; --data"),
    ],
)
def test_what_is_missing_is_said_before_torch_is_imported(tmp_path: Path, arguments: list[str], said: str):
    pairs = [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    code = "import sys; sys.modules['torch'] = None; from selfsteer import cli; cli.main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"selfsteer: error: {said}"), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_every_command_shows_an_example(monkeypatch, capsys):
    """That itself is a call of this command with its required arguments."""
    monkeypatch.setenv("COLUMNS", "160")
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    for name, found in group.commands.items():
        assert command(monkeypatch, name, "-h") == 0
        shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
        examples = [shlex.split(line)[2:] for line in shown if line.startswith(f"selfsteer {name} ")]
        assert examples or f"selfsteer {name}" in shown, name
        for arguments in examples:
            found.make_context(name, arguments)


def test_an_interrupt_while_the_command_is_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped by SIGINT before anything began\n")
