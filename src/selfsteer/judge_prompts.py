"""What an LLM judge is asked: one prompt a pair and order, in which the texts to be judged cannot speak for themselves.

The prompt is a template of its own (`templates/judge_pairwise.txt`, or a file). Left out on purpose: asking and reading
answers (`judges.py`).
"""

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from selfsteer.durable import digest
from selfsteer.prompts import Prompts
from selfsteer.records import Message, PreferencePair

FIRST, SECOND = "A", "B"
"""The closed set of answers: the response shown first is better, or the second."""

_PLACES = ("fence", "request", "first", "second")
_PLACE = re.compile(r"\{(" + "|".join(_PLACES) + r")\}")
_SHORTEST_FENCE = 8


def judge_template(path: Path | None = None) -> str:
    """The built-in pairwise prompt, or a file's. ValueError, naming them, when places are missing."""
    if path is None:
        return _built_in_template()
    text = path.read_text(encoding="utf-8")
    missing = [place for place in _PLACES if f"{{{place}}}" not in text]
    if missing:
        raise ValueError(
            f"{path}: a judge's template needs the places {{fence}}, {{request}}, {{first}} and {{second}}; {missing} are"
            f" missing. It must ask for exactly {FIRST} or {SECOND}."
        )
    return text


@cache
def _built_in_template() -> str:
    return resources.files("selfsteer").joinpath("templates", "judge_pairwise.txt").read_text(encoding="utf-8")


def judge_messages(template: str, prompt: Iterable[Message], first: str, second: str) -> tuple[Message, ...]:
    """The judge's prompt. What it is to judge stands between marks with a code that occurs in none of these texts.

    Texts are filled in at once, so that a place named in one of them stays as it is.
    """
    request = _request_text(tuple(prompt))
    texts = {"request": request, "first": first, "second": second}
    filled = texts | {"fence": _fence(request, first, second)}
    return (Message(role="user", content=_PLACE.sub(lambda place: filled[place[1]], template)),)


def _fence(*texts: str) -> str:
    """A code that no text contains; the same in both orders of the responses. Its digits follow from the texts themselves:
    no response can hold the code of a prompt that it is part of.
    """
    code = digest(sorted(texts))
    length = _SHORTEST_FENCE
    while any(code[:length] in text for text in texts):
        length += 1
        assert length <= len(code), "a text contains its own sha256"
    return code[:length]


def _request_text(prompt: tuple[Message, ...]) -> str:
    """The user's turn alone, or the whole conversation with the role before every turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


class BothOrders(NamedTuple):
    """One question, asked with the chosen response first and with it second."""

    chosen_first: tuple[Message, ...]
    chosen_second: tuple[Message, ...]


def questions(template: str, pair: PreferencePair) -> BothOrders:
    """The judge's prompts for a pair."""
    return BothOrders(
        judge_messages(template, pair.prompt, pair.chosen, pair.rejected),
        judge_messages(template, pair.prompt, pair.rejected, pair.chosen),
    )


def refusal(asked: BothOrders, prompts: Prompts, limit: int) -> str | None:
    """Why a judge with this tokenizer must not be asked, or None."""
    for messages in asked:
        reason = prompts.quarantine_reason(messages)
        if reason is not None:
            return reason
        if len(prompts.prompt_ids(messages)) > limit:
            return "too long for the judge"
    return None
