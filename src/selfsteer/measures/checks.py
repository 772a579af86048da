"""Checks: what code can decide about a response, exactly and without a judge.

A check is a plain function that answers *why not*: None where the response passes, else a short reason. `CHECKS` is the one
table of them. In a principle file or the library a check is written as
`{"name": "length_constraints:number_words", "relation": "at most", "num_words": 40}`, or as the name alone where it takes no
parameters. A response without any visible character passes no check, as in IFEval.

Names and parameters are those of IFEval (arXiv 2311.07911) where it has the check, `selfsteer:` marks our own. The meaning
is IFEval's, too; each function says where it differs. For all of them: words given as parameters are taken literally (IFEval
reads some as regular expressions), the relations "at most", "more than" and "exactly" stand beside IFEval's "less than" and
"at least", and time is proportional to the text, since degenerate models write long ones.

Left out on purpose: regular expressions of users (a careless one takes forever; `selfsteer:like` covers what is asked for
most), and whatever needs a model to decide.
"""

# ruff: noqa: TRY004 (a wrong type within a file is a wrong value to whoever passes the file)

import difflib
import json
import operator
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict, cast

from selfsteer.measures.estimates import Estimate, known, share_estimate
from selfsteer.measures.language import CLOSERS, LANGUAGES, SCRIPTS, not_in_language, not_in_script, sentences, words
from selfsteer.measures.text import script_of

Value = str | int | tuple[str, ...]
"""What a parameter can be."""


# --- a check of a principle ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One entry of `CHECKS` with its parameters; `parse` makes it."""

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()
    """By name, sorted."""

    def as_json(self) -> str:
        """Canonical: equal checks give equal text, for digests and files; `parse(json.loads(...))` reads it."""
        content = {"name": self.name, **dict(self.parameters)}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @property
    def label(self) -> str:
        """For people: the name and the parameters' values, in the order of `CHECKS`."""
        rule, given = CHECKS[self.name], dict(self.parameters)
        values = [given[key] for key in (*rule.required, *rule.optional) if key in given]
        shown = [", ".join(map(repr, value)) if isinstance(value, tuple) else str(value) for value in values]
        return " ".join((self.name, *shown))

    def why_not(self, text: str) -> str | None:
        """Why this response does not pass, or None where it does."""
        if not text.strip():
            return "empty"
        return CHECKS[self.name].why_not(text, **dict(self.parameters))


def why_not(checks: Iterable[Check], text: str) -> str | None:
    """The first reason why the response does not pass all of the checks, or None where it does."""
    reasons = (check.why_not(text) for check in checks)
    return next((reason for reason in reasons if reason is not None), None)


