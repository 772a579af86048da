"""The diffs of docs/design.md ("Adding something"): applied to a copy of the source, they do what stands behind them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import selfsteer

ROOT = Path(__file__).parent.parent
SOURCE = Path(selfsteer.__file__).parent
EXAMPLES = re.findall(
    r"^\*\*(?:A|An) (\w+)\*\*.*?```diff\n(.*?)```\n\n```python\n(.*?)```",
    (ROOT / "docs/design.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE | re.DOTALL,
)


def apply(source: Path, diff: str) -> None:
    """Write what the diff says: lines with "+" stand behind the context line (" ") or in place of the removed one ("-")."""
    for name, body in re.findall(r"^\+\+\+ (\S+)\n(.*?)(?=^\+\+\+ |\Z)", diff, flags=re.MULTILINE | re.DOTALL):
        path = source / name
        if not path.exists():
            path.write_text("".join(line[1:] + "\n" for line in body.splitlines()), encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for before, context, after in re.findall(r"((?:^\+.*\n)*)((?:^[ -].*\n)+)((?:^\+.*\n)*)", body, flags=re.MULTILINE):
            found = "".join(line[1:] + "\n" for line in context.splitlines())
            kept = "".join(line[1:] + "\n" for line in context.splitlines() if line.startswith(" "))
            assert text.count(found) == 1, f"{name}: {found!r} stands there {text.count(found)} times"
            added = ["".join(line[1:] + "\n" for line in part.splitlines()) for part in (before, after)]
            text = text.replace(found, added[0] + kept + added[1])
        path.write_text(text, encoding="utf-8")


def test_every_kind_of_addition_is_shown():
    assert [name for name, _, _ in EXAMPLES] == ["loss", "engine", "judge", "measure", "evaluation"]


@pytest.mark.parametrize(("diff", "snippet"), [pytest.param(*rest, id=name) for name, *rest in EXAMPLES])
def test_an_addition_works(tmp_path: Path, diff: str, snippet: str):
    shutil.copytree(SOURCE, tmp_path / "selfsteer", ignore=shutil.ignore_patterns("__pycache__"))
    apply(tmp_path / "selfsteer", diff)
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests')!r}]\n{snippet}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
