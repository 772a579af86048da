"""From messages to token ids: x, x+ and x-.

A principle becomes the system message; where a template knows no system role it goes before the first user turn. User text
can never introduce a special token: a prompt whose special tokens differ from those of the same conversation with harmless
text is quarantined, and so is text that spells what a template writes around turns as plain text ("### Response:").

A thought before an answer is no part of a response: templates that have a model think are refused, a response with a thought
is dropped, and of a text made elsewhere what stands behind the thought is taken.
"""

import json
import logging
import re
import signal
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from functools import cached_property
from string import ascii_letters
from typing import Any, Literal, NamedTuple, Self, cast

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selfsteer.recipe.sections import Policy
from selfsteer.records import FinishReason, Message, Side
from selfsteer.store.durable import digest

log = logging.getLogger(__name__)

_HARMLESS = "a"
_MARKER = "selfsteer-marker"

_PROBE = f"{_MARKER}: <A> & 'b'  \"c\"\n\n" + "What stands there? " * 200 + _MARKER
"""What a template that cuts texts, escapes them or writes them otherwise would change."""

_LEFT_OUT = "text that the chat template leaves out or changes"

_THOUGHT_NAMES = r"(?:think|thinking|thought|reasoning|reflection)"

_THOUGHT_BEGINS = re.compile(rf"<(?:seed:)?{_THOUGHT_NAMES}>|<\|?begin_of_thought\|?>|\[THINK\]|◁think▷", re.IGNORECASE)

THOUGHT_ENDS = re.compile(rf"</(?:seed:)?{_THOUGHT_NAMES}>|<\|?end_of_thought\|?>|\[/THINK\]|◁/think▷", re.IGNORECASE)
"""What models put behind their thought where no server takes it out of the text."""


def behind_thought(text: str) -> str | None:
    """What a model says after it has thought; the whole text where it has not, None where its thought never ends."""
    said = THOUGHT_ENDS.split(text)[-1]
    if _THOUGHT_BEGINS.match(said.lstrip()):
        return None
    return text if said == text else said.lstrip()


_NOW = "strftime_now"

_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in ascii_letters]
"""What a format of the date may ask for: %d, and %-d without a zero before it."""


def _dated(template: str, day: date) -> str:
    """The template with a function of its own, in a line before it, that writes that day at midnight where it asks for now.

    transformers hands templates plain data and its own strftime_now, which knows no other day than today.
    """
    said = json.dumps({directive: day.strftime(directive) for directive in _DIRECTIVES})
    function = (
        f"{{% macro {_NOW}(format) %}}{{% set said = {said} %}}"
        "{% for text in format.split('%%') %}{{ '' if loop.first else '%' }}"
        "{% for part in text.split('%') %}{% if loop.first %}{{ part }}{% else %}"
        "{% set length = 2 if '%' ~ part[:2] in said else 1 %}"
        "{{ said.get('%' ~ part[:length], '%' ~ part[:length]) }}{{ part[length:] }}"
        "{% endif %}{% endfor %}{% endfor %}{% endmacro %}"
    )
    return f"{function}\n{template}"


# What Python raises, beside jinja2's own errors, for what a template may do: add a number to a text, divide by zero, ask for
# more memory than there is.
_IN_TEMPLATES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


_SECONDS = 20.0
"""What a template may take for one conversation; those of models take milliseconds."""


class _TooLong(Exception):
    """The time of a template is over."""


