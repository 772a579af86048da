"""Stage 1: every usable query with its pair of opposing principles, from the library, a language model, or a file.

What a query gets depends on the seed and the query alone, not on its place or its neighbours. Texts for models are in
`templates/`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml

from selfsteer.data import queries as reading
from selfsteer.data.files import jsonl_rows
from selfsteer.data.queries import fold
from selfsteer.engines import open as opening
from selfsteer.engines.base import Request, Sampling
from selfsteer.engines.open import sampler_digest
from selfsteer.engines.sampling import Question, Sampler, kept_open, request, sample, unread
from selfsteer.measures.checks import parse_all
from selfsteer.models import positions_of, resolve, tokenizer_of
from selfsteer.prompts import Prompts, behind_thought
from selfsteer.recipe import sections
from selfsteer.recipe.engines import context_limit, sampling_identity
from selfsteer.recipe.sections import Policy, Recipe
from selfsteer.recipe.shipped import located, template
from selfsteer.records import Checkpoint, Dropped, Message, Principles, Query
from selfsteer.stages.base import TOO_LONG, Round, Work, inputs_of, kept, make_stage
from selfsteer.stages.drawing import share_of_round
from selfsteer.stages.status import PRINCIPLES
from selfsteer.store import columns
from selfsteer.store.durable import digest, file_digest, read_small_text, regular_file
from selfsteer.store.folder import Contents, Origin, Stage
from selfsteer.store.journal import Journal

_UNNAMED = "unnamed"
"""The quality of a file's pair that gives none."""


class PrinciplePair(NamedTuple):
    """Opposing texts, p+ and p-, before they are given to a query."""

    good: str
    bad: str
    quality: str
    checks: tuple[str, ...] = ()
    """As in `Principles`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All pairs that queries can get, as the recipe chose them."""

    pairs: tuple[PrinciplePair, ...]
    """For any query."""
    own: Mapping[str, PrinciplePair]
    """Folded query text -> the pair that serves this query alone."""
    source: Literal["library", "file"]
    concision: float
    """Share of the queries that get a concision pair added."""


# --- assignment ------------------------------------------------------------------------------------------------------------


def load_pool(section: sections.PrincipleSource) -> Pool:
    """The library, or the recipe's file, restricted to `section.qualities` and of those to the first `section.limit`.

    With source "generate" this is the library, which stands in where the model's answers do not parse. A file's rows with
    a query of their own are not restricted. Raises ValueError for unknown qualities and unreadable files.
    """
    if section.source != "file":
        pairs = _only(library(), section.qualities)[: section.limit]
        return Pool(pairs=pairs, own={}, source="library", concision=section.concision)
    assert section.path is not None, "the recipe refuses source: file without a path"
    pairs, own = _read_file(Path(located(section.path)))
    return Pool(pairs=_only(pairs, section.qualities)[: section.limit], own=own, source="file", concision=section.concision)


def choose_principles(query: Query, pool: Pool, seed: int) -> Principles:
    """The pair of this query, drawn with the seed, with the concision pair added for a share of the queries.

    Raises ValueError when the pool serves other queries only.
    """
    pair = pool.own.get(fold(query.text)) if pool.own else None
    if pair is None:
        if not pool.pairs:
            raise ValueError(
                f"principles.path has no pair for the query {query.text[:80]!r}; add a row with this query, or rows without "
                "a query that serve all others"
            )
        pair = pool.pairs[_draw(seed, query, "pair") % len(pool.pairs)]
    principles = Principles(good=pair.good, bad=pair.bad, quality=pair.quality, source=pool.source, checks=pair.checks)
    return _with_concision(principles, query, pool.concision, seed)


def _with_concision(principles: Principles, query: Query, share: float, seed: int) -> Principles:
    if _draw(seed, query, "concision") >= share * 2**64:
        return principles
    pairs = concision_pairs()
    pair = pairs[_draw(seed, query, "concision pair") % len(pairs)]
    return replace(principles, good=f"{principles.good} {pair.good}", bad=f"{principles.bad} {pair.bad}", concision=True)


def _draw(seed: int, query: Query, purpose: str) -> int:
    """A number below 2^64 that depends on nothing else."""
    return int(digest([seed, query.id, purpose])[:16], 16)


