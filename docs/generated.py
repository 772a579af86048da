"""The pages of the site that the code itself says, made when it is built, so that nothing is written twice by hand.

mkdocs calls `on_files`; without it, each function of `PAGES` returns the Markdown of its page. Descriptions are the
docstrings of what they describe, read from the source where Python does not keep them.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import selfsteer
from selfsteer.cli import app
from selfsteer.recipe import shipped
from selfsteer.recipe.gates import MEASURES
from selfsteer.recipe.sections import Recipe
from selfsteer.recipe.text import kinds_of
from selfsteer.store import columns

SOURCE = Path(selfsteer.__file__).parent


# ---- the recipe -----------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe, with type, default and description."""
    names = ", ".join(f"`{name}`" for name in shipped.names())
    return _page(
        "# Every key of a recipe",
        "A recipe is YAML: sections with keys. Only `policy.model` and `queries.path` must be given; the other defaults are"
        " the paper's wherever it gives a number. On the command line a key is dotted: `generator.beta=0.2`. An unknown key"
        " is refused with the nearest known one. `selfsteer show RECIPE` prints all this with the values of a recipe.",
        f"These recipes come with the package: {names}.",
        *_section("", Recipe),
    )


def _section(path: str, section: type[BaseModel]) -> Iterator[str]:
    """A table of the section's own keys, then the sections in it, each under its heading."""
    own = {name: field for name, field in section.model_fields.items() if not kinds_of(field)}
    rows = [(f"`{f'{path}.{name}'.lstrip('.')}`", *_of_key(field)) for name, field in own.items()]
    if rows:
        yield _table(["key", "type", "default", "what it is"], rows)
    for name, field in section.model_fields.items():
        full = f"{path}.{name}".lstrip(".")
        inner = kinds_of(field)
        text = field.description or ""
        if full != "engine" and "vllm" in inner and full != "engine.replica":
            yield f"## {full}"
            yield f"{_text(text)} Empty by default; its keys are those of [engine](#engine)."
        elif len(inner) > 1:
            yield f"## {full}"
            yield _text(text)
            if full != "engine.replica":  # whose kinds are among those of the engine
                for kind, model in inner.items():
                    yield f"### {full}.kind: {kind}"
                    yield _text(model.__doc__ or "")
                    yield from _section(full, model)
        elif inner:
            [model] = inner.values()
            yield f"## {full}"
            yield _text(text or model.__doc__ or "") + (" Off by default." if field.default is None else "")
            yield from _section(full, model)


def _of_key(field: FieldInfo) -> tuple[str, str, str]:
    bounds = [f"{sign} {value:g}" for item in field.metadata for sign, value in _bounds(item)]
    kind = " \\| ".join(f"`{each}`" for each in _types(field.annotation)) + "".join(f", {bound}" for bound in bounds)
    default = "required" if field.is_required() else f"`{_plain(field.get_default(call_default_factory=True))}`"
    return kind, default, _cell(field.description or "")


def _bounds(item: object) -> Iterator[tuple[str, float]]:
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        value = getattr(item, name, None)
        if value is not None:
            yield sign, value


def _types(annotation: Any) -> Iterator[str]:
    """A type as a reader of YAML knows it; choices one by one."""
    if get_origin(annotation) is Literal:
        yield from (str(choice) for choice in get_args(annotation))
    elif get_origin(annotation) in (Union, UnionType):
        for choice in get_args(annotation):
            yield from _types(choice)
    elif get_origin(annotation) is list:
        yield f"list of {' or '.join(_types(get_args(annotation)[0]))}"
    elif get_origin(annotation) is dict:
        yield "mapping"
    else:
        names = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}
        yield names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


# ---- the run folder -------------------------------------------------------------------------------------------------

_STAGES = (
    *("principles", "responses", "steering", "training", "gain", "preferences", "quality", "selection"),
    *("passes", "answers"),
)
"""The modules of the stages, in the order of a round."""