def parse(value: object, place: str) -> Check:
    """The check that a user wrote, `place` being where. Raises ValueError where the name or a parameter is wrong."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError(f'{place}: a check is {{"name": ..., and its parameters}}, found {_shown(value)}')
    given = dict(cast(Mapping[str, object], value))
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in CHECKS:
        raise ValueError(f"{place}: {_unknown(name)}")
    rule = CHECKS[name]
    parameters: dict[str, Value] = {}
    for key, content in given.items():
        if key not in rule.required and key not in rule.optional:
            raise ValueError(f"{place}: the check {name!r} has no parameter {key!r}; {rule.takes()}")
        kind = rule.required.get(key) or rule.optional[key]
        content = tuple(cast(list[object], content)) if isinstance(content, list) else content
        if not kind.fits(content):
            raise ValueError(f"{place}: {key!r} of the check {name!r} must be {kind.expects}, found {_shown(content)}")
        parameters[key] = cast(Value, content)
    if missing := [key for key in rule.required if key not in parameters]:
        raise ValueError(f"{place}: the check {name!r} lacks {' and '.join(map(repr, missing))}; {rule.takes()}")
    if contradiction := _contradiction(parameters):
        raise ValueError(f"{place}: the check {name!r} {contradiction}")
    return Check(name=name, parameters=tuple(sorted(parameters.items())))


def parse_all(row: Mapping[str, object], place: str) -> tuple[Check, ...]:
    """The checks of a row that may have "check" (one) or "checks" (a list, all of which must pass); none without either."""
    if row.get("check") is not None and row.get("checks") is not None:
        raise ValueError(f'{place}: both "check" and "checks"; put all of them into the list "checks"')
    if row.get("check") is not None:
        return (parse(row["check"], place),)
    values = row.get("checks")
    if values is None:
        return ()
    if not isinstance(values, list) or not values:
        raise ValueError(
            f'{place}: "checks" is a list of one or more checks, found {_shown(values)}; one alone goes into "check"'
        )
    return tuple(parse(value, place) for value in cast(list[object], values))


def _unknown(name: object) -> str:
    if name is None:
        return 'a check needs a "name", such as "length_constraints:number_words"'
    by_last = {known.split(":")[1]: known for known in CHECKS}  # the group in front is what people forget
    asked = str(name)
    near = difflib.get_close_matches(asked, CHECKS, n=3) + [
        by_last[last] for last in difflib.get_close_matches(asked.split(":")[-1], by_last, n=3)
    ]
    nearest = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"known: {', '.join(CHECKS)}"
    return f"there is no check {asked!r}; {hint}"


def _contradiction(parameters: Mapping[str, Value]) -> str | None:
    """Why no response can pass, or none can fail."""
    nth, paragraphs = parameters.get("nth_paragraph"), parameters.get("num_paragraphs")
    if isinstance(nth, int) and isinstance(paragraphs, int) and nth > paragraphs:
        return f"asks for paragraph {nth} of {paragraphs}; nth_paragraph is at most num_paragraphs"
    if 0 not in parameters.values():
        return None
    if "at least" in parameters.values():
        return 'is passed by every response: "at least" 0; ask for 1 or more, or leave the check out'
    if "less than" in parameters.values():
        return 'is passed by no response: "less than" 0; "at most" 0 asks for none'
    return None


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


# --- what a check says of pairs --------------------------------------------------------------------------------------------


class Passes(NamedTuple):
    """Whether either response of a pair passes the checks of its principle."""

    chosen: bool
    rejected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Pairs by what the checks say of their two responses."""

    wins: int
    """Chosen passes and rejected does not."""
    losses: int
    """Rejected passes and chosen does not."""
    both_pass: int
    both_fail: int

    @property
    def pairs(self) -> int:
        """How many were counted."""
        return self.wins + self.losses + self.both_pass + self.both_fail


def tally(pairs: Iterable[Passes]) -> Tally:
    """Count the pairs."""
    counts = Counter((bool(chosen), bool(rejected)) for chosen, rejected in pairs)
    return Tally(
        wins=counts[True, False], losses=counts[False, True], both_pass=counts[True, True], both_fail=counts[False, False]
    )


ENOUGH = 5
"""With fewer pairs, "never" and "always" say nothing about a check."""


def useless(counts: Tally) -> str | None:
    """Why a check cannot tell the two responses of these pairs apart, for people; None where it can, or with few pairs.

    A check that chosen never passes, or rejected always, makes no pair a win. It asks for what the model cannot do, or for
    what it does anyway.
    """
    if counts.pairs < ENOUGH:
        return None
    if counts.wins + counts.both_pass == 0:
        both = " and no rejected one" if counts.losses == 0 else ""
        return f"no chosen response{both} of {counts.pairs} pairs passes"
    if counts.both_pass + counts.losses == counts.pairs:
        both = "every chosen and " if counts.losses == 0 else ""
        return f"{both}every rejected response of {counts.pairs} pairs passes"
    return None


class Outcome(NamedTuple):
    """What the checks of its principle say of one pair."""

    principle: str
    checks: tuple[str, ...]
    """As in `Principles`."""
    passes: Passes | None
    """None where the principle has no check."""


