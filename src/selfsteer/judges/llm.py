"""Judges of preference pairs: which of two responses is better, and does that agree with chosen above rejected?

judge                   who says which response is better                         costs a pair
sampled_verdicts        an LLM behind any engine, by P(A) and P(B) where the      two short answers
                        engine tells them, else by one letter, in both orders
embedded_verdicts       an LLM in this process, by P(A) and P(B), in both orders  two prompts, nothing is sampled
reward_verdicts         a sequence-classification reward model                    two sequences
(implicit.py)           the trained or the steered policy itself                  at most one forward pass

Every judge yields a `Verdict` for every pair, in order; `verdicts.judge_report` turns them into numbers. What a judge said
is journalled under a content key and never asked twice; what it failed to say is asked again by the next run.

Left out on purpose: which judge a recipe names, gates on its report, grades of single responses.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from selfsteer.engines.base import Completion, Engine, Failed, Request, Sampling
from selfsteer.engines.sampling import Question, unread
from selfsteer.judges.base import Pairs, RecipeJudge, not_refused, with_refused
from selfsteer.measures.verdicts import Orders, Verdict, by_orders, failure, no_answer
from selfsteer.prompts import THOUGHT_ENDS, Prompts
from selfsteer.recipe.sections import Training
from selfsteer.recipe.shipped import template
from selfsteer.records import Message, Pair, side, user_turn
from selfsteer.runtime import progress, raise_if_stopped
from selfsteer.store.durable import digest, read_small_text, regular_file
from selfsteer.store.folder import SCHEMA_VERSION
from selfsteer.store.journal import Journal
from selfsteer.training.scoring import Group, Scorer, score_missing, scores

FIRST, SECOND = "A", "B"
"""The closed set of answers: the response shown first is better, or the second."""

_PLACES = ("fence", "request", "first", "second")

_PLACE = re.compile(r"\{(" + "|".join(_PLACES) + r")\}")

_SHORTEST_FENCE = 8


def judge_template(path: Path | None = None) -> str:
    """The built-in pairwise prompt, or a file's. ValueError, naming them, when places are missing."""
    if path is None:
        return template("judge_pairwise.txt")
    regular_file(path, "set judge.template in the recipe")
    text = read_small_text(path)
    missing = [place for place in _PLACES if f"{{{place}}}" not in text]
    if missing:
        raise ValueError(
            f"{path}: a judge's template needs the places {{fence}}, {{request}}, {{first}} and {{second}}; {missing} are"
            f" missing. It must ask for exactly {FIRST} or {SECOND}."
        )
    return text


def judge_messages(template: str, prompt: Iterable[Message], first: str, second: str) -> tuple[Message, ...]:
    """The judge's prompt. What it is to judge stands between marks with a code that occurs in none of these texts.

    Texts are filled in at once, so that a place named in one of them stays as it is.
    """
    request = _request_text(tuple(prompt))
    texts = {"request": request, "first": first, "second": second}
    filled = texts | {"fence": _fence(request, first, second)}
    return user_turn(_PLACE.sub(lambda place: filled[place[1]], template))


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


def questions(template: str, pair: Pair) -> BothOrders:
    """The judge's prompts for a pair."""
    return BothOrders(
        judge_messages(template, pair.prompt, pair.chosen.text, pair.rejected.text),
        judge_messages(template, pair.prompt, pair.rejected.text, pair.chosen.text),
    )


Rendered = tuple[tuple[int, ...], ...]
"""Token ids of the prompts of a `BothOrders`."""


def rendered(asked: Sequence[tuple[Message, ...]], prompts: Prompts | None, limit: int) -> Rendered | str:
    """The prompts as token ids (none for a server that renders them itself), or why the judge must not be asked."""
    if prompts is None:
        return ((),) * len(asked)
    found: list[tuple[int, ...]] = []
    for messages in asked:
        ids = prompts.checked_ids(messages)
        if isinstance(ids, str):
            return ids
        if len(ids) > limit:
            return "too long for the judge"
        found.append(ids)
    return tuple(found)


log = logging.getLogger(__name__)

_SPACES = " \t\r\n\u2581\u0120\u010a"
"""White space around a letter in the text of a token; the last three are SentencePiece's and byte-level BPE's."""

_RETRY_TEMPERATURE = 0.7
"""Of the further tries after an unreadable answer; the first one is greedy and would repeat itself."""

# --- an LLM behind an engine -----------------------------------------------------------------------------------------------


def question(judge: RecipeJudge, messages: tuple[Message, ...], attempt: int) -> Request:
    """One try of one question, under a key of what determines the answer; not yet rendered."""
    section = judge.section
    temperature = _RETRY_TEMPERATURE if attempt else 0.0
    sampling = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=section.max_new_tokens)
    return keyed(judge, messages, sampling, schema=SCHEMA_VERSION, top_logps=section.top_logps, attempt=attempt)


