"""Recipes as text: YAML and `key=value` in, commented YAML and readable mistakes out.

Knows pydantic sections in general and nothing of any one of them; the sections are in `sections.py`.
"""

import difflib
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

OVERRIDE = "override"
"""Where a mistake is that no file holds, for callers in Python."""

_COMMENT_WIDTH = 110

_KEY = re.compile(r"\w+(\.\w+)*")

_short = reprlib.Repr()

_short.maxstring = 80


FilePath = Annotated[str, AfterValidator(expanduser)]
"""A file or a folder, or what may be one: ~ is the home folder, as in a shell, which does not see what a recipe says."""


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RecipeError(ValueError):
    """A recipe that cannot be run; one line a mistake, each naming where it stands, the key and what was expected."""


class Document(NamedTuple):
    """A recipe file as read, before validation."""

    data: dict[str, Any]
    lines: dict[str, int]
    """Line of each dotted key, counted from 1."""


def read_yaml(path: Path) -> Document:
    """Read one YAML mapping with yaml.safe_load; `RecipeError` when it is none or says a key twice."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, yaml.SafeLoader)
        lines = dict(_key_lines(tree, path)) if tree is not None else {}
        data = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except RecipeError:
        raise
    except ValueError as error:  # of a date that there is not
        raise RecipeError(f"{path}: {error}; put it in quotes if it is meant as text") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: holds {_short.repr(data)}; expected sections, such as 'policy:' with 'model:' under it")
    return Document(cast("dict[str, Any]", data), lines)


def _key_lines(root: yaml.Node, path: Path) -> Iterator[tuple[str, int]]:
    """Each dotted key with its line; a key said twice is refused, as safe_load would silently take the last one."""
    visited: set[int] = set()  # a YAML alias may point back at a node that holds it
    pending = [("", root)]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in visited:
            continue
        visited.add(id(node))
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first:
                raise RecipeError(f"{path}:{line}: {prefix}{key}: said twice, first on line {first[key]}; keep one")
            first[key] = line
            yield f"{prefix}{key}", line
            pending.append((f"{prefix}{key}.", value_node))


class Override(NamedTuple):
    """One `key=value` beside a recipe."""

    key: str
    value: Any
    origin: str = OVERRIDE
    """Who gave it, for messages."""


def parse_override(text: str, origin: str = OVERRIDE) -> Override:
    """Split `dotted.key=value`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError(f"{origin}: {text!r} is not key=value, such as generator.beta=0.2")
    try:
        return Override(key, yaml.safe_load(value), origin)
    except (yaml.YAMLError, ValueError):  # the latter of a date that there is not
        raise RecipeError(
            f"{origin}: {key}: {value!r} is not valid YAML; put it in double quotes inside single ones"
        ) from None


def apply_override(data: dict[str, Any], override: Override) -> dict[str, Any]:
    """A copy of the data with one value replaced; sections on the way are made where they are missing."""
    return _replaced(data, override, depth=0)


def _replaced(data: dict[str, Any], override: Override, *, depth: int) -> dict[str, Any]:
    # Copies on the way down, as a YAML alias makes two sections one object.
    parts = override.key.split(".")
    name = parts[depth]
    if depth == len(parts) - 1:
        return {**data, name: override.value}
    child: Any = data.get(name)
    if child is None:
        child = {}
    if not isinstance(child, dict):
        holder = ".".join(parts[: depth + 1])
        raise RecipeError(f"{override.origin}: {override.key}: {holder} is {_short.repr(child)}, not a section")
    return {**data, name: _replaced(cast("dict[str, Any]", child), override, depth=depth + 1)}


class Change(NamedTuple):
    """A setting that has another value than before."""

    key: str
    """Dotted."""
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


_ABSENT = object()