def _only(pairs: Sequence[PrinciplePair], qualities: Sequence[str] | None) -> tuple[PrinciplePair, ...]:
    if not qualities:
        return tuple(pairs)
    known = sorted({pair.quality for pair in pairs})
    for quality in qualities:
        if quality not in known:
            nearest = difflib.get_close_matches(quality, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"principles.qualities: no quality {quality!r}; {hint}Known: {', '.join(known)}")
    return tuple(pair for pair in pairs if pair.quality in qualities)


# --- library and file ------------------------------------------------------------------------------------------------------


def wrapping(section: sections.PrincipleSource) -> str | None:
    """What the principles are set into, None where they stand alone."""
    return template("principle_wrap.txt").strip() if section.wrap else None


@cache
def library() -> tuple[PrinciplePair, ...]:
    """The built-in pairs, without those on concision."""
    qualities = cast(dict[str, list[dict[str, Any]]], yaml.safe_load(template("principles.yaml"))["qualities"])
    return tuple(_library_pair(quality, pair) for quality, pairs in qualities.items() for pair in pairs)


@cache
def concision_pairs() -> tuple[PrinciplePair, ...]:
    """The built-in pairs that are added to others, against length bias."""
    pairs = cast(list[dict[str, Any]], yaml.safe_load(template("principles.yaml"))["concision"])
    return tuple(_library_pair("concision", pair) for pair in pairs)


def _library_pair(quality: str, fields: Mapping[str, Any]) -> PrinciplePair:
    return PrinciplePair(fields["good"], fields["bad"], quality, _checks(fields, f"principles.yaml, {quality}"))


def _checks(fields: Mapping[str, object], place: str) -> tuple[str, ...]:
    return tuple(check.as_json() for check in parse_all(fields, place))


def _read_file(path: Path) -> tuple[list[PrinciplePair], dict[str, PrinciplePair]]:
    regular_file(path, "set principles.path in the recipe")
    pairs: list[PrinciplePair] = []
    own: dict[str, PrinciplePair] = {}
    for place, fields, _ in jsonl_rows(path):
        if unknown := sorted(set(fields) - {"good", "bad", "quality", "query", "check", "checks"}):
            raise ValueError(f"{place}: unknown keys {unknown}; a row takes good, bad, quality, query and check (or checks)")
        good, bad = _text(fields, "good", place), _text(fields, "bad", place)
        if fold(good) == fold(bad):
            raise ValueError(f"{place}: good and bad are the same text; the two must be opposed")
        quality = _text(fields, "quality", place) if fields.get("quality") is not None else _UNNAMED
        pair = PrinciplePair(good, bad, quality, _checks(fields, place))
        if fields.get("query") is None:
            pairs.append(pair)
            continue
        query = fold(_text(fields, "query", place))
        if query in own:
            raise ValueError(f"{place}: a second pair for the query {query[:80]!r}; keep one")
        own[query] = pair
    if not pairs and not own:
        raise ValueError(f'{path}: no principles; expected one {{"good": ..., "bad": ...}} a line')
    return pairs, own


def _text(fields: Mapping[str, object], key: str, place: str) -> str:
    value = fields.get(key)
    if isinstance(value, str) and value.strip():
        return value.strip()
    state = "is missing" if key not in fields else "is no text or is empty"
    raise ValueError(f"{place}: {key!r} {state}; a row needs good and bad as text, found the keys {sorted(fields)}")


# --- generation ------------------------------------------------------------------------------------------------------------

_LENGTHS = range(20, 601)
"""Characters of a principle."""

_MOST_UNLIKE = 3.0
"""Of a pair, the longer text has at most this many times the characters of the shorter: alike in structure."""

