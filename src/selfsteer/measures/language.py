"""What can be said of a text's sentences, script and language by rules and short word lists; nothing is learnt or loaded.

The words are in `templates/words.yaml`. Left out on purpose: learnt models (langdetect, Punkt), whose data would have to be
fetched; each function says what it cannot do.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import cast

import yaml

from selfsteer.measures.text import letters_by_script
from selfsteer.recipe.shipped import template

_LISTS = cast(dict[str, object], yaml.safe_load(template("words.yaml")))


def _listed(name: str) -> frozenset[str]:
    return frozenset(cast(str, _LISTS[name]).split())


# --- sentences -------------------------------------------------------------------------------------------------------------

CLOSERS = "\"'”’»›)]}*_`」』）】》〉"
"""What may stand between a sentence's last mark and the white space after it."""
_OPENERS = "\"'“”‘’«‹([{*_`#>-+•–—¿¡「『（【《〈 \t\n"
_WIDE_ENDS = "。！？｡．।॥۔؟።"
"""Marks that end a sentence whatever follows: no space stands after those of Chinese and Japanese."""
_END = re.compile(rf"[.!?…]+[{re.escape(CLOSERS)}]*(?=\s|$)|[{_WIDE_ENDS}][{_WIDE_ENDS}!?…]*[{re.escape(CLOSERS)}]*")
_BLOCK = re.compile(r"\n[^\S\n]*\n|\n(?=[^\S\n]*(?:[-*+•]|\d{1,3}[.)]|#{1,6})[^\S\n])")
"""A blank line, or the line break before a list item or a heading."""
_SPACED = re.compile(r"\b(?:z\. B|d\. h|u\. a|i\. e|e\. g|a\. m|p\. m)\.")
"""Abbreviations of two letters with a space between them."""
_NUMBER_OF_ITEM = re.compile(r"\d{1,3}|[IVX]{1,4}|[A-Za-z]")

_NEVER_LAST = _listed("never_last")
_TITLES = _listed("titles")
_BEFORE_NUMBER = _listed("before_number")
_SOMETIMES_LAST = _listed("sometimes_last")
_FIRST = _listed("first")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in its order.

    A sentence ends at . ! ? … (with quotes or brackets closed after it) before white space, at 。！？ and their kin, at a
    blank line and before a list item or heading, so that ten list items without full stops are ten sentences. A full
    stop ends nothing within decimals and addresses, after abbreviations, initials ("J. R. Smith") and the number of a list
    item, and no mark does where a small letter follows ("well... no", "Yahoo! was"), unless the whole text is in small ones.

    What it cannot: abbreviations that it does not know, before a capital; "vitamin C. Norway", which reads like an initial;
    a sentence that starts with a small letter ("iPhones sell."), or is a number of up to three digits alone ("42. It is.");
    texts without marks, such as Thai or poems; marks within code.
    """
    small = text == text.lower()
    found = (sentence for block in _BLOCK.split(text) for sentence in _sentences_of(block.strip(), small))
    return [sentence for sentence in found if any(map(str.isalnum, sentence))]


def _sentences_of(block: str, small: bool) -> Iterator[str]:
    start = 0
    for mark in _END.finditer(block):
        if mark[0][0] in _WIDE_ENDS or _ends(block, start, mark, small):
            yield block[start : mark.end()].strip()
            start = mark.end()
    yield block[start:].strip()


def _ends(block: str, start: int, mark: re.Match[str], small: bool) -> bool:
    """Whether a sentence that began at `start` ends at this mark."""
    # What stands around a mark is looked at through a window: time stays proportional to texts that consist of marks.
    before, after = block[max(start, mark.start() - 60) : mark.start()], block[mark.end() : mark.end() + 60].lstrip(_OPENERS)
    if not after:
        return True
    signs = mark[0].rstrip(CLOSERS)
    if after[0].islower() and (not small or ".." in signs or "…" in signs):
        return False
    return signs != "." or not _belongs_to(before, after, block[max(0, mark.start() - 4) : mark.end() + 3])


def _belongs_to(before: str, after: str, around: str) -> bool:
    """Whether a full stop between these is part of the word before it."""
    word = before.split()[-1].lstrip(_OPENERS) if before.strip() else ""
    lead = before.strip(_OPENERS).removesuffix(word).rstrip()
    if (not lead or lead[-1] == ":") and _NUMBER_OF_ITEM.fullmatch(word):
        return True
    folded = word.lower()
    if folded in _NEVER_LAST or _SPACED.search(around):
        return True
    if (folded in _TITLES and word[0].isupper()) or (folded in _BEFORE_NUMBER and after[0].isdigit()):
        return True
    initial = len(word) == 1 and word.isupper() and word != "I"  # in "so am I." it is none
    if folded in _SOMETIMES_LAST or initial:
        return re.split(r"[^\w']", after, maxsplit=1)[0].lower() not in _FIRST
    return False


# --- scripts and languages -------------------------------------------------------------------------------------------------

MAIN = 0.8
"""Share of a text's letters that makes it one of a script; names, code and quotations may take the rest."""