@contextmanager
def _in_time() -> Generator[None]:
    """Raises _TooLong in the block after `_SECONDS`; in the main thread alone, which hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, over)
    others = signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before)


def _applied(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], *, header: bool, **given: Any) -> str:
    """The conversation as the chat template writes it. Raises jinja2's TemplateError where it does not.

    Raises ValueError where the template takes longer than any would that ends.
    """
    try:
        with _in_time():
            written = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=header, **given)
    except _TooLong:
        raise ValueError(
            f"the chat template writes for more than {_SECONDS:.0f} seconds at one conversation; mend it (loops within"
            " loops?), or name another with policy.chat_template: FILE.jinja"
        ) from None
    except _IN_TEMPLATES as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    return cast(str, written)


class AssistantTurn(NamedTuple):
    """What a chat template writes around what an assistant says."""

    before: str
    """White space between the header of an answer and its text (Llama 2's space); mostly none."""
    behind: str
    """Up to the first control token, which closes the turn; empty where the template writes none."""
    end_id: int
    """That control token; the tokenizer's end token where the template writes none."""


def assistant_turn(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None, ends: Collection[int] = ()
) -> AssistantTurn:
    """How the chat template, given these arguments, closes an assistant's turn.

    Gemma's, for one, closes turns with <end_of_turn> while its end token is <eos>, which stands in no conversation.
    ends: what the model stops at; it may be what opens the next turn, as GLM-4's <|user|>.
    """
    if tokenizer.chat_template is None:
        return AssistantTurn("", "", cast(int, tokenizer.eos_token_id))
    asked = [{"role": "user", "content": _HARMLESS}]
    answered = [*asked, {"role": "assistant", "content": _MARKER}]
    header, rendered, more = "", "", arguments or {}
    with suppress(TemplateError):  # that an assistant has the last word; what else is wrong is told where it is first used
        header = _applied(tokenizer, asked, header=True, **more)
        rendered = _applied(tokenizer, answered, header=False, **more)
    start, marker, rest = rendered.rpartition(_MARKER)
    before = start.removeprefix(header) if start.startswith(header) else ""
    before = before if before.isspace() else ""
    behind = (_up_to_control(tokenizer, rest) if marker else "") or _between_turns(tokenizer, more, ends)
    closing = max((text for text in _added(tokenizer) if behind.endswith(text)), key=len, default=None)
    return AssistantTurn(
        before, behind, cast(int, tokenizer.eos_token_id) if closing is None else _added(tokenizer)[closing]
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens, marked special or not: where the template puts one behind a turn, it is to end it.

    None of white space, which is text: Gemma's has runs of line ends among them.
    """
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def _up_to_control(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text up to its first added token, that included; empty where it has none."""
    found = [(at, -len(token)) for token in _added(tokenizer) if (at := text.find(token)) >= 0]
    at, length = min(found, default=(0, 0))
    return text[: at - length]


def _between_turns(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], ends: Collection[int]) -> str:
    """What ends an answer where a template ends only those that a turn of the user follows.

    Not what opens that turn, unless the model stops at it.
    """
    turns = [{"role": role, "content": _MARKER} for role in ("user", "assistant", "user")]
    with suppress(TemplateError):
        opening, *others = _applied(tokenizer, turns, header=False, **arguments).split(_MARKER)
        if len(others) == len(turns):
            behind = _up_to_control(tokenizer, others[1])
            opens = (token for token, number in _added(tokenizer).items() if token in opening and number not in ends)
            return "" if behind.endswith(tuple(opens)) else behind
    return ""


class Prompts:
    """Renders conversations with one tokenizer's chat template; what a prompt looks like is decided here."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_role: Literal["auto", "system", "user"] = "auto",
        arguments: Mapping[str, Any] | None = None,
        day: date | None = None,
        ends: Collection[int] = (),
    ) -> None:
        """arguments: of the chat template; day: what it is told of the date, today's when empty; ends: the tokens that the
        model folder names as such.
        """
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._day = day or datetime.now(UTC).date()
        self._turn = assistant_turn(tokenizer, self._given, ends)
        self._ends = frozenset((self._turn.end_id, *ends))
        self.system_role = self._detect_system_role() if system_role == "auto" else system_role
        self.special_ids = frozenset(tokenizer.all_special_ids) | self._controls()
        self._control_text = self._plain_controls()
        self._expected_specials: dict[tuple[str, ...], list[int]] = {}
        self._harmless_marks: dict[tuple[str, ...], list[int]] = {}

    @classmethod
    def of(cls, policy: Policy, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> Self:
        """As the policy's section of a recipe says."""
        day = None if policy.date is None else date.fromisoformat(policy.date)
        return cls(tokenizer, system_role=policy.system_role, arguments=policy.template_arguments, day=day, ends=ends)

    @property
    def end_id(self) -> int:
        """What closes an assistant's turn; an engine has to stop at it, whatever the generation configuration lists."""
        return self._turn.end_id

    @cached_property
    def digest(self) -> str:
        """Digest of what determines the token ids of messages: with theirs, that of the ids."""
        size, some = 1 + max(self.known_ids), 4096
        parts = (range(start, min(start + some, size)) for start in range(0, size, some))
        # Those of tiktoken's kin, which come with code of their own, are bytes.
        vocabulary = [digest([*map(str, self.tokenizer.convert_ids_to_tokens(list(ids)))]) for ids in parts]
        template: dict[str, Any] = {"chat_template": self.tokenizer.chat_template, "system_role": self.system_role}
        template |= {"arguments": self.arguments} if self.arguments else {}
        template |= {"date": self._day.isoformat()} if self._asks_for_the_date() else {}
        return digest({**template, "vocabulary": vocabulary})

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """The ids of all tokens (`models.known_ids`)."""
        return frozenset(self.tokenizer.get_vocab().values()).union(self.tokenizer.all_special_ids)

    def fold(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The query as this template can render it: without a system role, its system message begins the user's turn."""
        if self.system_role == "system" or messages[0]["role"] != "system":
            return messages
        system, *rest = messages
        return _before_first_user_turn(tuple(rest), system["content"])

    def steer(self, messages: tuple[Message, ...], principle: str) -> tuple[Message, ...]:
        """x+ or x-: the query under a principle. A system message of the query's own stays, before the principle."""
        if self.system_role == "user" and messages[0]["role"] == "system":
            system, *others = messages
            return self.fold((Message(role="system", content=f"{system['content']}\n\n{principle}"), *others))
        first, *rest = messages
        if first["role"] == "system":
            return (Message(role="system", content=f"{first['content']}\n\n{principle}"), *rest)
        if self.system_role == "system":
            return (Message(role="system", content=principle), *messages)
        return _before_first_user_turn(messages, principle)

    def prompt_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """The rendered conversation with the header of the answer behind it, as token ids."""
        return self._ids(self._render(messages))

    def conversation_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """The same without that header: a conversation that the assistant has ended."""
        return self._ids(self._rendered(messages, self._given, header=False))

    def length_beyond(self, messages: tuple[Message, ...], limit: int) -> int | None:
        """The number of tokens of a rendered conversation that has more than `limit`; None of one that fits."""
        text = self._render(messages)
        # A token is at least a character long (a tokenizer may put one space before it all), and no normaliser makes more of
        # ASCII: most prompts fit without being tokenised.
        if text.isascii() and len(text) < limit:
            return None
        length = len(self._ids(text))
        return length if length > limit else None

    def completion_ids(self, text: str, finish: FinishReason, prompt: tuple[Message, ...] | None = None) -> tuple[int, ...]:
        """The ids of a response of which only the text is known, as it stands behind its prompt; else behind any prompt.

        Prompt and response are encoded as one string, with what the template writes around an assistant's turn, and the
        response is what follows the prompt's own ids. Where a token straddles the boundary, the response is encoded by
        itself: a model that is asked with this prompt could never sample that token, and the completions of a prompt must
        stand behind the same ids.
        """
        header = self._render(prompt or (Message(role="user", content=_HARMLESS),))
        response = self._turn.before + text + (self._turn.behind if finish == "stop" else "")
        asked, whole = self._ids(header), self._ids(header + response)
        ids = whole[len(asked) :] if whole[: len(asked)] == asked else self._alone(response)
        return (*ids, self._turn.end_id) if finish == "stop" and not self._turn.behind else ids

    def _alone(self, text: str) -> tuple[int, ...]:
        """A text behind what it does not merge with: at the beginning of all, SentencePiece would put a space before it."""
        anchor = _HARMLESS if text[:1].isspace() else "\n"
        start, whole = self._ids(anchor), self._ids(anchor + text)
        return whole[len(start) :] if whole[: len(start)] == start else self._ids(text)

    def without_turn(self, text: str) -> str:
        """What a server returns as the text of an answer, without the white space that the turn begins with."""
        return text.removeprefix(self._turn.before)

    def response_ids(self, said: Side, prompt: tuple[Message, ...]) -> tuple[int, ...]:
        """A response as token ids: those that were sampled, else those of its text behind the prompt."""
        return self.completion_ids(said.text, said.finish, prompt) if said.token_ids is None else said.token_ids

    def spells(self, ids: Sequence[int], said: Side) -> bool:
        """Whether these ids, of a file made elsewhere, are this response as it could have been sampled."""
        body = ids[:-1] if said.finish == "stop" else ids
        ended = said.finish == "length" or ids[-1] in self.special_ids | self._ends
        if not ended or not self.known_ids.issuperset(ids) or not self.special_ids.isdisjoint(body):
            return False
        return self.tokenizer.decode(list(body), clean_up_tokenization_spaces=False) == said.text

    def text(self, ids: Sequence[int]) -> str:
        """What sampled ids say, without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token_id: int) -> str:
        """A token as vLLM writes it: its text, and where that is none (a part of a character) its name in the vocabulary."""
        text = cast(str, self.tokenizer.decode([token_id]))
        return cast(str, self.tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text else text

    def checked_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...] | str:
        """`prompt_ids`, or why this conversation must not be rendered (its text contains what opens or closes turns)."""
        if any(self._spells_control(message["content"]) for message in messages):
            return "control text of the chat template in the text"
        roles = tuple(message["role"] for message in messages)
        try:
            text = self._render(messages)
        except TemplateError as error:
            return f"refused by the chat template: {error.message}"
        if _left_out(messages, text):
            return _LEFT_OUT
        rendered = self._ids(text)
        if roles not in self._expected_specials:
            harmless = tuple(Message(role=role, content=_HARMLESS) for role in roles)
            self._expected_specials[roles] = self._specials(self.prompt_ids(harmless))
        return rendered if self._specials(rendered) == self._expected_specials[roles] else "special tokens in the text"

    def quarantine_reason(self, messages: tuple[Message, ...]) -> str | None:
        """Why this conversation must not be rendered, or None."""
        if self._marks is not None and not any(self._spells_control(message["content"]) for message in messages):
            # Each of them as often as with harmless text: no token is added, and none is lost.
            with suppress(TemplateError):
                roles, text = tuple(message["role"] for message in messages), self._render(messages)
                if not _left_out(messages, text) and self._count_marks(text) == self._expected_marks(roles):
                    return None
        found = self.checked_ids(messages)
        return found if isinstance(found, str) else None

    def contains_special(self, text: str) -> bool:
        """Whether a completion's text would be read as containing special tokens, or what else opens and closes turns."""
        if self._spells_control(text):
            return True
        if self._marks is not None and not any(mark in text for mark in self._marks):
            return False
        return not self.special_ids.isdisjoint(self._ids(text))

    def _spells_control(self, text: str) -> bool:
        return self._control_text is not None and self._control_text.search(text) is not None

    @cached_property
    def _marks(self) -> tuple[str, ...] | None:
        """The special tokens as text, where nothing else is encoded as one of them; None where that can't be told.

        It holds of a BPE model that has no token for what is unknown to it (or falls back to bytes), whose special tokens
        are looked for in the text as it stands, before any normaliser, and are not what its merges make of that text.
        """
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return None
        backend = self.tokenizer.backend_tokenizer
        model, added = backend.model, self.tokenizer.added_tokens_decoder
        if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
            return None
        all_bytes = model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        if model.unk_token is not None and not all_bytes:
            return None
        for token_id in self.special_ids:
            token = added.get(token_id)
            if token is None or (token.normalized and backend.normalizer is not None):
                return None
            if token_id in {each.id for each in model.tokenize(token.content)}:
                return None
        return tuple(added[token_id].content for token_id in sorted(self.special_ids))

    def _expected_marks(self, roles: tuple[str, ...]) -> list[int]:
        if roles not in self._harmless_marks:
            harmless = tuple(Message(role=role, content=_HARMLESS) for role in roles)
            self._harmless_marks[roles] = self._count_marks(self._render(harmless))
        return self._harmless_marks[roles]

    def _count_marks(self, rendered: str) -> list[int]:
        return [rendered.count(mark) for mark in self._marks or ()]

    def _render(self, messages: tuple[Message, ...]) -> str:
        return self._rendered(messages, self._given)

    def _rendered(self, messages: tuple[Message, ...], given: Mapping[str, Any], *, header: bool = True) -> str:
        conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
        return _applied(self.tokenizer, conversation, header=header, **given)

    @cached_property
    def _given(self) -> dict[str, Any]:
        """What the template is rendered with."""
        dated = {"chat_template": _dated(self._template, self._day)} if self._asks_for_the_date() else {}
        return {**dated, **self.arguments}

    def _asks_for_the_date(self) -> bool:
        return _NOW in self._template

    @property
    def _template(self) -> str:
        """The one of several that is taken; empty where there is none."""
        return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else ""

    @cached_property
    def _encoder(self) -> Tokenizer | None:
        """What transformers encodes with, set up as it does for each call that asks for ids alone: nothing cut or padded."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return None
        encoder = self.tokenizer.backend_tokenizer
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def _ids(self, text: str) -> tuple[int, ...]:
        if self._encoder is not None:  # without the offsets, which nobody here asks for
            return tuple(self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return tuple(cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def _specials(self, ids: tuple[int, ...]) -> list[int]:
        return [token_id for token_id in ids if token_id in self.special_ids]

    def without_end(self, text: str) -> str:
        """A completion without the end tokens that some data sets write at its very end: the token is trained anyway."""
        ends = (str(self.tokenizer.eos_token), str(self.tokenizer.convert_ids_to_tokens(self._turn.end_id)))
        while (stripped := text.rstrip()).endswith(ends):
            text = next(stripped.removesuffix(end) for end in ends if stripped.endswith(end)).rstrip()
        return text

    def whole(self) -> Self:
        """Itself. Raises ValueError where nothing could be asked: the template fails, or leaves out what the user says, or
        the tokenizer takes what it writes between turns for plain text.
        """
        try:
            asked = self._render((Message(role="user", content=_PROBE),))
        except TemplateError as error:
            raise ValueError(
                f"the chat template fails at a question ({error.message}); mend it, or name another with"
                " policy.chat_template: FILE.jinja"
            ) from error
        if _PROBE not in asked:
            raise ValueError(
                "the chat template leaves out or changes what the user says (it may want the content as a list of parts);"
                " name another with policy.chat_template: FILE.jinja"
            )
        if opening := self._unasked():
            raise ValueError(
                f"the chat template writes {opening!r} before what the assistant says, but no prompt ends with it: the"
                " model would have to begin its own turn. Write it behind the last turn, in {% if add_generation_prompt %},"
                " and name that template with policy.chat_template: FILE.jinja"
            )
        spelled = [token for token in self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)) if token in asked]
        if spelled and not self._specials(self._ids(asked)):
            raise ValueError(
                f"the tokenizer splits {spelled[0]!r}, which the chat template writes, into pieces of plain text; set "
                "split_special_tokens to false in its tokenizer_config.json"
            )
        return self

    def _unasked(self) -> str:
        """What stands between a prompt and its answer, but for white space and thoughts (`direct` is about those)."""
        asked = (Message(role="user", content=_HARMLESS),)
        header = self._render(asked)
        try:
            answered = self._rendered((*asked, Message(role="assistant", content=_MARKER)), self._given, header=False)
        except TemplateError:  # what it refuses opens nothing
            return ""
        opening = answered.rpartition(_MARKER)[0]
        between = opening.removeprefix(header).strip() if opening.startswith(header) else ""
        return "" if THOUGHT_ENDS.search(between) else between

    def direct(self) -> Self:
        """Itself. Raises ValueError for a template that has the model think before it answers.

        What a model says behind a thought was sampled under that thought: trained and scored behind the bare prompt it would
        be another model's word.
        """
        asked = (Message(role="user", content=_MARKER),)
        header = self._render(asked).rpartition(_MARKER)[2]
        if _opens_thought(header):
            thinks = f"the chat template has the model think before it answers (a prompt ends in {header!r})"
            raise ValueError(f"{thinks}. {self._not_to_think()}")
        switch = "enable_thinking"
        if switch in self.arguments:
            return self
        if self._rendered(asked, {**self._given, switch: False}) != self._render(asked):
            raise ValueError(
                "the chat template lets the model think before it answers unless it is told not to. Set"
                f" policy.template_arguments={{{switch}: false}}, or name a template without it (policy.chat_template)"
            )
        return self

    def _not_to_think(self) -> str:
        """What keeps this template from opening a thought: an argument that it heeds, else only another template."""
        asked = (Message(role="user", content=_MARKER),)
        for switch in ("enable_thinking", "thinking"):
            with suppress(TemplateError):
                if not _opens_thought(self._rendered(asked, {**self._given, switch: False}).rpartition(_MARKER)[2]):
                    return (
                        f"Set policy.template_arguments={{{switch}: false}}, or name a template without it"
                        " (policy.chat_template)"
                    )
        return (
            "It heeds no argument against that: write a copy of the template that ends at the header of the answer, and name"
            " it with policy.chat_template: FILE.jinja"
        )

    def _written(self) -> Iterator[str]:
        """A few conversations as the template writes them, each with the header of an answer behind it."""
        user, assistant = Message(role="user", content=_MARKER), Message(role="assistant", content=_MARKER)
        for messages in ((user,), (user, assistant, user), (Message(role="system", content=_MARKER), user)):
            with suppress(TemplateError):  # what it refuses it can't write
                yield self._render(messages)

    def _controls(self) -> frozenset[int]:
        """Added tokens that are marked special, and those that the template writes: they open and close turns, too."""
        written = "\0".join(self._written())
        special = (token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset(special).union(token_id for text, token_id in _added(self.tokenizer).items() if text in written)

    def _plain_controls(self) -> re.Pattern[str] | None:
        """Finds what the template writes around turns in plain text, such as "### Response:" or "[INST]"; None for nothing.

        That is the last line before what somebody says, the first one behind it, and the tags in them. Words alone ("user",
        which ChatML writes behind its special token) are none, and a name with a colon is one only where the template puts
        it: at the beginning of a line, or behind a space.
        """
        specials = "|".join(map(re.escape, _added(self.tokenizer)))
        found: set[str] = set()
        for written in self._written():
            for piece in re.split(specials, written) if specials else [written]:
                before, *behind = piece.split(_MARKER)
                if not behind:
                    continue
                for text in (before, *behind[:-1]):
                    found |= _control_patterns(text, last=True)
                for text in behind:
                    found |= _control_patterns(text, last=False)
        return re.compile("|".join(sorted(found)), re.MULTILINE) if found else None

    def _detect_system_role(self) -> Literal["system", "user"]:
        try:
            text = self._render((Message(role="system", content=_MARKER), Message(role="user", content=_HARMLESS)))
        except TemplateSyntaxError as error:
            line = error.lineno - int(self._asks_for_the_date())  # `_dated` puts one before it
            raise ValueError(
                f"policy.chat_template: line {line} of the template can't be read: {error.message}. Mend it, or "
                "name another in the recipe."
            ) from error
        except TemplateError:
            text = ""
        if _MARKER in text:
            return "system"
        log.warning("the chat template knows no system role: principles go before the user's first turn")
        return "user"


def _opens_thought(header: str) -> bool:
    """Whether what a prompt ends in begins a thought and does not end it."""
    begun = [found.end() for found in _THOUGHT_BEGINS.finditer(header)]
    return bool(begun) and THOUGHT_ENDS.search(header, begun[-1]) is None


_TAG = re.compile(r"<\|[^<>|\s]+\|>|<</?\w+>>|</?\w+>|\[/?\w+\]")

_CONTROL_WORDS = 4
"""In a line of control text; longer ones are prose, such as a built-in system message."""


def _control_patterns(written: str, *, last: bool) -> set[str]:
    """Patterns of the control text in the last (or first) line that a template writes beside what somebody says.

    None for a line of mere words, of mere marks, or of prose.
    """
    lines = [line for line in written.splitlines() if line.strip()]
    if not lines:
        return set()
    line = lines[-1 if last else 0]
    text = line.strip()
    found = {re.escape(tag) for tag in _TAG.findall(text)}
    if re.fullmatch(r"[\w\s]*|[\W_]*", text) or len(text.split()) > _CONTROL_WORDS:
        return found
    inline = not last and "\n" not in written.partition(text)[0]  # behind what was said, in its line
    name = re.fullmatch(r"[\w\s]+[:：]", text) is not None  # the second is the colon of Chinese and Japanese
    start = (r"(?:^|\s)" if inline else r"^") if name else "" if inline else r"(?<!\S)"  # "# Notes" is not in "## Notes"
    return found | {start + re.escape(text)}


def _left_out(messages: tuple[Message, ...], rendered: str) -> bool:
    """Whether what somebody says is not in the prompt, but for white space around it, and for thoughts of the assistant."""
    return any(_said(message).strip() not in rendered for message in messages)


def _said(message: Message) -> str:
    return behind_thought(message["content"]) or "" if message["role"] == "assistant" else message["content"]


def _before_first_user_turn(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The conversation, which may begin with the assistant's greeting, with a text before what the user says first."""
    at = next(number for number, message in enumerate(messages) if message["role"] == "user")
    first = Message(role="user", content=f"{text}\n\n{messages[at]['content']}")
    return (*messages[:at], first, *messages[at + 1 :])
