"""The documentation: every page stands in the navigation, every link leads somewhere, and the site builds strictly."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import selfsteer
from selfsteer.cli import app
from selfsteer.recipe import sections
from selfsteer.recipe.text import kinds_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

_spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
assert _spec is not None
assert _spec.loader is not None
GENERATED: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(GENERATED)


def pages_of(nav: Any) -> Iterator[str]:
    """The pages of a navigation, as mkdocs.yml nests it."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for inner in nav.values():
            yield from pages_of(inner)
    else:
        for inner in nav:
            yield from pages_of(inner)


NAV = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def outside_code(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page that are no code, with their numbers."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def test_every_page_is_in_the_navigation_once():
    assert sorted(NAV) == sorted([*(page.relative_to(DOCS).as_posix() for page in PAGES), *GENERATED.PAGES])


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path):
    links = [(number, link) for number, line in outside_code(page) for link in re.findall(r"\]\(([^)#\s]+)", line)]
    made = {(DOCS / name).resolve() for name in GENERATED.PAGES}
    lost = [
        (number, link)
        for number, link in links
        if "://" not in link and not (page.parent / link).exists() and (page.parent / link).resolve() not in made
    ]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_and_tables_stand_apart(page: Path):
    """Python-Markdown, unlike others, runs a list or a table that follows a line of text into its paragraph."""
    swallowed, before = [], ""
    for number, line in outside_code(page):
        starts = re.match(r"([-*]|\d+\.) |\|", line)
        if starts and before.strip() and not re.match(r"\s*(([-*]|\d+\.) |\|)|\s", before):
            swallowed.append((number, line))
        before = line
    assert swallowed == []


@pytest.mark.parametrize("name", GENERATED.PAGES)
def test_generated_pages_leave_nothing_undescribed(name: str):
    """Fields of the run folder that their names describe aside, every row of every table says what it is."""
    text = GENERATED.PAGES[name]()
    assert name == "reference/run-folder.md" or not re.findall(r"^\|.*\|\s+\|$", text, flags=re.MULTILINE)


def test_every_key_of_a_recipe_is_on_its_page():
    page = GENERATED.PAGES["reference/recipe.md"]()
    keys = [line.strip().split(":")[0] for line in sections.describe(sections.load("quickstart")).splitlines()]
    names = {key for key in keys if re.fullmatch(r"[a-z_]+", key)}
    assert [key for key in names if not re.search(rf"\b{key}\b", page)] == []


def commands() -> Iterator[tuple[str, str]]:
    """Every `selfsteer ...` in the code of a page, without what stands behind two spaces and more."""
    for page in (ROOT / "README.md", *PAGES):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4})?(selfsteer [a-z].*)$", text, flags=re.MULTILINE):
            yield page.name, re.split(r"\s{2,}(?!--|\w+=)", line)[0]


def is_key(dotted: str) -> bool:
    """Whether a recipe has this key."""
    found: list[Any] = [sections.Recipe]
    for name in dotted.split("."):
        fields = [model.model_fields[name] for model in found if name in model.model_fields]
        if not fields:
            return False
        found = [model for field in fields for model in kinds_of(field).values()]
    return True


@pytest.mark.parametrize(("page", "line"), [pytest.param(*each, id=f"{each[0]}-{n}") for n, each in enumerate(commands())])
def test_commands_of_the_pages_exist(page: str, line: str):
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line, comments=True)
    options = {option for each in group.commands[name].params for option in each.opts}
    assert [each for each in arguments if each.startswith("--") and each.split("=")[0].strip("[]") not in options] == []
    keys = [found[1] for each in arguments if (found := re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", each))]
    assert [key for key in keys if not is_key(key)] == []


SNIPPETS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in (ROOT / "README.md", *PAGES)
    for number, text in enumerate(re.findall(r"^```yaml[^\n]*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("text", SNIPPETS)
def test_pieces_of_recipes_are_recipes(text: str):
    """Each fenced piece of YAML is valid beside a model, queries, and what some settings need."""
    recipe: dict[str, Any] = {"policy": {"model": "m"}, "queries": {"path": "q.jsonl"}, "training": {"lora": {}}}
    recipe["quality"] = {"evaluation_files": ["e.jsonl"]}
    for name, section in yaml.safe_load(text).items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    recipe.setdefault("judge", {"kind": "reward_model", "model": "j"})
    sections.Recipe.model_validate(recipe)


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    messages = re.findall(
        r"^\| (?:… )?`([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in Path(selfsteer.__file__).parent.rglob("*.py"))
    said = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [text for text in said if isinstance(text, str)]
    assert len(messages) >= 20
    assert [message for message in messages if not any(message in text for text in texts)] == []


def test_the_site_builds_strictly(tmp_path: Path):
    if importlib.util.find_spec("material") is None:
        pytest.skip("needs the extra selfsteer[docs]; `make docs` builds the site")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "index.html").is_file()