class PrincipleChecks(TypedDict):
    """The pairs of one principle."""

    principle: str
    checks: list[str]
    pairs: int
    chosen: int
    """Chosen responses that pass."""
    rejected: int
    useless: NotRequired[str]
    """Why its checks cannot tell the two responses apart."""


class CheckReport(TypedDict, total=False):
    """What checks say of a set of pairs. Shares are of the pairs whose principle has checks."""

    pairs: int
    unchecked: int
    """Pairs beside those, whose principle has none."""
    chosen: Estimate
    """Share of chosen responses that pass all checks of their principle."""
    rejected: Estimate
    original: Estimate
    """Share of the policy's own answers to the bare query; of steering pairs, where they have such answers."""
    win: Estimate
    """Share of pairs whose chosen response passes and whose rejected one does not."""
    loss: Estimate
    both_pass: Estimate
    both_fail: Estimate
    principles: list[PrincipleChecks]
    """Those with enough pairs to say something, the most frequent first."""


def check_report(outcomes: Iterable[Outcome]) -> CheckReport:
    """Every number that the outcomes allow."""
    by_principle: defaultdict[tuple[str, tuple[str, ...]], list[Passes]] = defaultdict(list)
    unchecked = 0
    for outcome in outcomes:
        if outcome.passes is None:
            unchecked += 1
        else:
            by_principle[outcome.principle, outcome.checks].append(outcome.passes)
    every = tally(found for each in by_principle.values() for found in each)
    hits = {
        "chosen": every.wins + every.both_pass,
        "rejected": every.losses + every.both_pass,
        "win": every.wins,
        "loss": every.losses,
        "both_pass": every.both_pass,
        "both_fail": every.both_fail,
    }
    shares = known({name: share_estimate(count, every.pairs) for name, count in hits.items()})
    listed = sorted(by_principle.items(), key=lambda item: (-len(item[1]), item[0]))
    principles = [_principle(*key, found) for key, found in listed if len(found) >= ENOUGH]
    return cast(CheckReport, {"pairs": every.pairs, "unchecked": unchecked, **shares, "principles": principles})


def _principle(principle: str, checks: tuple[str, ...], found: Sequence[Passes]) -> PrincipleChecks:
    counts = tally(found)
    row = PrincipleChecks(
        principle=principle,
        checks=list(checks),
        pairs=counts.pairs,
        chosen=counts.wins + counts.both_pass,
        rejected=counts.losses + counts.both_pass,
    )
    reason = useless(counts)
    if reason is not None:
        row["useless"] = reason
    return row


# --- IFEval's checks -------------------------------------------------------------------------------------------------------

RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "less than": operator.lt,
    "at most": operator.le,
    "exactly": operator.eq,
    "at least": operator.ge,
    "more than": operator.gt,
}


def _off(count: int, relation: str, bound: int, noun: str) -> str | None:
    return None if RELATIONS[relation](count, bound) else f"{count} {noun} instead of {relation} {bound}"


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def number_words(text: str, *, relation: str, num_words: int) -> str | None:
    """By `words`: "don't" is two, a stretch of Chinese one (`number_characters` serves there), as in IFEval.

    IFEval also counts signs without a letter that Unicode adds to some emoji.
    """
    return _off(len(words(text)), relation, num_words, "words")


def number_sentences(text: str, *, relation: str, num_sentences: int) -> str | None:
    """By `sentences`; IFEval asks NLTK's learnt Punkt model, which joins list items and headings without full stops."""
    return _off(len(sentences(text)), relation, num_sentences, "sentences")