def changes(before: Mapping[str, Any], after: Mapping[str, Any], key: str = "") -> Iterator[Change]:
    """The settings that differ between two recipes as plain values, in the order of the later one."""
    for name in (*after, *(name for name in before if name not in after)):
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        full = f"{key}.{name}".lstrip(".")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(cast("dict[str, Any]", old), cast("dict[str, Any]", new), full)
        elif old != new:
            yield Change(full, old, new)


def _shown(value: object) -> str:
    return "(not there)" if value is _ABSENT else _short.repr(value) if isinstance(value, str) else _inline(value)


# ---- mistakes -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a mistake is."""

    key: str
    """Dotted, as it stands in the recipe."""
    kind: str | None
    """The kind of the section around it, where sections of several kinds may stand there."""


def explain(error: ValidationError, model: type[BaseModel], origin: Callable[[str], str]) -> str:
    """One line a mistake. `origin` says where a dotted key was given ("recipe.yaml:12", "command line")."""
    mistakes: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        place = _place(details["loc"], model)
        key = f"{place.key}.kind" if details["type"] == "union_tag_invalid" else place.key
        mistakes.setdefault(key, []).append(_mistake(place, details, model))
    return "\n".join(
        f"{origin(key)}: {key + ': ' if key else ''}{'; or '.join(dict.fromkeys(found))}" for key, found in mistakes.items()
    )


def _mistake(place: Place, details: ErrorDetails, model: type[BaseModel]) -> str:
    match details["type"]:
        case "extra_forbidden":
            return _unknown(place, model)
        case "missing":
            return f"missing; expected: {_description(place.key, model)}"
        case "value_error":
            return details["msg"].removeprefix("Value error, ")
        case "union_tag_invalid":
            return f"given {details['ctx']['tag']!r}, expected {details['ctx']['expected_tags']}"  # pyright: ignore[reportTypedDictNotRequiredAccess]
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            return f"given {_short.repr(details['input'])}, expected a section with keys of its own"
        case kind:
            expected = details["msg"].removeprefix("Input should be ")
            quote = kind == "string_type" and isinstance(details["input"], bool | int | float)
            return f"given {_short.repr(details['input'])}, expected {expected}" + (
                '; put it in "quotes" if it is meant as text' if quote else ""
            )


def _place(loc: tuple[int | str, ...], model: type[BaseModel]) -> Place:
    """pydantic's location without the tags that it adds for the members of a union."""
    parts: list[str] = []
    sections: Kinds = {"": model}
    kind = None
    for part in loc:
        if len(sections) > 1 and part in sections:
            kind = str(part)
            sections = {kind: sections[kind]}
        elif sections:
            parts.append(str(part))
            field = next(iter(sections.values())).model_fields.get(str(part))
            sections = kinds_of(field) if field else {}
        elif isinstance(part, int):
            parts.append(str(part))
    return Place(".".join(parts), kind)


def _unknown(place: Place, model: type[BaseModel]) -> str:
    """The nearest known keys: of this very name elsewhere, else alike in this section, else alike anywhere."""
    section, _, name = place.key.rpartition(".")
    siblings = [key.name for key in _keys(model) if key.section == section and place.kind in (None, key.kind)]
    if others := [key.kind for key in _keys(model) if (key.section, key.name) == (section, name)]:
        return f"not a key of kind {place.kind} (of {', '.join(map(str, others))}); its keys are {', '.join(siblings)}"
    known = list(dict.fromkeys((key.section, key.name) for key in _keys(model)))
    same = [(s, n) for s, n in known if n == name]
    near = [(section, n) for n in _alike(name, siblings)]
    far = [(s, n) for s, n in known if n in _alike(name, [n for _, n in known])]
    if found := (near or same or far) if place.kind else (same or near or far):
        return f"unknown key; did you mean {' or '.join(f'{s}.{n}'.lstrip('.') for s, n in found)}?"
    return f"unknown key; the keys {f'of {section}' if section else 'here'} are {', '.join(siblings)}"


def _alike(name: str, names: Sequence[str]) -> list[str]:
    """Names with these initials (lr for learning_rate), else the closest spelling."""
    abbreviated = [n for n in names if name == "".join(word[0] for word in n.split("_"))]
    return abbreviated or difflib.get_close_matches(name, names, n=1)


