"""Principles: the library's texts, how they are given to queries, the strict parser, retries and files."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self

import pyarrow as pa
import pytest
from tiny import tiny_tokenizer

from selfsteer import pipeline
from selfsteer.data.queries import make_query
from selfsteer.engines.base import Completion, Request, Sampling
from selfsteer.engines.sampling import Sampler
from selfsteer.prompts import Prompts
from selfsteer.recipe import sections
from selfsteer.recipe.shipped import located
from selfsteer.records import Principles, Query
from selfsteer.stages.principles import (
    PrinciplePair,
    Writer,
    choose_principles,
    concision_pairs,
    find_writer,
    library,
    load_pool,
    parse_principles,
    principle_messages,
    wrapping,
    write_principles,
    written_principles,
)
from selfsteer.store import columns
from selfsteer.store.journal import Journal

GOOD = "Explain each step and give clear reasons."
BAD = "Skip the steps and give no reasons."
PARSEABLE = f"Bad: {BAD}\nGood: {GOOD}"


def make(text: str) -> Query:
    return make_query(({"role": "user", "content": text},))


QUERIES = [make(f"request number {number}") for number in range(5000)]


def source(**settings: object) -> sections.PrincipleSource:
    return sections.PrincipleSource.model_validate(settings)


# --- wrapping --------------------------------------------------------------------------------------------------------------


def test_a_wrapped_principle_stands_in_a_sentence_that_asks_not_to_mention_it():
    text = wrapping(source(wrap=True))
    assert text is not None
    assert text.count("{principle}") == 1
    assert re.search(r"never mention", text, re.IGNORECASE)
    principles = Principles(good=GOOD, bad=BAD, quality="logic", source="library", wrap=text)
    before, after = text.split("{principle}")
    assert principles.good_message == before + GOOD + after
    assert principles.bad_message == before + BAD + after
    assert wrapping(source()) is None
    assert replace(principles, wrap=None).good_message == GOOD


# --- the library -----------------------------------------------------------------------------------------------------------


def test_the_library_has_qualities_and_pairs_enough():
    counts = Counter(pair.quality for pair in library())
    assert len(counts) >= 8
    assert min(counts.values()) >= 3
    assert len(concision_pairs()) >= 3
    needed = {"helpfulness", "accuracy", "logic", "completeness", "safety", "engagement", "style", "clarity", "instructions"}
    assert needed <= set(counts)


@pytest.mark.parametrize("pair", [*library(), *concision_pairs()], ids=lambda pair: f"{pair.quality}: {pair.good[:30]}")
def test_a_pair_of_the_library_is_opposed_alike_short_and_harmless(pair: PrinciplePair):
    assert pair.good != pair.bad
    assert max(len(pair.good), len(pair.bad)) <= 1.5 * min(len(pair.good), len(pair.bad))
    assert pair.good.count(". ") == pair.bad.count(". ") == 1, "two sentences on each side"
    for text in (pair.good, pair.bad):
        assert 5 <= len(text.split()) <= 25
        assert text[0].isupper()
        assert text.endswith(".")
        assert text == " ".join(text.split())
        assert max(len(sentence.split()) for sentence in text.split(". ")) <= 16
        assert not re.search(r"\b(principle|guideline|system message|prompt|quality|response)s?\b", text, re.IGNORECASE)
    assert not re.search(
        r"harm|danger|toxic|\bhat(?:e|red)\b|insult|offen[cs]|abus|violen|kill|weapon|illegal|crim|racis|sexis|sexual|threat|"
        r"deceiv|manipulat|\blie\b|\blies\b|scam|steal|malware|malicious|suicid|drug|poison|discriminat|stereotyp|rude",
        pair.bad,
        re.IGNORECASE,
    )


def test_no_text_of_the_library_is_there_twice():
    texts = [text for pair in (*library(), *concision_pairs()) for text in (pair.good, pair.bad)]
    assert len(texts) == len(set(texts))


# --- assignment ------------------------------------------------------------------------------------------------------------


def test_what_a_query_gets_depends_on_the_seed_and_the_query_alone():
    pool = load_pool(source())
    forward = {query.id: choose_principles(query, pool, 7) for query in QUERIES[:300]}
    backward = {query.id: choose_principles(query, load_pool(source()), 7) for query in reversed(QUERIES[100:200])}
    assert all(forward[id] == principles for id, principles in backward.items())
    other = [choose_principles(query, pool, 8) == forward[query.id] for query in QUERIES[:300]]
    assert sum(other) < 30


def test_a_golden_choice_guards_old_runs():
    """A changed draw would silently give every old run's queries other principles."""
    chosen = [choose_principles(make("What is a cat?"), load_pool(source()), seed) for seed in (0, 1, 3, 11)]
    assert [(principles.quality, principles.concision) for principles in chosen] == [
        ("relevance", False),
        ("instructions", False),
        ("logic", False),
        ("engagement", True),
    ]