_JOINERS = "\u200c\u200d"
_CODE = re.compile(r"`[^`\n]+`")
_WRITTEN = re.compile(r"[^\s\d!-/:-@\[-`{-~…।،؛؟“”„«»–—]+")
"""A word with its vowel signs: whatever is neither white space, digit nor punctuation."""


def words(text: str) -> list[str]:
    r"""Runs of \w, as IFEval counts them: "don't" is two words, a stretch of Chinese is one.

    Accents and vowel signs that stand on their own in Unicode belong to their letter, which \w does not know.
    """
    if not text.isascii():
        composed = unicodedata.normalize("NFC", text)
        text = "".join(sign for sign in composed if not unicodedata.category(sign).startswith("M") and sign not in _JOINERS)
    return re.findall(r"\w+", text)


def prose(text: str) -> str:
    """The text without code in Markdown's ticks, which is in no language; all of it where nothing else is said."""
    outside = _CODE.sub(" ", " ".join(text.split("```")[::2]))
    return outside if any(map(str.isalpha, outside)) else text


_WORDS = {
    script: {code: frozenset(listed.split()) for code, listed in languages.items()}
    for script, languages in cast(dict[str, dict[str, str]], _LISTS["languages"]).items()
}
_SCRIPT_OF = {code: script for script, languages in _WORDS.items() for code in languages} | cast(
    dict[str, str], _LISTS["alone"]
)
SCRIPTS = tuple(sorted(set(_SCRIPT_OF.values())))
"""Names that `not_in_script` knows, those of Unicode in small letters."""
LANGUAGES = tuple(sorted(_SCRIPT_OF))
"""ISO 639-1 codes that `not_in_language` knows."""


def not_in_script(text: str, script: str) -> str | None:
    """Why fewer than `MAIN` of a text's letters, code aside, are of this script, None where they are."""
    found = letters_by_script(prose(text))
    if not found:
        return "no letters"
    if found[script.upper()] >= MAIN * found.total():
        return None
    most = max(sorted(found), key=lambda name: found[name]).lower()
    return f"written in {most}" if most != script else f"{found[script.upper()]} of {found.total()} letters are {script}"


def not_in_language(text: str, language: str) -> str | None:
    """Why a text is not in this language, None where it is, by script and frequent words.

    Of languages that share a script the one with the most of its frequent words in the text wins, by at least two words:
    shorter texts, such as a name, pass by their script alone, and one without letters passes, as in IFEval. Relatives
    (Danish and Norwegian) are told apart only in longer texts, languages outside `LANGUAGES` are taken for a neighbour or
    pass, and a foreign sentence in a long text goes unseen.
    """
    if not any(map(str.isalpha, text)):
        return None
    script = _SCRIPT_OF[language]
    if reason := not_in_script(text, script):
        return reason
    if script not in _WORDS:
        return None
    found = Counter(_WRITTEN.findall(unicodedata.normalize("NFC", prose(text)).lower()))
    hits = {code: sum(found[word] for word in known) for code, known in _WORDS[script].items()}
    likeliest = max(hits, key=lambda code: hits[code])
    return f"reads like {likeliest!r}" if hits[likeliest] - hits[language] >= 2 else None