def number_paragraphs(text: str, *, num_paragraphs: int, relation: str = "exactly") -> str | None:
    """Paragraphs divided by the Markdown divider ***, as IFEval has it; `number_blocks` counts those of blank lines."""
    parts = [bool(part.strip()) for part in text.split("***")]
    if not all(parts[1:-1]):
        return "an empty paragraph"
    return _off(sum(parts), relation, num_paragraphs, "paragraphs")


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> str | None:
    """So many paragraphs between blank lines, the n-th of which starts with this word, whatever its case.

    IFEval counts an empty paragraph on the way to the n-th, and knows only quotes before and . , ? ! ' " after the word;
    here anything may stand there that is no letter, such as ** or a colon.
    """
    paragraphs = _blocks(text)
    if reason := _off(len(paragraphs), "exactly", num_paragraphs, "paragraphs"):
        return reason
    paragraph = _fold(paragraphs[nth_paragraph - 1])
    bare = re.sub(r"^[\W_]+", "", paragraph)
    if re.match(re.escape(_fold(first_word.strip())) + r"(?![^\W_]|-)", bare):
        return None
    return f"paragraph {nth_paragraph} starts with {(bare.split() or [''])[0][:20]!r}"


def _blocks(text: str) -> list[str]:
    return [block for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]


def no_comma(text: str) -> str | None:
    """No comma of any script; IFEval looks for "," alone."""
    found = sum(text.count(comma) for comma in ",，、،﹐﹑､")
    return f"{found} commas" if found else None


def english_lowercase(text: str) -> str | None:
    """No capital letter, and English by `not_in_language`; IFEval asks the langdetect package."""
    capitals = sum(character.isupper() for character in text)
    if capitals or not any(map(str.islower, text)):
        return f"{capitals} capital letters" if capitals else "no small letter"
    return not_in_language(text, "en")


def english_capital(text: str) -> str | None:
    """No small letter, and English by `not_in_language`; IFEval asks the langdetect package."""
    small = sum(character.islower() for character in text)
    if small or not any(map(str.isupper, text)):
        return f"{small} small letters" if small else "no capital letter"
    return not_in_language(text, "en")


def capital_word_frequency(text: str, *, capital_relation: str, capital_frequency: int) -> str | None:
    """Words without small letters, "I" and "COVID-19" among them; IFEval splits by NLTK, which takes AND/OR as one word."""
    found = re.findall(r"\w+(?:[-.]\w+)*", text)
    return _off(sum(word.isupper() for word in found), capital_relation, capital_frequency, "words in capitals")


_BULLET = re.compile(r"^[^\S\n]*[-*+•][^\S\n]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[^\S\n]*\d{1,3}[.)][^\S\n]+\S", re.MULTILINE)


def number_bullet_lists(text: str, *, num_bullets: int, relation: str = "exactly") -> str | None:
    """Lines that start with -, *, + or • and a space.

    IFEval knows - and * alone and needs no space after them, so that a rule (---), a negative number and *emphasis* at the
    start of a line are bullets to it.
    """
    return _off(len(_BULLET.findall(text)), relation, num_bullets, "bullets")


def json_format(text: str) -> str | None:
    """The whole is a JSON object or array, perhaps within Markdown ticks. IFEval takes a bare number or string as well."""
    value, reason = _json(text)
    if reason is None and not isinstance(value, dict | list):
        return "JSON, but no object or array"
    return reason


def _json(text: str) -> tuple[object, str | None]:
    """The value, or why there is none."""
    bare = re.sub(r"\A```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        return json.loads(bare, parse_constant=_no_json), None
    except (ValueError, RecursionError):  # brackets nested thousands deep
        return None, "no JSON"


def _no_json(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")


def title(text: str) -> str | None:
    """A title in double angular brackets, <<like this>>, somewhere."""
    for line in text.split("\n"):
        opened, closed = line.find("<<"), line.rfind(">>")
        if 0 <= opened < closed and line[opened:closed].strip("<> \t"):
            return None
    return "no <<title>>"


_EMPHASIS = re.compile(r"(?<!\*)(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")


def number_highlighted_sections(text: str, *, num_highlights: int) -> str | None:
    """At least so many *highlighted* or **bold** parts within a line.

    IFEval also counts what stands between the asterisk of a bullet and the next one, and ***both*** twice.
    """
    return _off(len(_EMPHASIS.findall(text)), "at least", num_highlights, "highlighted parts")


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> str | None:
    """At least so many headings such as "SECTION 1"; the parameter is spelt as in IFEval."""
    found = len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text))
    return _off(found, "at least", num_sections, "sections")


