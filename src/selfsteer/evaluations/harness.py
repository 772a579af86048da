"""Tasks of lm-evaluation-harness (lm_eval 0.4.13), asked through our own engines and scoring.

The harness gives the items, their examples, how an answer is read and what counts as right. Who answers is ours: it hands
over chat messages, which go the way that training's prompts go, so that a model is never measured under another prompt than
it was trained on. Two kinds of item: one that is answered freely (`Ask`), one whose choices are compared by their
log-probability (`Score`).

Left out on purpose: tasks that need more than that (perplexity of whole texts; whether an answer is the greedy one; an
answer that the task begins in the model's place; code that is run; images). They are refused by name before anything is
generated.
"""

# lm_eval is an extra: without it nothing of it has a type.
# pyright: reportMissingImports=false, reportUnknownParameterType=false, reportUntypedBaseClass=false

import difflib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lm_eval
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from selfsteer.engines.base import Sampling
from selfsteer.evaluations.asking import Ask, Asked, Choices, Score
from selfsteer.evaluations.local_data import Local, local_data
from selfsteer.evaluations.results import Figure, TaskResult, estimate_of
from selfsteer.evaluations.sentences import CHECKS, ready_splitter
from selfsteer.recipe.sections import EvaluationSection
from selfsteer.records import Message

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Limit of an answer where neither the task nor the caller says one: the harness's own."""

_FEWSHOT_SEED = 1234
"""The harness's own, for tasks that draw their examples."""

_ALIASES = {"math500": "minerva_math500"}
_HOMES = {
    "ifeval": ("ifeval", "ifeval"),
    "gsm8k": ("gsm8k", "gsm8k"),
    "gsm8k_cot": ("gsm8k", "gsm8k"),
    "gsm8k_cot_zeroshot": ("gsm8k", "gsm8k"),
    "minerva_math500": ("minerva_math", "math500"),
    "hendrycks_math500": ("hendrycks_math", "math500"),
    "mmlu": ("mmlu/default", "mmlu"),
}
"""Folder of the harness that a task is in, and the folder of its data under evaluation.data. Of other tasks the whole
harness is read first, which takes about half a minute, and their data is in a folder of the task's name."""

_TASKS = Path(str(lm_eval.__file__)).parent / "tasks"

_NEEDS_GREEDY = {"exact_match", "acc_mutual_info"}
"""Metrics of multiple choice that need more than the choices' log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    names: Sequence[str]
    leaves: Mapping[str, Sequence[str]]
    """The tasks that each of the names stands for."""
    manager: TaskManager
    local: Mapping[str, Local]
    """By the harness's task or group name."""
    splitter: str | None


class Harness:
    """The tasks, loaded and checked; `evaluate` asks them of a model, as often as there are models."""

    def __init__(self, section: EvaluationSection, scratch: Path, *, scores: bool = True) -> None:
        """section: its tasks are the harness's. scratch: where local data is laid out.

        scores: whether the model's log-probabilities are to be had; a server that runs already gives none.
        Raises ValueError for a task that is unknown, has no data, or can't be asked in this way.
        """
        self.section = section
        self._loaded = _load(section, scratch)
        for name, task in self._load()["tasks"].items():
            _refuse(name, task, scores=scores)
            _try(name, task, section)

    def _load(self) -> dict[str, Any]:
        with _in_words(f"the items of {', '.join(self._loaded.names)}", self.section.data):
            found = cast(dict[str, Any], self._loaded.manager.load(list(self._loaded.names)))
        for task in found["tasks"].values():
            if self.section.fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", self.section.fewshot or 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return found

    def evaluate(self, ask: Ask, score: Score) -> list[TaskResult]:
        """Every task, in the order named, its parts behind it."""
        model = _Model(ask, score, self.section.max_new_tokens)
        results = evaluate(
            lm=model,
            task_dict=cast(Any, self._load()),
            limit=self.section.limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=True,
        )
        assert results is not None
        return _read(cast(dict[str, Any], results), model, self._loaded)


@contextmanager
def _in_words(what: str, data: str | None) -> Generator[None]:
    """What the harness and `datasets` raise for data that is not as they expect, as one line with the way out."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        where = "the hub" if data is None else data
        raise ValueError(f"evaluation.data: {what} in {where} can't be read or scored ({said}); fetch it again") from error


def _try(name: str, task: Any, section: EvaluationSection) -> None:
    """Each item that will be asked as it is asked, and IFEval's as scored: what is wrong is known before a model answers."""
    for number, item in enumerate(islice(task.eval_docs, section.limit), start=1):
        with _in_words(f"item {number} of {name}", section.data):
            task.doc_to_text(item)
            task.doc_to_target(item)
            if "ifeval" in name:
                task.process_results(item, [""])