def run_folder_page() -> str:
    """The files of a run folder, the columns of its Parquet files, and what metrics.json holds."""
    stages = [(f"`stages/{name}.py`", _cell(_doc_of(f"stages/{name}").split("\n\n")[0])) for name in _STAGES]
    schemas = [name for name in vars(columns) if isinstance(getattr(columns, name), pa.Schema)]
    described = _attributes("store/columns")[""]
    return _page(
        "# The run folder",
        "Everything that a run makes lies in one folder. [Design](../design.md#the-run-folder) has the map; this page"
        " has the files and columns.",
        "## Files",
        _verbatim(_doc_of("store/folder")),
        "## Journal",
        _verbatim(_doc_of("store/journal")),
        "## Stages",
        _table(["module", "what it makes"], stages),
        "## Columns",
        "Messages are lists of `{role, content}`. What a column holds stands under [records](#records), by its name.",
        *(
            part
            for name in schemas
            for part in (
                f"### {name}",
                _text(described.get(name, "")),
                _columns(getattr(columns, name)),
            )
        ),
        "## Records",
        "The same as Python has them (`selfsteer.records`).",
        *_classes("records", ["Query", "Principles", "Response", "Pair", "Side", "Dropped"]),
        "## metrics.json",
        _text(_doc_of("measures/metrics").split("\n\n")[1])
        + " The top is `Metrics`, a round is `RoundMetrics`. What the numbers mean: [quality](../quality.md).",
        *_classes("measures/metrics", None),
        *_classes("measures/estimates", ["Estimate"]),
        *_classes("measures/verdicts", ["JudgeReport"]),
        *_classes("measures/checks", ["CheckReport"]),
    )


_NAMED = {
    "messages": columns.PAIRS.field("prompt"),
    "[principles](#principles)": columns.RESPONSES.field("principles"),
    "[response](#response)": columns.RESPONSES.field("good"),
}
"""Types that recur, by the name that they have here."""


def _arrow(kind: pa.DataType) -> str:
    for name, field in _NAMED.items():
        if kind == field.type:
            return name
    if pa.types.is_list(kind):
        return f"list of {_arrow(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(f"`{field.name}` {_arrow(field.type)}" for field in kind) + "}"
    return str(kind)


def _columns(schema: pa.Schema) -> str:
    """The columns of a schema; those of pairs with what `columns.pair_row` fills them from."""
    if schema is not columns.PAIRS:
        return _table(["column", "type"], [(f"`{field.name}`", _arrow(field.type)) for field in schema])
    described = _attributes("records")
    [row] = [each for each in ast.walk(ast.parse(inspect.getsource(columns.pair_row))) if isinstance(each, ast.Dict)]
    filled: dict[str, tuple[str, str]] = {}
    for key, value in zip(row.keys, row.values, strict=True):
        found = next(
            each for each in ast.walk(value) if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name)
        )
        record = "Pair" if ast.unparse(found.value) == "pair" else "Side"
        filled[ast.literal_eval(ast.unparse(key or value))] = (record, found.attr)
    rows = [
        (f"`{field.name}`", _arrow(field.type), f"`{record}.{name}`", _cell(described[record].get(name, "")))
        for field in schema
        for record, name in [filled[field.name]]
    ]
    return _table(["column", "type", "in Python", "what it is"], rows)


def _classes(module: str, wanted: Sequence[str] | None) -> Iterator[str]:
    """The records of a module, or these, with the docstring of each and of each of its fields."""
    described = _attributes(module)
    for node in ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or (wanted is not None and node.name not in wanted):
            continue
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
        yield f"### {node.name}"
        yield _text(ast.get_docstring(node) or "")
        rows = [
            (f"`{name}`", f"`{_annotation(each.annotation)}`".replace("|", "\\|"), _cell(described[node.name].get(name, "")))
            for each in fields
            if (name := ast.unparse(each.target))
        ]
        yield _table(["field", "type", "what it is"], rows)


def _annotation(node: ast.expr) -> str:
    return re.sub(r"NotRequired\[(.*)\]$", r"\1", ast.unparse(node))


# ---- gates, commands, Python ----------------------------------------------------------------------------------------


