"""A judge that is code: which response passes the checks of the principle that its pair was sampled under.

    chosen passes, rejected does not   margin 1        both pass, or neither   margin 0, a tie
    rejected passes, chosen does not   margin -1       no check                no verdict

Exact, free and the same every time, where what is asked for can be checked at all. Left out on purpose: the checks
themselves (`measures/checks.py`).
"""

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache

from selfsteer.measures.checks import Check, Passes, parse, why_not
from selfsteer.measures.verdicts import Verdict, by_margin, failure
from selfsteer.records import Pair

NO_CHECK = "its principle has no check"


@lru_cache(maxsize=2**12)
def checks_of(texts: tuple[str, ...]) -> tuple[Check, ...]:
    """The checks of `Principles.checks`."""
    return tuple(parse(json.loads(text), "a sealed row") for text in texts)


def passes(pair: Pair) -> Passes | None:
    """Whether either response passes all checks of the pair's principle; None where it has none."""
    checks = () if pair.principles is None else checks_of(pair.principles.checks)
    if not checks:
        return None
    return Passes(why_not(checks, pair.chosen.text) is None, why_not(checks, pair.rejected.text) is None)


def checks_verdicts(pairs: Iterable[Pair]) -> Iterator[Verdict]:
    """A verdict for every pair, in order."""
    for pair in pairs:
        found = passes(pair)
        yield failure(pair, NO_CHECK) if found is None else by_margin(pair, float(found.chosen) - float(found.rejected))