def test_every_pair_is_given_about_equally_often():
    """5,000 draws over 40 pairs: 125 each, standard deviation 11."""
    pool = load_pool(source(concision=0))
    counts = Counter(choose_principles(query, pool, 0).good for query in QUERIES)
    assert len(counts) == len(library())
    expected = len(QUERIES) / len(library())
    assert all(0.6 * expected < count < 1.4 * expected for count in counts.values())


def test_a_fifth_of_the_queries_gets_concision_on_both_sides():
    """5,000 Bernoulli draws at 0.2: standard deviation 0.0057."""
    with_concision = load_pool(source(concision=0.2))
    without = load_pool(source(concision=0))
    concise = {pair.good: pair.bad for pair in concision_pairs()}
    added = 0
    for query in QUERIES:
        plain, given = choose_principles(query, without, 0), choose_principles(query, with_concision, 0)
        if not given.concision:
            assert given == plain
            continue
        added += 1
        good = given.good.removeprefix(f"{plain.good} ")
        assert given.bad == f"{plain.bad} {concise[good]}"
    assert added / len(QUERIES) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (1.0, 200)])
def test_concision_for_none_or_for_all(share: float, wanted: int):
    pool = load_pool(source(concision=share))
    assert sum(choose_principles(query, pool, 0).concision for query in QUERIES[:200]) == wanted


def test_qualities_restrict_the_library():
    pool = load_pool(source(qualities=["logic", "style"]))
    assert {choose_principles(query, pool, 0).quality for query in QUERIES[:100]} == {"logic", "style"}


def test_an_unknown_quality_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no quality 'logik'; did you mean 'logic'\? Known: accuracy, .*, style"):
        load_pool(source(qualities=["logik"]))


# --- parsing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        PARSEABLE,
        f"\n  Bad:   {BAD}  \n\n  Good: {GOOD}\r\n",
        f"Bad:{BAD}\nGood:{GOOD}",
    ],
)
def test_two_lines_bad_and_then_good_are_a_pair(text: str):
    assert parse_principles(text) == PrinciplePair(good=GOOD, bad=BAD, quality="generated")


@pytest.mark.parametrize(
    "text", ["Bad: 回答要含糊不清，不要给出任何具体的步骤或理由。\nGood: 回答要清楚准确，并给出具体的步骤和充分的理由。"]
)
def test_other_scripts_end_their_sentences_too(text: str):
    assert isinstance(parse_principles(text), PrinciplePair)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "0 lines instead of two"),
        ("To boil an egg, heat water.", "1 lines instead of two"),
        (f"Bad: {BAD}", "1 lines instead of two"),
        (f"Bad: {BAD} Good: {GOOD}", "1 lines instead of two"),
        (f"Sure!\n{PARSEABLE}", "3 lines instead of two"),
        (f"{PARSEABLE}\nRequest: What is a dog?", "3 lines instead of two"),
        (f"{PARSEABLE}\n{PARSEABLE}", "4 lines instead of two"),
        (f"Good: {GOOD}\nBad: {BAD}", "the lines do not start with Bad: and Good:"),
        (f"Bad: {BAD}\nBad: {BAD}", "the lines do not start with Bad: and Good:"),
        (f"**Bad:** {BAD}\n**Good:** {GOOD}", "the lines do not start with Bad: and Good:"),
        (f"bad: {BAD}\ngood: {GOOD}", "the lines do not start with Bad: and Good:"),
        (f"Bad:\nGood: {GOOD}", "the bad principle is empty"),
        (f"Bad: {BAD}\nGood: ", "the good principle is empty"),
        (f"Bad: Be bad.\nGood: {GOOD}", "the bad principle is too short"),
        (f"Bad: {BAD}\nGood: {'Be good. ' * 67}", "the good principle is too long"),
        (f"Bad: {BAD}\nGood: Explain each step and give", "the good principle does not end like a sentence"),
        (f"Bad: {BAD}\nGood: {GOOD} Good: {GOOD}", "the good principle contains leftovers"),
        (f"Bad: {BAD}<|im_end|>\nGood: {GOOD}", "the bad principle contains leftovers"),
        (f"Bad: {BAD}\nGood: {GOOD[:-1]}</s>.", "the good principle contains leftovers"),
        (f"Bad: {BAD}\nGood: [INST] {GOOD}", "the good principle contains leftovers"),
        (f"Bad: {BAD}\nGood: For {{query}}, {GOOD}", "the good principle contains leftovers"),
        (f"Bad: {BAD}\nGood: **{GOOD}**", "the good principle contains leftovers"),
        (f"Bad: {GOOD}\nGood: {GOOD.upper()}", "both principles are the same"),
        (f"Bad: {BAD}\nGood: {GOOD} {GOOD} {GOOD}", "the principles differ too much in length"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text: str, reason: str):
    parsed = parse_principles(text)
    assert isinstance(parsed, str)
    assert parsed.startswith(reason)