_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)]?$""")

_LEFTOVER = re.compile(r"<\|?/?\w+\|?>|\[/?INST\]|\{\w+\}|\b(?:Bad|Good|Request):|[*#`]{2}")
"""Special tokens, unfilled places and pieces of the few-shot prompt or of markup, which no principle contains."""


@cache
def _few_shot() -> tuple[Message, ...]:
    return tuple(cast(list[Message], yaml.safe_load(template("principle_generation.yaml"))))


def principle_messages(query: Query) -> tuple[Message, ...]:
    """The few-shot prompt that asks for the bad and the good principle of a query (its last user turn)."""
    *shots, last = _few_shot()
    return (*shots, Message(role=last["role"], content=last["content"].replace("{query}", query.text)))


@cache
def _example_lines() -> frozenset[str]:
    return frozenset(line for shot in _few_shot() if shot["role"] == "assistant" for line in shot["content"].splitlines())


def parse_principles(text: str) -> PrinciplePair | str:
    """The pair in a model's answer of exactly two lines, "Bad: ..." and then "Good: ...", or why it is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != 2:
        return f"{len(lines)} lines instead of two"
    if not lines[0].startswith("Bad:") or not lines[1].startswith("Good:"):
        return "the lines do not start with Bad: and Good:"
    bad, good = lines[0].removeprefix("Bad:").strip(), lines[1].removeprefix("Good:").strip()
    for name, principle in (("bad", bad), ("good", good)):
        if reason := _unfit(principle):
            return f"the {name} principle {reason}"
    if fold(bad).casefold() == fold(good).casefold():
        return "both principles are the same"
    if not _example_lines().isdisjoint(lines):  # small models copy; the example is about another request
        return "repeats an example of the prompt"
    if max(len(bad), len(good)) > _MOST_UNLIKE * min(len(bad), len(good)):
        return "the principles differ too much in length"
    return PrinciplePair(good, bad, "generated")


def _unfit(principle: str) -> str | None:
    if not principle:
        return "is empty"
    if len(principle) not in _LENGTHS:
        return f"is too {'short' if len(principle) < _LENGTHS.start else 'long'}"
    if _LEFTOVER.search(principle):
        return "contains leftovers of the prompt, markup or special tokens"
    if not _SENTENCE_END.search(principle):
        return "does not end like a sentence"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A model that writes principles, and what it has written."""

    model_digest: str
    prompts: Prompts
    sampling: Sampling
    retries: int
    seed: int
    """The recipe's."""
    journal: Journal

    @property
    def tries(self) -> int:
        """How often it is asked for a query's at most; once where another seed gives the same text."""
        return 1 if self.sampling.temperature == 0 else 1 + self.retries

    def request(self, query: Query, number: int) -> Request:
        """A query's try, from 0."""
        seed = _draw(self.seed, query, f"attempt {number}") % 2**31
        messages = principle_messages(query)
        return request(self.prompts, messages, model_digest=self.model_digest, sampling=self.sampling, seed=seed)

    def read(self, key: str) -> PrinciplePair | str:
        """What an answered request says, or why that is no pair."""
        text = self.journal.get(key).get("text", "")  # of one that failed there is none
        return parse_principles(behind_thought(text) or "")


def write_principles(writer: Writer, queries: Callable[[], Iterable[Query]], sampler: Sampler, *, total: int) -> None:
    """Ask for the principles of every query until they parse, `writer.tries` times at most.

    queries: each time from the beginning. total, their number, is for the progress bar. Raises Interrupted when a signal
    asked to stop.
    """

    def questions() -> Iterator[list[Question]]:
        return ([partial(writer.request, query)] for query in queries())

    def parses(key: str) -> bool:
        return isinstance(writer.read(key), PrinciplePair)

    for asked in unread(questions, writer.journal, parses, tries=writer.tries):
        sample(sampler, chain.from_iterable(asked), writer.journal, description="principles", total=total)


def written_principles(query: Query, writer: Writer, pool: Pool) -> Principles:
    """What the first try says that parses, or a library pair. KeyError for a query that was not answered."""
    reason = ""
    for number in range(writer.tries):
        pair = writer.read(writer.request(query, number).key)
        if isinstance(pair, PrinciplePair):
            principles = Principles(good=pair.good, bad=pair.bad, quality=pair.quality, source="generated")
            return _with_concision(principles, query, pool.concision, writer.seed)
        reason = pair
    fallback = f"{reason} (try {writer.tries} of {writer.tries})"
    return replace(choose_principles(query, pool, writer.seed), fallback=fallback)


_OF_WRITER = ("chat_template", "template_arguments")
"""Settings of principles.model that most recipes leave out."""


