"""Does a response use the writing system of its query? A coarse look for answers in the wrong language.

Only scripts are told apart: French for an English query goes unseen, and a translation that was asked for counts as a
mismatch. So it compares sets of pairs better than it judges a row. Left out on purpose: language models and word lists.
"""

import string
import unicodedata
from collections import Counter
from functools import lru_cache

LETTERS = 10
"""With fewer letters a text has no script to speak of."""
MAIN = 0.8
"""Share of a query's letters that makes a script the query's own; mixed queries are not judged."""
LOST = 0.2
"""A response whose letters are to a smaller share of the query's script has left it; code and names may take the rest."""

_ASCII_LETTERS = string.ascii_letters.encode()


def script_mismatch(query: str, response: str) -> bool | None:
    """Whether the response has left the query's script; None where the query mixes scripts or either has too few letters."""
    asked, answered = _scripts(query), _scripts(response)
    if asked.total() < LETTERS or answered.total() < LETTERS:
        return None
    [(script, letters)] = asked.most_common(1)
    if letters < MAIN * asked.total():
        return None
    return answered[script] < LOST * answered.total()


@lru_cache(maxsize=16)  # the query is asked about once for each of its responses
def _scripts(text: str) -> Counter[str]:
    """Letters of the text by script."""
    found: Counter[str] = Counter()
    if text.isascii():  # most are, and counting bytes is fast
        letters = len(text) - len(text.encode().translate(None, _ASCII_LETTERS))
        return Counter(LATIN=letters) if letters else found
    # Full-width and mathematical letters count as what they look like. Each character is looked up once: texts are long.
    for character, count in Counter(unicodedata.normalize("NFKC", text)).items():
        if character.isalpha():
            found[_script(character)] += count
    if "KANA" in found:  # Japanese is written in both; without kana the characters are Chinese
        found["KANA"] += found.pop("CJK", 0)
    return found


@lru_cache(maxsize=2**16)
def _script(character: str) -> str:
    """The script by the character's name, as in LATIN SMALL LETTER A or CJK UNIFIED IDEOGRAPH-4E00."""
    first = unicodedata.name(character, "UNKNOWN").split(" ")[0].split("-")[0]
    return "KANA" if first in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else first