class _Key(NamedTuple):
    section: str
    name: str
    kind: str | None
    """The kind of its section, where sections of several kinds may stand there."""


def _keys(model: type[BaseModel], section: str = "", kind: str | None = None) -> Iterator[_Key]:
    for name, field in model.model_fields.items():
        yield _Key(section, name, kind)
        inner = kinds_of(field)
        for inner_kind, inner_model in inner.items():
            yield from _keys(inner_model, f"{section}.{name}".lstrip("."), inner_kind if len(inner) > 1 else None)


def _description(key: str, model: type[BaseModel]) -> str:
    sections: list[type[BaseModel]] = [model]
    description = ""
    for part in key.split("."):
        # pydantic reports as missing only what a section declares
        field = next(s.model_fields[part] for s in sections if part in s.model_fields)
        sections = list(kinds_of(field).values())
        description = field.description or (sections[0].__doc__ if sections else "") or ""
    return description.strip()


Kinds = dict[str, type[BaseModel]]
"""Sections by their kind, where it matters; one alone has any name."""


def kinds_of(field: FieldInfo) -> Kinds:
    """The sections that a field may hold, by kind, also where it may be null; none for plain values."""
    return {str(section.__name__ if tag is None else tag): section for tag, section in _members(field.annotation, None)}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, the first kind where there are several; None for plain values."""
    return next(iter(kinds_of(field).values()), None)


def _members(annotation: Any, tag: str | None) -> Iterator[tuple[str | None, type[BaseModel]]]:
    match get_origin(annotation):
        case origin if origin is Annotated:
            inner, *metadata = get_args(annotation)
            yield from _members(inner, next((item.tag for item in metadata if isinstance(item, Tag)), tag))
        case origin if origin is UnionType or origin is Union:
            for choice in get_args(annotation):
                yield from _members(choice, tag)
        case _:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield tag, annotation


# ---- commented YAML -------------------------------------------------------------------------------------------------


def describe(section: BaseModel) -> str:
    """The section as YAML, each field under its description, values that differ from the default marked."""
    return "\n".join(_described(section)) + "\n"


def _described(section: BaseModel) -> Iterator[str]:
    for position, (name, field) in enumerate(type(section).model_fields.items()):
        value: object = getattr(section, name)
        inner = section_of(field)
        if inner is not None and position > 0:
            yield ""
        yield from _comment(field, inner)
        mark = _difference(value, field)
        if isinstance(value, BaseModel):
            yield f"{name}:{mark}"
            yield from (textwrap.indent(line, "  ") for line in _described(value))
        else:
            yield f"{name}: {_inline(value)}{mark}"
            if inner is not None:  # a section that is switched off: show what switching it on offers
                yield f"# {name}:"
                yield from (f"#   {line}" for line in _described(inner()))


def _comment(field: FieldInfo, inner: type[BaseModel] | None) -> Sequence[str]:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    text = field.description or (inner.__doc__ if inner else "") or ""
    if choices:
        text = f"{text} [{' | '.join(map(str, choices))}]"
    return textwrap.wrap(" ".join(text.split()), _COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ")


def _difference(value: object, field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default: object = field.get_default(call_default_factory=True)
    if value == default or isinstance(default, BaseModel):  # a section's own fields carry the marks
        return ""
    return f"  # default: {_inline(default)}"


def _inline(value: object) -> str:
    """The value in YAML on one line."""
    text = _flow(value, style=None)
    return text if len(text.splitlines()) == 1 else _flow(value, style='"')


def _flow(value: object, *, style: str | None) -> str:
    """A list of one in flow style, without its brackets: quoted as needed in any context."""
    written = yaml.safe_dump(
        [value], default_flow_style=True, default_style=style, width=10**9, allow_unicode=True, sort_keys=False
    )
    return written.strip()[1:-1]