def principles_stage(round: Round) -> Stage:
    """Step 1: every usable query with its pair of opposing principles."""
    section = round.recipe.principles
    inputs = inputs_of(round) | {"queries": reading.source_digest(round.recipe.queries)}
    if section.chat_template is not None:
        inputs["chat template"] = file_digest(Path(section.chat_template))
    if section.path is not None:
        inputs["principles"] = file_digest(Path(located(section.path)))
    settings = {
        "queries": round.recipe.queries.model_dump(exclude={"path", "holdout", "split_rounds", "shard"}),
        "principles": section.model_dump(exclude={"path", "engine", "limit", "wrap", *_OF_WRITER}),
        **{key: value for key in _OF_WRITER if (value := getattr(section, key))},
        "wrap": wrapping(section),
        **(sampling_identity(section.engine or round.recipe.engine) if section.source == "generate" else {}),
        "system_role": round.prompts.system_role,
        "library": digest([[*pair[:3], *pair.checks] for pair in load_pool(section).pairs]),
        "seed": round.recipe.seed,
        "round": round.number,
    }
    longest = _longest_prompt(round, _positions(round))
    if longest < round.recipe.queries.max_prompt_tokens:
        settings["longest_prompt"] = longest
    if _splits(round.recipe):
        settings["split"] = {"rounds": round.recipe.rounds, "holdout": round.recipe.queries.holdout}
    origin = Origin(settings=settings, inputs=inputs)
    stage = make_stage(round, PRINCIPLES, origin, lambda work: _principles(round, work))
    share = round.recipe.queries.share
    if share is not None and share.of > kept(stage):
        raise ValueError(f"queries.shard: {share.of} shards of {kept(stage):,} queries; take fewer.")
    return stage


def _principles(round: Round, work: Work) -> Contents:
    section = round.recipe.principles
    pool, wrap = load_pool(section), wrapping(section)
    queries, positions = _Queries(round), _positions(round)
    wanted = sum(1 for _ in queries)
    assign: Callable[[Query], Principles] = partial(choose_principles, pool=pool, seed=round.recipe.seed)
    if section.source == "generate":
        assign = _generated_principles(round, work, pool, queries)

    def rows() -> Iterator[dict[str, Any] | Dropped]:
        for item in queries:
            if isinstance(item, Dropped):
                yield item
                continue
            principles = replace(assign(item), wrap=wrap)
            length = _length_beyond(round.prompts, item, principles, _longest_prompt(round, positions))
            if length is not None and (found := _too_long(round, item, length, positions)) is not None:
                yield replace(found, detail=f"with its principle, {found.detail}")
                continue
            yield {
                "query_id": item.id,
                "messages": list(item.messages),
                "principles": columns.principles_columns(principles),
            }

    return Contents(wanted=wanted, rows=rows(), schema=columns.PRINCIPLES)


def _splits(recipe: Recipe) -> bool:
    return recipe.queries.split_rounds and recipe.rounds > 1


class _Queries:
    """The round's queries that can be rendered, up to queries.limit of them, and those that were dropped on the way.

    Read from the file at each iteration, and rendered to be checked at the first one only. Where rounds split them, the
    first round names the unusable ones.
    """

    def __init__(self, round: Round) -> None:
        self._round = round
        self._positions = _positions(round)
        self._checked = 0
        self._unfit: dict[int, Dropped] = {}
        """Of the first `_checked` rows, those that can't be rendered, by their number."""
        self._share: frozenset[str] | None = None
        if _splits(round.recipe):
            self._share = share_of_round(round, {item.id for item in self._all() if isinstance(item, Query)})

    def __iter__(self) -> Iterator[Query | Dropped]:
        share, number = self._share, self._round.number
        for item in self._all():
            if share is None or (item.id in share if isinstance(item, Query) else number == 1):
                yield item

    def _all(self) -> Iterator[Query | Dropped]:
        section = self._round.recipe.queries
        kept = 0
        for number, item in enumerate(reading.read_queries(section.model_copy(update={"limit": None}))):
            if isinstance(item, Query):
                item = replace(item, messages=self._round.prompts.fold(item.messages))
                if number >= self._checked:
                    self._check(number, item)
                item = self._unfit.get(number, item)
                kept += isinstance(item, Query)
            yield item
            if section.limit is not None and kept == section.limit:
                return

    def _check(self, number: int, item: Query) -> None:
        found = self._round.prompts.checked_ids(item.messages)
        if isinstance(found, str):
            self._unfit[number] = Dropped(id=item.id, reason=found)
        elif (long := _too_long(self._round, item, len(found), self._positions)) is not None:
            self._unfit[number] = long
        self._checked = number + 1