_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def constrained_response(text: str, *, options: Sequence[str] = _OPTIONS) -> str | None:
    """One of the options occurs; IFEval's own three without the parameter."""
    return None if any(option in text for option in options) else "none of the options"


def existence(text: str, *, keywords: Sequence[str]) -> str | None:
    """Every keyword occurs, in any case and within longer words, too, as in IFEval."""
    folded = _fold(text)
    missing = [keyword for keyword in keywords if _fold(keyword) not in folded]
    return f"lacks {', '.join(map(repr, missing))}" if missing else None


def frequency(text: str, *, keyword: str, relation: str, frequency: int) -> str | None:
    """How often the keyword occurs, in any case and within longer words, too, as in IFEval."""
    return _off(_fold(text).count(_fold(keyword.strip())), relation, frequency, f"times {keyword.strip()!r}")


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> str | None:
    """None of the words occurs on its own; longer words that contain one may.

    IFEval needs a letter beside a word that ends in a sign ("C#"). Scripts without spaces have no longer words: there the
    words may not occur at all.
    """
    folded = _fold(text)
    for word in forbidden_words:
        wanted = _fold(word.strip())
        before = r"(?<!\w)" if _spaced(wanted[0]) else ""
        after = r"(?!\w)" if _spaced(wanted[-1]) else ""
        if re.search(before + re.escape(wanted) + after, folded):
            return f"contains {word!r}"
    return None


def _spaced(character: str) -> bool:
    """Whether spaces part this character's words."""
    return character.isalnum() and script_of(character) not in ("CJK", "KANA", "THAI", "LAO", "KHMER", "MYANMAR")


def letter_frequency(text: str, *, letter: str, let_relation: str, let_frequency: int) -> str | None:
    """How often a character occurs, in any case. IFEval draws another letter where a sign such as # is asked for."""
    return _off(text.lower().count(letter.lower()), let_relation, let_frequency, f"times {letter!r}")


def end_checker(text: str, *, end_phrase: str) -> str | None:
    """The response ends with the phrase, in any case; quotation marks around the response do not count."""
    ends = _fold(text.strip().strip('"')).endswith(_fold(end_phrase.strip()))
    return None if ends else f"does not end with {_shown(end_phrase.strip())}"


def quotation(text: str) -> str | None:
    """The whole response stands in double quotation marks; IFEval takes straight ones alone, here “these” do as well."""
    bare = text.strip()
    wrapped = len(bare) > 1 and bare[0] + bare[-1] in ('""', "“”", "„“", "„”")
    return None if wrapped else "not in double quotation marks"