def keyed(judge: RecipeJudge, messages: tuple[Message, ...], sampling: Sampling, **more: int) -> Request:
    """A question under a key of what determines the answer, `more` beside judge, prompt and sampling; not yet rendered."""
    content = {
        "judge": judge.name,
        "messages": list(messages),
        "prompts": None if judge.prompts is None else judge.prompts.digest,
        **asdict(sampling),
        **more,
    }
    key = digest(content)
    top_logps = more.get("top_logps", 0)
    return Request(key=key, messages=messages, sampling=sampling, seed=int(key[:8], 16), top_logps=top_logps)


LEAST_MASS = 0.02
"""Of the two letters among the likely first tokens, below which they are the tails of something else that the judge is
about to write, such as a thought: nothing is read from their ratio then, but from what it wrote."""

TAILS = 1e-4
"""The same of a judge in this process, which writes nothing that could be read instead: only what is certainly a tail costs
its row. (A judge that thinks first gives its letters 1e-6; of SmolLM2-135M, which hardly judges, they hold a third.)"""


class Answer(NamedTuple):
    """What one answer says."""

    first: float
    """Probability of `FIRST`, renormalised over the closed set; 1 or 0 of a letter that was only written."""
    mass: float | None = None
    """Probability of the closed set; None of a letter that was only written."""


def parse_answer(text: str) -> str | None:
    """`FIRST` or `SECOND` where the answer is exactly that, but for white space around it and a thought before it; else
    None: unreadable."""
    answer = THOUGHT_ENDS.split(text)[-1].strip()
    return answer if answer in (FIRST, SECOND) else None