def _positions(round: Round) -> int | None:
    """The most tokens of a prompt and its response together, for the policy and its engine."""
    positions = positions_of(round.policy.path, trust_remote_code=round.recipe.policy.trust_remote_code)
    return min(filter(None, (positions, context_limit(round.recipe.engine))), default=None)


def _too_long(round: Round, query: Query, tokens: int, positions: int | None) -> Dropped | None:
    """positions: the most tokens that the policy takes, of a prompt and its response together."""
    limit, new = round.recipe.queries.max_prompt_tokens, round.recipe.responses.max_new_tokens
    if tokens > limit:
        return Dropped(id=query.id, reason="prompt too long", detail=f"{tokens} tokens, limit {limit}")
    if positions is not None and tokens + new > positions:
        detail = f"{tokens} tokens and {new} new ones, {positions} positions"
        return Dropped(id=query.id, reason=TOO_LONG, detail=detail)
    return None


def _longest_prompt(round: Round, positions: int | None) -> int:
    limit, new = round.recipe.queries.max_prompt_tokens, round.recipe.responses.max_new_tokens
    return limit if positions is None else min(limit, positions - new)


def check_writer(recipe: Recipe) -> None:
    """Raises FileNotFoundError, or ValueError, for a chat template that can't be read; the model is found in stage 1."""
    if recipe.principles.chat_template is not None:
        read_small_text(Path(recipe.principles.chat_template))


def find_writer(recipe: Recipe) -> tuple[Checkpoint, Prompts] | None:
    """The model that writes principles in the policy's place, and how it is asked; it is told the same day.

    Raises ValueError, or FileNotFoundError, for a model or a chat template that is not there.
    """
    section, policy = recipe.principles, recipe.policy
    if section.model is None:
        return None
    asked = Policy(
        model=section.model,
        chat_template=section.chat_template,
        template_arguments=section.template_arguments,
        date=policy.date,
        trust_remote_code=policy.trust_remote_code,
    )
    writer = resolve(asked)
    return writer, Prompts.of(asked, tokenizer_of(asked, writer.path)).whole()


def _generated_principles(round: Round, work: Work, pool: Pool, wanted: _Queries) -> Callable[[Query], Principles]:
    """Sample what the journal lacks; returns a function that reads a query's principles back from it."""
    section, recipe = round.recipe.principles, round.recipe
    model, prompts = find_writer(recipe) or (round.policy, round.prompts)
    engine_section = section.engine or recipe.engine
    engine = partial(opening.open_engine, engine_section, model, prompts, trust_remote_code=recipe.policy.trust_remote_code)
    sampling = Sampling(temperature=section.temperature, top_p=recipe.responses.top_p, max_new_tokens=section.max_new_tokens)
    writer = Writer(
        model_digest=sampler_digest(engine_section, model),
        prompts=prompts,
        sampling=sampling,
        retries=section.retries,
        seed=recipe.seed,
        journal=work.journal,
    )
    total = sum(1 for _ in wanted)

    def queries() -> Iterator[Query]:
        return (item for item in wanted if isinstance(item, Query))

    with kept_open(engine) as opened:  # over all tries
        write_principles(writer, queries, Sampler(opened, prompts), total=total)
    return partial(written_principles, writer=writer, pool=pool)


def _length_beyond(prompts: Prompts, query: Query, principles: Principles, limit: int) -> int | None:
    """The tokens of the longer steered prompt, where they are more than `limit`."""
    steered = (prompts.steer(query.messages, text) for text in (principles.good_message, principles.bad_message))
    return max((length for each in steered if (length := prompts.length_beyond(each, limit)) is not None), default=None)