def test_the_prompt_shows_parseable_examples_and_ends_with_the_query():
    query = make("Use {query} and {braces}, please.\nBad: x")
    messages = principle_messages(query)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[-1]["content"].endswith(f"Request: {query.text}")
    for shot in messages[1::2]:
        bad, good = shot["content"].splitlines()
        assert isinstance(parse_principles(f"{bad} Be vague.\n{good} Be exact."), PrinciplePair), shot["content"]
        assert parse_principles(shot["content"]) == "repeats an example of the prompt"
        assert parse_principles(f"{bad}\n{good} Be exact.") == "repeats an example of the prompt"
    assert principle_messages(make("other"))[:-1] == messages[:-1]


# --- generation ------------------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that answers in a shuffled order: the text of each query's try, or nonsense."""

    def __init__(self, texts: dict[tuple[str, int], str]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, int, int]] = []
        """Query, number of the try, seed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        taken = list(requests)
        random.Random(0).shuffle(taken)
        for request in taken:
            query = request.messages[-1]["content"].rpartition("Request: ")[2]
            number = sum(query == other for other, _, _ in self.asked)
            self.asked.append((query, number, request.seed))
            yield Completion(
                key=request.key, text=self.texts.get((query, number), "nonsense"), token_ids=(), finish_reason="stop"
            )


def writer_of(section: sections.PrincipleSource, journal: Journal) -> Writer:
    return Writer(
        model_digest="m",
        prompts=Prompts(tiny_tokenizer()),
        sampling=Sampling(temperature=section.temperature),
        retries=section.retries,
        seed=3,
        journal=journal,
    )


def generated(engine: Scripted, section: sections.PrincipleSource, folder: Path, *texts: str) -> dict[str, Principles]:
    queries = [make(text) for text in texts]
    with Journal(folder) as journal:
        writer = writer_of(section, journal)
        write_principles(writer, lambda: queries, Sampler(lambda: engine, writer.prompts), total=len(queries))
        pool = load_pool(section)
        return {query.text: written_principles(query, writer, pool) for query in queries}


def test_unparseable_answers_are_asked_again_and_then_replaced(tmp_path: Path):
    section = source(source="generate", retries=2, concision=0)
    scripted = Scripted({("a", 0): PARSEABLE, ("b", 2): PARSEABLE})
    given = generated(scripted, section, tmp_path, "a", "b", "c")
    pair = Principles(good=GOOD, bad=BAD, quality="generated", source="generated")
    assert (given["a"], given["b"]) == (pair, pair)
    library_pair = choose_principles(make("c"), load_pool(section), 3)
    assert (given["c"].good, given["c"].source) == (library_pair.good, "library")
    assert given["c"].fallback == "1 lines instead of two (try 3 of 3)"
    assert Counter(text for text, _, _ in scripted.asked) == {"a": 1, "b": 3, "c": 3}
    assert len({seed for _, _, seed in scripted.asked}) == 7
    assert all(0 <= seed < 2**31 for _, _, seed in scripted.asked)
    again = Scripted({})
    assert generated(again, section, tmp_path, "a", "b", "c") == given
    assert again.asked == []


def test_attempts_are_the_same_in_every_run_and_company(tmp_path: Path):
    section = source(source="generate", retries=1)
    alone, together = Scripted({}), Scripted({("b", 0): PARSEABLE})
    generated(alone, section, tmp_path / "alone", "a")
    generated(together, section, tmp_path / "together", "b", "a", "c")
    assert alone.asked == [tried for tried in together.asked if tried[0] == "a"]


def test_a_run_folder_of_an_earlier_version_still_holds(tmp_path: Path):
    """The seed of a query's second try, which is part of its key, as it was first released."""
    with Journal(tmp_path) as journal:
        writer = writer_of(source(source="generate"), journal)
        assert writer.request(make("a"), 1).seed == 1977024207