def letter_logps(tokens: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probability of each letter: tokens that say it, such as "A" and " A", are summed. -inf where none says it."""
    mass = dict.fromkeys((FIRST, SECOND), 0.0)
    for text, logp in tokens:
        letter = text.strip(_SPACES)
        if letter in mass:
            mass[letter] += math.exp(logp)
    return {letter: math.log(value) if value else -math.inf for letter, value in mass.items()}


def letter_probability(logps: Mapping[str, float]) -> Answer | None:
    """From log-probabilities by letter, as the embedded model or an engine gives them; None where neither is possible.

    A judge in this process is held to nothing more: its two letters are scored, whatever else it might have written, and
    `mass` says how much that was.
    """
    first, second = logps[FIRST], logps[SECOND]
    if first == second == -math.inf:
        return None
    # Stable for letters that are both improbable, unlike a quotient of probabilities.
    return Answer(1 / (1 + math.exp(min(second - first, 700.0))), math.exp(first) + math.exp(second))


def sampled_verdicts(
    judge: RecipeJudge, pairs: Pairs, open_engine: Callable[[], Engine], journal: Journal, *, total: int
) -> Iterator[Verdict]:
    """The verdicts of an LLM that answers with a letter: by the letter's probability where the engine tells it, else by
    the letter. total, the number of pairs, is for the progress bar.

    An answer that can't be read is asked for again, a request that fails costs its pair, and an engine that does not start
    or breaks off costs the pairs that it has not answered. Raises Interrupted, with all answers durable, when a signal
    asked to stop.
    """
    failures = _Failures()
    refused: dict[int, str] = {}
    limit = judge.longest_prompt(judge.section.max_new_tokens)

    def checked(asked: Iterable[list[Request]]) -> Iterator[Request]:
        """All pairs' at the first try, to be checked; notes why a pair, by its number, must not be asked about."""
        for number, requests in enumerate(asked):
            found = rendered([request.messages for request in requests], judge.prompts, limit)
            if isinstance(found, str):
                refused[number] = found
                continue
            for request, prompt_ids in zip(requests, found, strict=True):
                yield replace(request, prompt_ids=prompt_ids)

    def both_orders() -> Iterator[list[Question]]:
        return ([partial(question, judge, messages) for messages in questions(judge.template, pair)] for pair in pairs())

    tries = 1 + judge.section.retries
    for asked in unread(both_orders, journal, lambda key: _read(journal, key) is not None, tries=tries):
        wanted = journal.lacking(checked(asked), key=lambda request: request.key)
        if wanted is None:  # perhaps a later try was broken off
            continue
        with progress("verdicts", 2 * total, unit="answers") as advance:
            answers = _answers(open_engine, wanted, failures)
            journal.fill(((answer.key, _data(answer)) for answer in answers), advance)
        raise_if_stopped()
        if failures.gone:
            for _ in wanted:  # those that must not be asked are named all the same
                pass
            break
    yield from with_refused(pairs, refused, lambda pair: _verdict(judge, pair, journal, failures.reasons))


@dataclass(slots=True)
class _Failures:
    """What one run did not get answered."""

    reasons: dict[str, str] = field(default_factory=dict[str, str])
    """Of requests that failed one by one, by their keys."""
    gone: bool = False
    """The engine broke off, or did not start."""

    def give_up(self, error: OSError) -> None:
        self.gone = True
        log.warning("the judge has gone; pairs that it has not answered get no verdict until the next run: %s", error)


def _answers(open_engine: Callable[[], Engine], requests: Iterable[Request], failures: _Failures) -> Iterator[Completion]:
    """The answers; notes why requests failed. An engine that breaks off ends them."""
    with ExitStack() as stack:
        try:
            answers = stack.enter_context(open_engine()).generate(requests)
            answer = next(answers, None)
            while answer is not None:
                if isinstance(answer, Failed):
                    failures.reasons[answer.key] = answer.reason
                else:
                    yield answer
                answer = next(answers, None)
        except OSError as error:
            failures.give_up(error)


def _data(answer: Completion) -> dict[str, object]:
    tokens = None if answer.first_logps is None else [list(token) for token in answer.first_logps]
    return {"text": answer.text, "finish_reason": answer.finish_reason, "first_logps": tokens}


def _read(journal: Journal, key: str) -> Answer | None:
    """What an answer says; None where it can't be read."""
    answer = journal.get(key)
    tokens, text = answer["first_logps"], answer["text"]
    letter = parse_answer(text) if answer["finish_reason"] == "stop" else None
    if tokens and not _thought_first(tokens, text, letter):
        likely = letter_probability(letter_logps(tokens))
        if likely is not None and likely.mass is not None and likely.mass >= LEAST_MASS:
            return likely
    return None if letter is None else Answer(float(letter == FIRST))


def _thought_first(tokens: Sequence[tuple[str, float]], text: str, letter: str | None) -> bool:
    """Whether the judge thought before it answered, so that its first tokens are not of its answer.

    The thought stands in the text, or a server has taken it out: then all that is left is a letter, and yet the likeliest
    beginning is none.
    """
    likeliest = max(tokens, key=lambda token: token[1])[0].strip(_SPACES)
    return THOUGHT_ENDS.search(text) is not None or (letter is not None and likeliest not in (FIRST, SECOND))


def _verdict(judge: RecipeJudge, pair: Pair, journal: Journal, failed: Mapping[str, str]) -> Verdict:
    said: list[Answer] = []
    for messages in questions(judge.template, pair):
        tries = [question(judge, messages, attempt).key for attempt in range(1 + judge.section.retries)]
        answered = [key for key in tries if key in journal]
        answer = next((answer for key in answered if (answer := _read(journal, key)) is not None), None)
        if answer is None and len(answered) == len(tries):
            return failure(pair, "unreadable answer")
        if answer is None:
            return failure(pair, no_answer(next((failed[key] for key in tries if key in failed), None)))
        said.append(answer)
    return _by_answers(pair, said)


def _by_answers(pair: Pair, said: Sequence[Answer]) -> Verdict:
    """Of the answers with the chosen response first, and with it second."""
    chosen_first, chosen_second = said
    masses = [answer.mass for answer in said if answer.mass is not None]
    mass = sum(masses) / len(masses) if masses else None
    return by_orders(pair, Orders(chosen_first.first, 1 - chosen_second.first), mass=mass)


# --- an LLM in this process: probabilities instead of samples --------------------------------------------------------------


_LETTER = 4
"""Tokens that a letter takes at most, with its end."""


def embedded_verdicts(judge: RecipeJudge, pairs: Pairs, journal: Journal, *, total: int) -> Iterator[Verdict]:
    """Verdicts from the probabilities of the two letters, renormalised over them, in both orders: nothing is sampled.

    Each order is one prompt with two completions behind it, in the packed forward pass that scores pairs. total, the
    number of pairs, is for the progress bar. Raises Interrupted, with all scores durable, when a signal asked to stop.
    """
    assert judge.model is not None
    assert judge.prompts is not None
    scorer = Scorer(judge.model, judge.policy, judge.prompts, Training(dtype=judge.section.dtype))
    limit = judge.longest_prompt(_LETTER)
    refused: dict[int, str] = {}

    def why_not(pair: Pair) -> str | None:
        found = rendered(questions(judge.template, pair), judge.prompts, limit)
        return found if isinstance(found, str) else None

    def group(pair: Pair) -> Group:
        return scorer.group([_letters(pair, messages) for messages in questions(judge.template, pair)])

    asked = map(group, not_refused(pairs, why_not, refused))
    score_missing(scorer, asked, journal, description="verdicts", total=total)
    yield from with_refused(pairs, refused, lambda pair: _embedded_verdict(pair, scores(journal, group(pair))))


def _embedded_verdict(pair: Pair, both: Sequence[Pair]) -> Verdict:
    said = [letter_probability({FIRST: one.chosen.score.logps, SECOND: one.rejected.score.logps}) for one in both]
    likely = [answer for answer in said if answer is not None and answer.mass is not None and answer.mass >= TAILS]
    if len(likely) < len(said):
        return failure(pair, "no letter among what the judge would likely say")
    return _by_answers(pair, likely)


def _letters(pair: Pair, asked: tuple[Message, ...]) -> Pair:
    """The two answers as completions of the judge's prompt, without an end token: their probability is the letters' own."""
    first, second = side(FIRST, "length"), side(SECOND, "length")
    return Pair(query_id=pair.query_id, kind="given", prompt=asked, chosen=first, rejected=second)