def _known_as(names: Sequence[str]) -> list[str]:
    known = [_ALIASES.get(name, name) for name in names]
    if not known or len(set(known)) < len(known):
        raise ValueError(f"evaluation.tasks: {', '.join(names) or 'none'}; name each task once")
    return known


def _home(name: str) -> tuple[str, str] | None:
    # MMLU-Pro, MMLU-Redux and others have names like its parts, and data of their own.
    part = name.startswith("mmlu_") and name in _all_names(_TASKS / "mmlu")
    return _HOMES["mmlu"] if part else _HOMES.get(name)


def _manager(names: Sequence[str], own: Sequence[Path]) -> TaskManager:
    """With the tasks named, and as little else as may be. own: folders whose definitions replace the harness's."""
    homes = {home[0] for name in names if (home := _home(name)) is not None}
    folders: list[str | Path] = [*(_TASKS / home for home in sorted(homes)), *own]
    manager = TaskManager(include_defaults=False, include_path=folders)
    if set(names) <= set(manager.all_tasks):
        return manager
    known = _all_names(_TASKS)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = {name: difflib.get_close_matches(name, [*_ALIASES, *sorted(known)], n=4, cutoff=0.5) for name in unknown}
        raise ValueError(
            "; ".join(f"evaluation.tasks: {name!r} is no task of lm_eval; near it are {near[name]}" for name in unknown)
        )
    log.info("reading all tasks of lm_eval %s, which takes a while", version("lm_eval"))
    return TaskManager(include_path=list(own))


_NAME = re.compile(r"""^(?:-\s+)?["']?(?:task|group|tag)["']?:\s*["']?([\w.:+-]+)""", re.MULTILINE)


@cache
def _all_names(root: Path) -> frozenset[str]:
    """What tasks, groups and tags there are, read with a regular expression: parsing all definitions takes half a minute."""
    return frozenset(
        name for file in root.rglob("*.yaml") for name in _NAME.findall(file.read_text(encoding="utf-8", errors="replace"))
    )


def _load(section: EvaluationSection, scratch: Path) -> _Loaded:
    names = _known_as(section.tasks)
    manager = _manager(names, [])
    leaves = {name: _leaves_of(manager, name) for name in names}
    # Before anything of IFEval is imported, which would fetch what is not there.
    splitter = ready_splitter(scratch / "nltk") if any("ifeval" in name for name in names) else None
    local: dict[str, Local] = {}
    if section.data is not None:
        folder = scratch / "tasks"
        for name in names:
            home = (_home(name) or ("", name))[1]
            local[name] = local_data(home, Path(section.data), scratch / "data")
            for leaf in leaves[name]:
                _redefine(manager, leaf, local[name], folder)
        # What a definition replaces is what is wanted here, and no news.
        logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
        manager = _manager(names, [folder])
    return _Loaded(names=names, leaves=leaves, manager=manager, local=local, splitter=splitter)