def test_generated_pairs_get_concision_too(tmp_path: Path):
    given = generated(Scripted({("a", 0): PARSEABLE}), source(source="generate", concision=1), tmp_path, "a")["a"]
    assert given.concision
    assert given.good.startswith(f"{GOOD} ")
    assert given.bad.startswith(f"{BAD} ")


def test_at_temperature_0_nothing_is_asked_twice(tmp_path: Path):
    scripted = Scripted({})
    given = generated(scripted, source(source="generate", retries=5, temperature=0), tmp_path, "a")
    assert len(scripted.asked) == 1
    assert given["a"].fallback == "1 lines instead of two (try 1 of 1)"


def test_queries_are_taken_as_the_engine_asks_for_them(tmp_path: Path):
    taken: list[str] = []
    seen: list[int] = []

    def queries() -> Iterator[Query]:
        for query in QUERIES[:5]:
            taken.append(query.id)
            yield query

    class OneByOne(Scripted):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for request in requests:
                seen.append(len(taken))
                yield Completion(key=request.key, text=PARSEABLE, token_ids=(), finish_reason="stop")

    with Journal(tmp_path) as journal:
        writer = writer_of(source(source="generate"), journal)
        write_principles(writer, queries, Sampler(lambda: OneByOne({}), writer.prompts), total=5)
    assert seen == [1, 2, 3, 4, 5]


def test_an_attempt_without_an_answer_does_not_pass_silently(tmp_path: Path):
    class Forgetful(Scripted):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from [*super().generate(requests)][:1]

    with pytest.raises(KeyError):
        generated(Forgetful({}), source(source="generate"), tmp_path, "a", "b")


# --- files -----------------------------------------------------------------------------------------------------------------


def write(path: Path, *rows: object) -> sections.PrincipleSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return source(source="file", path=str(path), concision=0)


def test_a_files_row_with_a_query_serves_that_query_alone(tmp_path: Path):
    section = write(
        tmp_path / "p.jsonl",
        {"good": "G1", "bad": "B1", "quality": "wit"},
        {"good": "G2", "bad": "B2"},
        {"good": "G3", "bad": "B3", "query": "What  is a cat?"},
    )
    pool = load_pool(section)
    own = choose_principles(make("What is a cat?\n"), pool, 0)
    assert own == Principles(good="G3", bad="B3", quality="unnamed", source="file")
    assert {choose_principles(query, pool, 0).good for query in QUERIES[:50]} == {"G1", "G2"}
    only_wit = load_pool(section.model_copy(update={"qualities": ["wit"]}))
    assert {choose_principles(query, only_wit, 0).good for query in QUERIES[:50]} == {"G1"}
    assert choose_principles(make("What is a cat?"), only_wit, 0).good == "G3"


def test_a_query_that_the_file_does_not_serve_is_named(tmp_path: Path):
    pool = load_pool(write(tmp_path / "p.jsonl", {"good": "G", "bad": "B", "query": "What is a cat?"}))
    with pytest.raises(ValueError, match=r"no pair for the query 'What is a dog\?'; add a row with this query, or rows"):
        choose_principles(make("What is a dog?"), pool, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"good": "G"}],
            r"p\.jsonl: line 1: 'bad' is missing; a row needs good and bad as text, found the keys \['good'\]",
        ),
        ([{"good": "G", "bad": "B"}, {"good": 1, "bad": "B"}], r"p\.jsonl: line 2: 'good' is no text or is empty"),
        ([{"good": " ", "bad": "B"}], r"p\.jsonl: line 1: 'good' is no text or is empty"),
        ([{"good": "G", "bad": "B", "quality": 3}], r"p\.jsonl: line 1: 'quality' is no text or is empty"),
        ([{"good": "G ", "bad": " G"}], r"p\.jsonl: line 1: good and bad are the same text"),
        ([{"good": "G", "bad": "B", "qualty": "q"}], r"p\.jsonl: line 1: unknown keys \['qualty'\]; a row takes good, bad"),
        ([{"good": "G", "bad": "B", "query": "q"}] * 2, r"p\.jsonl: line 2: a second pair for the query 'q'; keep one"),
        (["G"], r"p\.jsonl: line 1 is text; expected one object a line"),
        ([], r"p\.jsonl: no principles; expected one"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_the_way_out(tmp_path: Path, rows: list[object], message: str):
    with pytest.raises(ValueError, match=message):
        load_pool(write(tmp_path / "p.jsonl", *rows))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"p\.jsonl: no such file; set principles\.path"):
        load_pool(source(source="file", path=str(tmp_path / "p.jsonl")))


# --- checks ----------------------------------------------------------------------------------------------------------------