def two_responses(text: str) -> str | None:
    """Two different responses, with six asterisks between them."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return "an empty response between two dividers"
    given = [part for part in parts if part]
    if len(given) != 2:
        return f"{len(given)} responses instead of two"
    return "both responses are the same" if given[0] == given[1] else None


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> str | None:
    """The response starts with this text, in any case."""
    return None if _fold(text.strip()).startswith(_fold(prompt_to_repeat.strip())) else "does not start with the request"


def number_placeholders(text: str, *, num_placeholders: int) -> str | None:
    """At least so many [placeholders] within a line; IFEval counts [] and the box of a task list, [ ], as well."""
    found = sum(bool(inside.strip()) for line in text.split("\n") for inside in _bracketed(line))
    return _off(found, "at least", num_placeholders, "placeholders")


def _bracketed(line: str) -> Iterator[str]:
    """What stands between [ and the next ]; a regular expression would walk to the end again from each [ of "[[[["."""
    start = line.find("[")
    while start >= 0:
        end = line.find("]", start)
        if end < 0:
            return
        yield line[start + 1 : end]
        start = line.find("[", end)


def postscript(text: str, *, postscript_marker: str) -> str | None:
    """The marker of a postscript, such as P.S., in any case, with or without a space after its full stops.

    IFEval finds it within other abbreviations (U.P.S.), too.
    """
    letters = (re.escape(letter) for letter in "".join(_fold(postscript_marker).split()))
    pattern = "".join(letter + r"\s?" * (letter == r"\.") for letter in letters).removesuffix(r"\s?")
    return None if re.search(r"(?<!\w)(?<!\w\.)" + pattern, _fold(text)) else f"no {postscript_marker.strip()}"


# --- our own ---------------------------------------------------------------------------------------------------------------


def number_characters(text: str, *, relation: str, num_characters: int) -> str | None:
    """Unicode characters, white space around the response aside."""
    return _off(len(text.strip()), relation, num_characters, "characters")


def number_lines(text: str, *, relation: str, num_lines: int) -> str | None:
    """Lines that are not blank."""
    return _off(sum(bool(line.strip()) for line in text.splitlines()), relation, num_lines, "lines")


def number_blocks(text: str, *, relation: str, num_paragraphs: int) -> str | None:
    """Paragraphs in the everyday sense, between blank lines."""
    return _off(len(_blocks(text)), relation, num_paragraphs, "paragraphs")


def longest_sentence(text: str, *, num_words: int) -> str | None:
    """No sentence, by `sentences`, has more words, by `words`."""
    longest = max((len(words(sentence)) for sentence in sentences(text)), default=0)
    return _off(longest, "at most", num_words, "words in one sentence")


def list_items(text: str, *, relation: str, num_items: int) -> str | None:
    """Lines that start with a bullet (-, *, +, •) or a number (1. or 1)) and a space."""
    return _off(len(_BULLET.findall(text)) + len(_NUMBERED.findall(text)), relation, num_items, "list items")


def ends_with_question(text: str) -> str | None:
    """The last character is a question mark, closing quotes, brackets and emphasis aside."""
    return None if text.rstrip().rstrip(CLOSERS)[-1:] in tuple("?？؟") else "does not end with a question"


def first_line(text: str, *, line: str) -> str | None:
    """The first line is exactly this, white space around it aside."""
    found = text.strip().split("\n")[0].strip()
    return None if found == line.strip() else f"the first line is {_shown(found)}"


def starts_with(text: str, *, phrase: str) -> str | None:
    """The response starts with exactly this, in this case."""
    return None if text.strip().startswith(phrase.strip()) else f"does not start with {_shown(phrase.strip())}"


def ends_with(text: str, *, phrase: str) -> str | None:
    """The response ends with exactly this, in this case; `startend:end_checker` does not mind it."""
    return None if text.strip().endswith(phrase.strip()) else f"does not end with {_shown(phrase.strip())}"


def like(text: str, *, pattern: str) -> str | None:
    """The whole response is like the pattern, in which * stands for any text or none: "Dear *,*Yours sincerely*"."""
    first, *others = pattern.split("*")
    bare = text.strip()
    reason = f"is not like {_shown(pattern)}"
    if not others:
        return None if bare == first else reason
    *middle, last = others
    if not bare.startswith(first) or not bare.endswith(last):
        return reason
    position, end = len(first), len(bare) - len(last)
    for piece in middle:  # leftmost fits leave the most room to the pieces after them
        found = bare.find(piece, position, max(end, 0))
        if found < 0:
            return reason
        position = found + len(piece)
    return None if position <= end else reason


def forbidden_characters(text: str, *, characters: str) -> str | None:
    """None of these characters occurs, for example "!"."""
    found = sorted(set(characters) & set(text))
    return f"contains {' '.join(found)}" if found else None


def json_object(text: str, *, keys: Sequence[str] = ()) -> str | None:
    """The whole is a JSON object, perhaps within Markdown ticks, with at least these keys."""
    value, reason = _json(text)
    if reason is not None:
        return reason
    if not isinstance(value, dict):
        return "JSON, but no object"
    missing = [key for key in keys if key not in value]
    return f"the object lacks {', '.join(map(repr, missing))}" if missing else None


_MARKUP = (
    ("a heading", re.compile(r"^ {0,3}#{1,6}[^\S\n]", re.MULTILINE)),
    ("bullets", re.compile(r"^[^\S\n]*[-*+][^\S\n]+\S", re.MULTILINE)),
    ("a quotation", re.compile(r"^ {0,3}>", re.MULTILINE)),
    ("a rule", re.compile(r"^ {0,3}(?:-{3,}|\*{3,}|_{3,})[^\S\n]*$", re.MULTILINE)),
    ("a table", re.compile(r"^[^\S\n]*\|?[^\S\n]*:?-{3,}:?[^\S\n]*\|", re.MULTILINE)),
    ("code", re.compile(r"```|`[^`\n]+`")),
    ("emphasis", _EMPHASIS),
    ("emphasis", re.compile(r"(?<!\w)__[^\s_][^_\n]*__(?!\w)")),
)


def no_markdown(text: str) -> str | None:
    """No heading, bullet, emphasis, code, link, quotation, table or rule of Markdown.

    Numbered lists are plain text as well and may stand; so may _single underscores_, which names contain.
    """
    for name, pattern in _MARKUP:
        if pattern.search(text):
            return f"Markdown: {name}"
    around = (line.partition("](") for line in text.split("\n"))
    return "Markdown: a link" if any("[" in before and found and ")" in after for before, found, after in around) else None


_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u231a\u231b\u23e9-\u23fa\u2b50\u2b55\ufe0f\u20e3]")


def no_emoji(text: str) -> str | None:
    """No emoji, pictograph or dingbat such as ✓, by ranges of Unicode."""
    found = len(_EMOJI.findall(text))
    return f"{found} emoji" if found else None


# --- the table -------------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """What a parameter must be."""

    expects: str
    """For people, after "must be"."""
    fits: Callable[[object], bool]


class Rule(NamedTuple):
    """A check and what it takes."""

    why_not: Callable[..., str | None]
    required: Mapping[str, Parameter] = {}
    optional: Mapping[str, Parameter] = {}

    def takes(self) -> str:
        """What the check takes, for people."""
        every = [f"{name} ({kind.expects})" for name, kind in self.required.items()]
        every += [f"{name} ({kind.expects}; may be left out)" for name, kind in self.optional.items()]
        return f"it takes {', '.join(every)}" if every else "it takes no parameters"


def _whole(least: int) -> Callable[[object], bool]:
    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return fits


def _one_of(names: Iterable[str]) -> Parameter:
    known = tuple(names)
    return Parameter(f"one of {', '.join(map(repr, known))}", known.__contains__)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _word(value: object) -> bool:
    return isinstance(value, str) and value.strip()[:1].isalnum()


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_text, cast(tuple[object, ...], value)))


def _signs(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not any(map(str.isspace, value))


def _sign(value: object) -> bool:
    return _signs(value) and len(str(value)) == 1


_COUNT = Parameter("a whole number, 0 or more", _whole(0))
_SOME = Parameter("a whole number, 1 or more", _whole(1))
_PHRASE = Parameter("text that is not blank", _text)
_WORD = Parameter("a word that starts with a letter or digit", _word)
_PHRASES = Parameter("a list of texts", _texts)
_SIGNS = Parameter("one or more characters without white space", _signs)
_SIGN = Parameter("one character, no white space", _sign)
_RELATION = _one_of(RELATIONS)
_SCRIPT = _one_of(SCRIPTS)
_LANGUAGE = _one_of(LANGUAGES)

CHECKS: Mapping[str, Rule] = {
    "length_constraints:number_words": Rule(number_words, {"relation": _RELATION, "num_words": _COUNT}),
    "length_constraints:number_sentences": Rule(number_sentences, {"relation": _RELATION, "num_sentences": _COUNT}),
    "length_constraints:number_paragraphs": Rule(number_paragraphs, {"num_paragraphs": _SOME}, {"relation": _RELATION}),
    "length_constraints:nth_paragraph_first_word": Rule(
        nth_paragraph_first_word, {"num_paragraphs": _SOME, "nth_paragraph": _SOME, "first_word": _WORD}
    ),
    "punctuation:no_comma": Rule(no_comma),
    "change_case:english_lowercase": Rule(english_lowercase),
    "change_case:english_capital": Rule(english_capital),
    "change_case:capital_word_frequency": Rule(
        capital_word_frequency, {"capital_relation": _RELATION, "capital_frequency": _COUNT}
    ),
    "detectable_format:number_bullet_lists": Rule(number_bullet_lists, {"num_bullets": _COUNT}, {"relation": _RELATION}),
    "detectable_format:json_format": Rule(json_format),
    "detectable_format:title": Rule(title),
    "detectable_format:number_highlighted_sections": Rule(number_highlighted_sections, {"num_highlights": _SOME}),
    "detectable_format:multiple_sections": Rule(multiple_sections, {"section_spliter": _PHRASE, "num_sections": _SOME}),
    "detectable_format:constrained_response": Rule(constrained_response, {}, {"options": _PHRASES}),
    "detectable_content:number_placeholders": Rule(number_placeholders, {"num_placeholders": _SOME}),
    "detectable_content:postscript": Rule(postscript, {"postscript_marker": _PHRASE}),
    "keywords:existence": Rule(existence, {"keywords": _PHRASES}),
    "keywords:frequency": Rule(frequency, {"keyword": _PHRASE, "relation": _RELATION, "frequency": _COUNT}),
    "keywords:forbidden_words": Rule(forbidden_words, {"forbidden_words": _PHRASES}),
    "keywords:letter_frequency": Rule(
        letter_frequency, {"letter": _SIGN, "let_relation": _RELATION, "let_frequency": _COUNT}
    ),
    "language:response_language": Rule(not_in_language, {"language": _LANGUAGE}),
    "combination:two_responses": Rule(two_responses),
    "combination:repeat_prompt": Rule(repeat_prompt, {"prompt_to_repeat": _PHRASE}),
    "startend:end_checker": Rule(end_checker, {"end_phrase": _PHRASE}),
    "startend:quotation": Rule(quotation),
    "selfsteer:number_characters": Rule(number_characters, {"relation": _RELATION, "num_characters": _COUNT}),
    "selfsteer:number_lines": Rule(number_lines, {"relation": _RELATION, "num_lines": _COUNT}),
    "selfsteer:number_paragraphs": Rule(number_blocks, {"relation": _RELATION, "num_paragraphs": _COUNT}),
    "selfsteer:longest_sentence": Rule(longest_sentence, {"num_words": _SOME}),
    "selfsteer:list_items": Rule(list_items, {"relation": _RELATION, "num_items": _COUNT}),
    "selfsteer:script": Rule(not_in_script, {"script": _SCRIPT}),
    "selfsteer:ends_with_question": Rule(ends_with_question),
    "selfsteer:first_line": Rule(first_line, {"line": _PHRASE}),
    "selfsteer:starts_with": Rule(starts_with, {"phrase": _PHRASE}),
    "selfsteer:ends_with": Rule(ends_with, {"phrase": _PHRASE}),
    "selfsteer:like": Rule(like, {"pattern": _PHRASE}),
    "selfsteer:forbidden_characters": Rule(forbidden_characters, {"characters": _SIGNS}),
    "selfsteer:json_object": Rule(json_object, {}, {"keys": _PHRASES}),
    "selfsteer:no_markdown": Rule(no_markdown),
    "selfsteer:no_emoji": Rule(no_emoji),
}
"""Every check by the name that users write."""
