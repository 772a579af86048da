"""The page in a real browser: what a person does with it, at both widths, with hostile text everywhere."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from chromium import BINARY, Page, chromium
from report_builders import metrics

from selfsteer.records import Message, Pair, Principles, side
from selfsteer.reports.page import differences, json_text, write_page
from selfsteer.reports.reading import DroppedEntry, Entry, PairSet, Reading, entry

HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src=x onerror='hacked = 1'> \u2028 \u2029 ${x} \"'"
QUALITIES = ("accuracy", "clarity", f"<b>{HOSTILE}")


def pair(number: int) -> Entry:
    """Margin, length and on-policy probability grow with the number; every third one is cut off, every fifth reversed."""
    principles = Principles(good=f"Be good {HOSTILE}", bad="Be bad.", quality=QUALITIES[number % 3], source="library")
    tokens = 10 + number
    made = Pair(
        query_id=f"{number:04x}",
        kind="alignment",
        prompt=(Message(role="user", content=f"Question {number} {HOSTILE}"),),
        chosen=replace(side(f"The chosen one of {number}. {HOSTILE}"), logps=-tokens / (1 + number), tokens=tokens),
        rejected=replace(
            side(f"The rejected one of {number}. {HOSTILE}", "length" if number % 3 == 0 else "stop"), logps=-40.0, tokens=10
        ),
        principles=principles,
    )
    found = entry(made)
    found["verdict"] = "rejected" if number % 5 == 0 else "chosen"
    found["chosen"]["why_not"] = "too long" if number % 5 == 0 else ""
    found["rejected"]["why_not"] = "" if number % 5 == 0 else f"too short {HOSTILE}"
    return found


def reading(number: int = 60) -> Reading:
    dropped = [
        DroppedEntry(id=f"d{n}", stage="3-steering", reason=("empty response", HOSTILE)[n % 2], detail=HOSTILE, query="Why?")
        for n in range(6)
    ]
    answer: dict[str, Any] = {
        "messages": [{"role": "user", "content": HOSTILE}],
        "principles": {"good": HOSTILE},
        "before": {"text": f"one two {HOSTILE}", "finish_reason": "stop"},
        "after": {"text": f"one three {HOSTILE}", "finish_reason": "stop"},
        "before_why_not": [HOSTILE],
        "after_why_not": [None],
    }
    return Reading(
        sets=[
            PairSet("generator pairs", "pair", 2 * number, [pair(n) for n in range(number)]),
            PairSet("PBAA pairs", "pbaa", 10, [pair(n) for n in range(10)]),
        ],
        dropped=dropped,
        dropped_of=900,
        answers=[answer],
        turned=(3, 1),
        recipe=f"policy: {HOSTILE}",
    )


def written(folder: Path, found: Reading) -> Path:
    this = metrics()
    this["run"].update(name=f"run {HOSTILE}", model=f"model {HOSTILE}", folder=f"runs/{HOSTILE}")
    write_page(folder / "report.html", this, found)
    return folder / "report.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page"), reading())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if BINARY is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, path: Path) -> Iterator[Page]:
    browser.events.clear()
    browser.open(path)
    yield browser
    assert browser.complaints() == []


# --- without a browser ----------------------------------------------------------------------------------------------------


def test_the_policy_allows_one_script_and_it_is_that_of_the_page(path: Path):
    text = path.read_text(encoding="utf-8")
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    [script] = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert [part.strip() for part in policy.split(";")] == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
        f"script-src 'sha256-{digest}'",
    ]
    assert len(re.findall("<script", text)) == 2
    assert len(re.findall("<!--", text)) == 0


def test_data_is_the_same_behind_its_escapes():
    data = {"text": HOSTILE, "more": "& é 😀 \\"}
    text = json_text(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028\u2029") & set(text)


def test_word_differences_are_escaped_and_leave_the_text_as_it_is():
    first, second = differences("a <b> c\n\nd", " a x c\n\nd e")
    assert first == "a <del>&lt;b&gt;</del> c\n\nd"
    assert second == " a <ins>x</ins> c\n\nd <ins>e</ins>"
    long = "word " * 3001
    assert differences("", "<i>") == ("", "<ins>&lt;i&gt;</ins>")
    assert differences(long, "<") == (long, "&lt;")


def test_a_page_of_2000_pairs_is_below_5_megabytes(tmp_path: Path):
    """Of about 100 tokens a response, no two alike."""
    sentence = "The lighthouse keeper number {} wrote down what the waves said to the rocks that night, {} of them. "

    def long(number: int) -> Entry:
        found = pair(number)
        for which in ("chosen", "rejected"):
            found[which]["text"] = "".join(sentence.format(number, n) for n in range(5))
        return found

    sets = [PairSet("generator pairs", "pair", 2000, [long(n) for n in range(2000)])]
    assert written(tmp_path, Reading(sets=sets)).stat().st_size < 5_000_000


# --- in a browser ---------------------------------------------------------------------------------------------------------

ARTICLES = "[...document.querySelectorAll('#list article')]"


def choose(page: Page, control: str, value: str) -> list[str]:
    """Set a control as a person does; returns the anchors of the rows on the page."""
    page.js(f"(() => {{ const node = {control}; node.value = {json.dumps(value)}; fire(node); }})()")
    return anchors(page)


def anchors(page: Page) -> list[str]:
    return page.js(f"{ARTICLES}.map((node) => node.id)")


@pytest.fixture
def acting(page: Page) -> Page:
    page.js("window.fire = (node) => node.dispatchEvent(new Event('input', {bubbles: true}))")
    return page


def test_it_opens_without_a_complaint_and_nothing_hostile_runs(page: Page, path: Path):
    assert page.js("document.getElementById('count').textContent") == "60 of 60, a sample of 120"
    assert page.js("typeof window.hacked") == "undefined"
    assert page.js("document.querySelectorAll('img').length") == 0
    shown = page.js(f"{ARTICLES}[0].textContent")
    assert HOSTILE in shown
    assert page.addresses() == [path.as_uri()]


def test_a_script_that_found_its_way_in_is_refused(page: Page):
    page.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))")
    assert page.js("typeof window.hacked") == "undefined"
    [complaint] = page.complaints()
    assert "Content Security Policy" in complaint
    page.events.clear()


def test_search_filters_and_order(acting: Page):
    assert choose(acting, "search", "ONE OF 17.") == ["pair-0011"]
    assert choose(acting, "search", "") == [f"pair-{n:04x}" for n in range(20)]
    assert choose(acting, "quality", "clarity")[:3] == ["pair-0001", "pair-0004", "pair-0007"]
    choose(acting, "quality", QUALITIES[2])
    assert acting.js("document.getElementById('count').textContent") == "20 of 60, a sample of 120"
    acting.js("document.getElementById('clear').click()")
    assert choose(acting, "cut", "rejected")[:3] == ["pair-0000", "pair-0003", "pair-0006"]
    assert choose(acting, "cut", "chosen") == []
    choose(acting, "cut", "")
    assert choose(acting, "verdict", "rejected")[:2] == ["pair-0000", "pair-0005"]
    assert choose(acting, "checks", "reversed")[:2] == ["pair-0000", "pair-0005"]
    assert choose(acting, "checks", "win") == []
    acting.js("document.getElementById('clear').click()")
    for order in ("margin down", "length down", "longer down", "probability down"):
        assert choose(acting, "sort", order)[0] == f"pair-{59:04x}"
    for order in ("margin up", "length up", "probability up"):
        assert choose(acting, "sort", order)[0] == "pair-0000"


def test_the_other_sets_and_dropped_rows(acting: Page):
    acting.js("document.querySelectorAll('input[name=set]')[1].click()")
    assert anchors(acting) == [f"pbaa-{n:04x}" for n in range(10)]
    acting.js("document.querySelectorAll('input[name=set]')[2].click()")
    assert acting.js("document.getElementById('count').textContent") == "6 of 6, a sample of 900"
    assert choose(acting, "reason", HOSTILE) == ["dropped-2", "dropped-4", "dropped-6"]
    assert acting.js("document.getElementById('verdict').closest('label').hidden") is True


def test_links_and_keys(acting: Page):
    acting.js("location.hash = '#pair-0030'")  # the 49th: beyond those drawn first
    assert acting.js("document.activeElement.id") == "pair-0030"
    acting.press("j")
    assert acting.js("[document.activeElement.id, location.hash].join()") == "pair-0031,#pair-0031"
    acting.press("k")
    acting.press("k")
    assert acting.js("document.activeElement.id") == "pair-002f"
    choose(acting, "quality", "clarity")
    acting.js("location.hash = '#pbaa-0003'")  # in another set, and not of this quality
    assert acting.js("document.activeElement.id") == "pbaa-0003"
    acting.press("/")
    assert acting.js("document.activeElement.id") == "search"
    acting.press("j")
    assert acting.js("search.value") == "j"


def test_the_rest_is_shown_when_asked(page: Page):
    for number in (40, 60):
        page.js("more.click()")
        assert len(anchors(page)) == number
    assert page.js("more.hidden") is True


def test_word_differences(acting: Page):
    acting.js("differences.click()")
    assert acting.js("document.querySelector('#list ins').textContent") == "chosen"
    assert acting.js("document.querySelector('#list del').textContent") == "rejected"
    whole = acting.js("document.querySelector('#list .chosen .text').textContent")
    assert whole == f"The chosen one of 0. {HOSTILE}"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Page, path: Path, width: int):
    browser.events.clear()
    browser.open(path, width=width)
    browser.js("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelector('figure svg').getBoundingClientRect().width") <= width


def test_every_control_has_a_name(page: Page):
    unnamed = (
        "[...document.querySelectorAll('input, select')].filter((node) => !node.labels.length).length"
        " + [...document.querySelectorAll('button')].filter((node) => !node.textContent.trim()).length"
    )
    assert page.js(unnamed) == 0