SHORT = {"name": "length_constraints:number_words", "relation": "at most", "num_words": 40}
AS_TEXT = '{"name":"length_constraints:number_words","num_words":40,"relation":"at most"}'


def test_a_files_row_may_carry_checks(tmp_path: Path):
    rows = [
        {"good": "G1", "bad": "B1", "check": SHORT},
        {"good": "G2", "bad": "B2", "query": "how?", "checks": [SHORT, "punctuation:no_comma"]},
    ]
    pool = load_pool(write(tmp_path / "p.jsonl", *rows))
    assert choose_principles(make("why?"), pool, seed=0).checks == (AS_TEXT,)
    assert choose_principles(make("how?"), pool, seed=0).checks == (AS_TEXT, '{"name":"punctuation:no_comma"}')


def test_a_wrong_check_is_named_with_its_line_and_the_nearest_name(tmp_path: Path):
    section = write(tmp_path / "p.jsonl", {"good": "G1", "bad": "B1", "check": "punctuation:no_commas"})
    with pytest.raises(
        ValueError, match=r"p\.jsonl.*1.*no check 'punctuation:no_commas'; did you mean 'punctuation:no_comma'"
    ):
        load_pool(section)


def test_checks_travel_through_a_sealed_row_and_an_added_concision_pair():
    pool = load_pool(source(concision=1))
    pair = PrinciplePair(GOOD, BAD, "style", (AS_TEXT,))
    given = choose_principles(make("why?"), replace(pool, pairs=(pair,)), seed=0)
    assert given.concision
    assert given.checks == (AS_TEXT,)
    table = pa.Table.from_pylist([{"query_id": "q", "messages": [], "principles": asdict(given)}], schema=columns.PRINCIPLES)
    assert columns.principles(table.to_pylist()[0]) == given


@pytest.mark.parametrize("name", ["house-style", "checked-principles"])
def test_shipped_principle_files_carry_checks(name: str):
    file = Path(located(f"shipped:{name}.jsonl"))
    pool = load_pool(source(source="file", path=str(file)))
    assert pool.pairs
    assert all(pair.checks for pair in pool.pairs)
    assert len({pair.good for pair in pool.pairs}) == len(pool.pairs)


def test_a_writer_has_a_template_and_arguments_of_its_own(tiny_folder: str, tmp_path: Path):
    """And is told the day of the run; without a model of its own there is none."""
    template = tmp_path / "writer.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }} {{ mood }} {{ messages[-1].content }}<|im_end|>")
    policy = {"model": tiny_folder, "date": "2024-02-29", "template_arguments": {"mood": "the policy's"}}
    section = {
        "source": "generate",
        "model": tiny_folder,
        "chat_template": str(template),
        "template_arguments": {"mood": "calm"},
    }
    recipe = sections.Recipe.model_validate({"policy": policy, "queries": {"path": "q.jsonl"}, "principles": section})
    found = find_writer(recipe)
    assert found is not None
    writer, prompts = found
    assert writer.path == tiny_folder
    text = prompts.tokenizer.decode(prompts.prompt_ids(({"role": "user", "content": "Why?"},)))
    assert text.startswith("2024-02-29 calm Why?")
    other = recipe.model_copy(
        update={"principles": recipe.principles.model_copy(update={"template_arguments": {"mood": "x"}})}
    )
    assert prompts.digest != found_digest(other), "another answer is asked for"
    assert find_writer(recipe.model_copy(update={"principles": sections.PrincipleSource(source="generate")})) is None


def found_digest(recipe: sections.Recipe) -> str:
    found = find_writer(recipe)
    assert found is not None
    return found[1].digest


@pytest.mark.parametrize("key", ["chat_template", "template_arguments"])
def test_settings_of_a_writer_need_one(key: str):
    value = "t.jinja" if key == "chat_template" else {"enable_thinking": False}
    with pytest.raises(ValueError, match=rf"{key} is of principles.model; the policy's own is policy.{key}"):
        source(source="generate", **{key: value})


def test_a_writer_s_missing_template_is_told_before_anything_is_sampled(tiny_folder: str, tmp_path: Path):
    (tmp_path / "q.jsonl").write_text('{"query": "Why?"}\n')
    section = {"source": "generate", "model": tiny_folder, "chat_template": str(tmp_path / "none.jinja")}
    recipe = sections.Recipe.model_validate(
        {"policy": {"model": tiny_folder}, "queries": {"path": str(tmp_path / "q.jsonl")}, "principles": section}
    )
    with pytest.raises(FileNotFoundError, match=r"none\.jinja"):
        pipeline.prepare(recipe)