def _leaves_of(manager: TaskManager, name: str) -> list[str]:
    """The tasks that a name stands for."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name not in ("TAG", "GROUP"):
        return [name]
    members: list[Any] = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task", [])
    named = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [leaf for member in named for leaf in _leaves_of(manager, str(member))]


def _redefine(manager: TaskManager, leaf: str, local: Local, folder: Path) -> None:
    """The task, but for where its data is: a definition of its own that includes the harness's."""
    source, configuration = manager.task_index[leaf].yaml_path, manager.task_index[leaf].cfg or {}
    if source is None:
        raise ValueError(
            f"evaluation.data: {leaf} is a program of lm_eval and takes no local files; leave evaluation.data out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    definition = {"include": str(source), "task": leaf, "dataset_path": str(local.folder.resolve()), "tag": None}
    for role in ("training_split", "validation_split", "fewshot_split"):
        # The harness breaks off at a split that is named and not there.
        if local.splits is not None and configuration.get(role) not in (None, *local.splits):
            definition[role] = None
    (folder / f"{leaf}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML


def _refuse(name: str, task: Any, *, scores: bool) -> None:
    kind = task.OUTPUT_TYPE
    if kind not in ("generate_until", "multiple_choice"):
        raise ValueError(f"evaluation.tasks: {name} compares {kind}, which is not asked here; take another task")
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"evaluation.tasks: {name} runs code that the model wrote; use lm_eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"evaluation.tasks: {name} shows images or sounds, which chat messages here can't hold")
    if task.config.gen_prefix:
        raise ValueError(f"evaluation.tasks: {name} begins the answer in the model's place, which is not done here")
    metrics = {str(each["metric"]) for each in task.config.metric_list or ()}
    if kind == "multiple_choice":
        if not scores:
            raise ValueError(
                f"evaluation.tasks: {name} compares the log-probabilities of given answers, which a server that runs already"
                " does not tell. Name the model's folder or hub id, or take a task that is answered freely (such as"
                " mmlu_generative)."
            )
        if metrics & _NEEDS_GREEDY:
            raise ValueError(f"evaluation.tasks: {name} needs {sorted(metrics & _NEEDS_GREEDY)}, which is not computed here")
    examples = task.config.num_fewshot or 0
    if examples and task.fewshot_cfg.samples is None and not (task.fewshot_cfg.split or task.has_training_docs()):
        # The harness would take them from the items that it measures.
        raise ValueError(
            f"evaluation.tasks: {name} shows {examples} examples from a split that the data lacks. Add the file (such as"
            " train.jsonl), set fewshot to 0, or take a task with examples of its own (such as gsm8k_cot)."
        )


# --- the model, as the harness sees one ------------------------------------------------------------------------------------


class _Model(LM):
    """Hands requests on to `Ask` and `Score`. A "prompt" of the harness is the JSON of its messages all the way through."""

    def __init__(self, ask: Ask, score: Score, max_new_tokens: int | None) -> None:
        super().__init__()
        self._ask, self._score, self._max_new_tokens = ask, score, max_new_tokens
        self.unanswered: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """By task and reason."""
        self.cut = Counter[str]()
        self.first: dict[str, tuple[Message, ...]] = {}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps([{"role": each["role"], "content": each["content"]} for each in chat_history])

    @property
    def tokenizer_name(self) -> str:
        return ""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        seen: dict[int, int] = {}
        asked: list[Asked] = []
        stops: list[list[str]] = []
        for request in requests:
            prompt, settings = cast(tuple[str, dict[str, Any]], request.args)
            wanted = cast(dict[str, Any], normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            sampling = Sampling(
                temperature=wanted["temperature"] if wanted["do_sample"] else 0.0,
                top_p=float(wanted.get("top_p", 1.0)) if wanted["do_sample"] else 1.0,
                max_new_tokens=self._max_new_tokens or wanted["max_gen_toks"],
            )
            asked.append(Asked(_messages(prompt), sampling, repeat))
            self.first.setdefault(str(request.task_name), asked[-1].messages)
            stops.append([stop for stop in wanted["until"] if stop])
        texts: list[str] = []
        for request, answer, until in zip(requests, self._ask(asked), stops, strict=True):
            task = str(request.task_name)
            if answer.error is not None:
                self.unanswered[task][answer.error] += 1
            text = _until(answer.text, until)
            self.cut[task] += answer.cut and text == answer.text
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        items: list[Choices] = []
        for request in requests:
            prompt, continuation = cast(tuple[str, str], request.args)
            messages = _messages(prompt)
            self.first.setdefault(str(request.task_name), messages)
            if items and items[-1].messages == messages and continuation not in items[-1].continuations:
                items[-1] = Choices(messages, (*items[-1].continuations, continuation))
            else:
                items.append(Choices(messages, (continuation,)))
        # Whether a choice is the greedy answer is not known; tasks that ask are refused at the start.
        return [(logp, False) for scores in self._score(items) for logp in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("tasks of this kind are refused at the start")


def _messages(prompt: str) -> tuple[Message, ...]:
    return tuple(Message(role=each["role"], content=each["content"]) for each in json.loads(prompt))


def _until(text: str, stops: Sequence[str]) -> str:
    """Up to the first stop; the engine goes on to the end token or the limit, which gives the same beginning."""
    at = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
    return text[:at]


# --- results ---------------------------------------------------------------------------------------------------------------


def _read(results: dict[str, Any], model: _Model, loaded: _Loaded) -> list[TaskResult]:
    found = [_task_result(name, results, model, loaded) for name in results["samples"]]
    by_name = {each.task: each for each in found}
    for group in results.get("groups", {}):
        by_name[group] = _group_result(group, _leaves(group, results["group_subtasks"]), by_name, results)
    for root, local in loaded.local.items():
        if local.note is not None:
            for name in [root] if root in by_name else loaded.leaves[root]:
                by_name[name] = replace(by_name[name], notes=[*by_name[name].notes, local.note])
    # What was named, each with its parts behind it; a tag is no more than its parts.
    subtasks = {root: leaves for root, leaves in loaded.leaves.items() if root not in by_name} | results["group_subtasks"]
    return [
        by_name[name] if name == root or root not in by_name else replace(by_name[name], part_of=root)
        for root in loaded.names
        for name in _named(root, subtasks)
        if name in by_name
    ]


def _named(root: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    return [root, *(name for member in subtasks.get(root) or () for name in _named(member, subtasks))]


def _task_result(name: str, results: dict[str, Any], model: _Model, loaded: _Loaded) -> TaskResult:
    samples: list[dict[str, Any]] = results["samples"][name]
    configuration: dict[str, Any] = results["configs"][name]
    counts = results["n-samples"][name]
    root = next((each for each in loaded.local if name in loaded.leaves[each]), None)
    data = f"{configuration['dataset_path']} (hub)" if root is None else f"local, sha256 {loaded.local[root].digest[:16]}"
    notes: list[str] = []
    if loaded.splitter is not None and "ifeval" in name:
        used = sum(check in CHECKS for sample in samples for check in sample["doc"].get("instruction_id_list", ()))
        notes.append(f"sentences: {loaded.splitter}; {used} checks ({', '.join(CHECKS)})")
    return TaskResult(
        task=name,
        figures=list(_figures(name, results, samples)),
        items=counts["effective"],
        of=counts["original"],
        fewshot=results["n-shot"][name],
        version=str(results["versions"][name]),
        data=data,
        unanswered=model.unanswered[name],
        cut=model.cut[name],
        notes=notes,
        first=model.first.get(name),
    )


def _figures(name: str, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for metric, kept, value in _numbers(results["results"][name]):
        rows = {str(each["doc_id"]): each[metric] for each in samples if each["filter"] == kept and metric in each}
        yield _figure(name, _shown(metric, kept), value, rows)


def _numbers(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Metric, filter and value of each of the harness's figures, their errors left out."""
    for key, value in found.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, kept, float(value)


def _shown(metric: str, kept: str) -> str:
    return metric if kept == "none" else f"{metric} ({kept})"


def _figure(task: str, metric: str, value: float, rows: Mapping[str, Any]) -> Figure:
    """rows: what each item has of the metric."""
    by_item, form = _influences(rows, value), "share" if 0 <= value <= 1 else "number"
    return Figure(task=task, metric=metric, value=value, estimate=estimate_of(by_item), by_item=by_item, form=form)


def _influences(rows: Mapping[str, Any], value: float) -> dict[str, float] | None:
    """What each item adds to a mean over items or over the parts of items; None where the value is no such mean.

    An item with parts (IFEval's instructions) counts once: with the mean p over all parts, s of the item's n right, N items
    and P parts, p + (s - p n) N / P. The mean of these is p, their spread that of p over items (the ratio estimator's).
    """
    parts = {key: list(row) if isinstance(row, list | tuple) else [row] for key, row in rows.items()}
    flat = [part for row in parts.values() for part in row]
    if not flat or not all(isinstance(part, bool | int | float) for part in flat):
        return None
    mean = sum(map(float, flat)) / len(flat)
    if abs(mean - value) > 1e-9:
        return None
    weight = len(parts) / len(flat)
    return {key: mean + (sum(map(float, row)) - mean * len(row)) * weight for key, row in parts.items()}


def _leaves(group: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    if group not in subtasks or not subtasks[group]:
        return [group]
    return [leaf for member in subtasks[group] for leaf in _leaves(member, subtasks)]


def _group_result(
    group: str, leaves: Sequence[str], by_name: Mapping[str, TaskResult], results: dict[str, Any]
) -> TaskResult:
    members = [by_name[leaf] for leaf in leaves]
    figures: list[Figure] = []
    for metric, kept, value in _numbers(results["groups"][group]):
        name = _shown(metric, kept)
        own = [figure for member in members for figure in member.figures if figure.metric == name]
        rows = {f"{figure.task}/{item}": part for figure in own for item, part in (figure.by_item or {}).items()}
        figures.append(_figure(group, name, value, rows))
    unanswered: Counter[str] = Counter()
    for member in members:
        unanswered.update(member.unanswered)
    return TaskResult(
        task=group,
        figures=figures,
        items=sum(member.items for member in members),
        of=sum(member.of for member in members),
        fewshot=members[0].fewshot,
        version=str(results["versions"].get(group)),
        data=members[0].data,
        unanswered=unanswered,
        cut=sum(member.cut for member in members),
        notes=[f"{len(members)} tasks"],
        first=members[0].first,
    )