def gates_page() -> str:
    """Every measure that a gate can be set on."""
    rows = [
        (
            f"`{name}`",
            _cell(gate.description),
            f"{gate.span.low:g} to {gate.span.high:g}".replace("inf", "∞").replace("-∞ to ∞", "any"),
            "" if gate.interval else "no",
            f"`{gate.path}`",
        )
        for name, gate in MEASURES.items()
    ]
    return _page(
        "# Every gate",
        "How bounds are written and what a failed gate does is in [quality](../quality.md#gates). A name without `_chosen`"
        " or `_rejected` bounds both sides. Where no interval is taken, `at 95%` is refused. The last column is where the"
        " number stands in a round of `metrics.json`.",
        _table(["gate", "on", "values", "interval", "in metrics.json"], rows),
    )


def commands_page() -> str:
    """Every command, as its --help says it."""
    group: Any = typer.main.get_command(app)
    return _page(
        "# Every command",
        "`selfsteer COMMAND --help` prints the same. Exit statuses: 0 done; 2 something that you can mend, said in a line;"
        " 128 and the signal's number when stopped (the same command goes on); 1 a defect of selfsteer, with its traceback.",
        *(part for name, command in group.commands.items() for part in _command(name, command)),
    )


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}"
    yield _text(command.help or "")
    arguments = [_metavar(each) for each in command.params if each.param_type_name == "argument"]
    yield f"    selfsteer {' '.join([name, *arguments, '[OPTIONS]'])}"
    rows = [
        (
            f"`{', '.join(each.opts) if each.param_type_name == 'option' else _metavar(each)}`",
            "required" if each.required else f"`{each.default}`" if each.default not in (None, False, (), "") else "",
            _cell(each.help or ""),
        )
        for each in command.params
    ]
    yield _table(["argument or option", "default", "what it is"], rows)
    if examples := re.findall(r"^selfsteer .*$", command.epilog or "", flags=re.MULTILINE):
        yield "\n".join(f"    {line}" for line in examples)


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def python_page() -> str:
    """The public functions, with their docstrings."""
    return _page(
        "# Python",
        "What `import selfsteer` offers; everything else may change. Errors that you can mend are ValueError or OSError, in"
        " one clear line.",
        *(part for name in selfsteer.__all__ for part in _public(name, getattr(selfsteer, name))),
    )


def _public(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name}"
    if inspect.isclass(thing):
        yield _text(inspect.getdoc(thing) or "")
        return
    parameters = [str(each).replace("'", "") for each in inspect.signature(thing).parameters.values()]
    yield "```python\n" + f"selfsteer.{name}(" + "".join(f"\n    {each}," for each in parameters) + "\n)\n```"
    yield _verbatim(inspect.getdoc(thing) or "")


# ---- text -----------------------------------------------------------------------------------------------------------


def _doc_of(module: str) -> str:
    return ast.get_docstring(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))) or ""


def _attributes(module: str) -> dict[str, dict[str, str]]:
    """The strings under the assignments of a module, and of each of its classes, by name; "" is the module itself."""
    tree = ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))
    bodies = {"": tree.body} | {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    return {name: dict(_strings_under(body)) for name, body in bodies.items()}


def _strings_under(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for before, after in pairwise(body):
        if isinstance(before, ast.AnnAssign | ast.Assign) and isinstance(after, ast.Expr):
            target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            if isinstance(target, ast.Name) and isinstance(after.value, ast.Constant):
                yield target.id, inspect.cleandoc(str(after.value.value))


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _verbatim(text: str) -> str:
    return f"```text\n{text}\n```"


def _text(text: str) -> str:
    """A docstring as Markdown: outside backticks nothing is markup, and pages of ours are links."""
    parts = re.split(r"(`?docs/\w+\.md`?|`[^`]*`)", " ".join(text.split()))
    return "".join(_link(part) if "docs/" in part else part if part.startswith("`") else _plain_text(part) for part in parts)


def _link(part: str) -> str:
    page = part.strip("`").removeprefix("docs/")
    return f"[{page.removesuffix('.md')}](../{page})" if page.endswith(".md") else part


def _plain_text(text: str) -> str:
    return re.sub(r"([\\*_\[\]<])", r"\\\1", text).replace("\\<", "&lt;")


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/recipe.md": recipe_page,
    "reference/gates.md": gates_page,
    "reference/run-folder.md": run_folder_page,
    "reference/python.md": python_page,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' hook: the pages above, among those of docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
