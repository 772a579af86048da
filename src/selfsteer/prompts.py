"""From messages to token ids: x, x+ and x-.

A principle becomes the system message; where a template knows no system role it goes before the first user turn. User text
can never introduce a special token: a prompt whose special tokens differ from those of the same conversation with harmless
text is quarantined.
"""

import logging
from contextlib import suppress
from functools import cached_property
from typing import Literal, NamedTuple, Self, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from selfsteer.records import FinishReason, Message
from selfsteer.store.durable import digest

log = logging.getLogger(__name__)

_HARMLESS = "a"
_MARKER = "selfsteer-marker"


class AssistantTurn(NamedTuple):
    """What a chat template writes around what an assistant says."""

    before: str
    """White space between the header of an answer and its text (Llama 2's space); mostly none."""
    behind: str
    """Up to the first control token, which closes the turn; empty where the template writes none."""
    end_id: int
    """That control token; the tokenizer's end token where the template writes none."""


def assistant_turn(tokenizer: PreTrainedTokenizerBase) -> AssistantTurn:
    """How the chat template closes an assistant's turn.

    Gemma's, for one, closes turns with <end_of_turn> while its end token is <eos>, which stands in no conversation.
    """
    if tokenizer.chat_template is None:
        return AssistantTurn("", "", cast(int, tokenizer.eos_token_id))
    asked = [{"role": "user", "content": _HARMLESS}]
    answered = [*asked, {"role": "assistant", "content": _MARKER}]
    try:
        header = cast(str, tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        rendered = cast(str, tokenizer.apply_chat_template(answered, tokenize=False))
    except TemplateError:  # what is wrong with it is told where it is first used
        return AssistantTurn("", "", cast(int, tokenizer.eos_token_id))
    start, marker, rest = rendered.rpartition(_MARKER)
    before = start.removeprefix(header) if start.startswith(header) else ""
    # Marked special or not: where the template puts an added token behind a turn, it is to end it.
    controls = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    found = [(at, len(text), text) for text in controls if marker and (at := rest.find(text)) >= 0]
    if not found:
        return AssistantTurn(before if before.isspace() else "", "", cast(int, tokenizer.eos_token_id))
    at, length, closing = min(found, key=lambda each: (each[0], -each[1]))
    return AssistantTurn(before if before.isspace() else "", rest[: at + length], controls[closing])


class Prompts:
    """Renders conversations with one tokenizer's chat template; what a prompt looks like is decided here."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, system_role: Literal["auto", "system", "user"] = "auto"
    ) -> None:
        self.tokenizer = tokenizer
        self._turn = assistant_turn(tokenizer)
        self.system_role = self._detect_system_role() if system_role == "auto" else system_role
        self.special_ids = frozenset(tokenizer.all_special_ids) | self._controls()
        self._expected_specials: dict[tuple[str, ...], list[int]] = {}

    @property
    def end_id(self) -> int:
        """What closes an assistant's turn; an engine has to stop at it, whatever the generation configuration lists."""
        return self._turn.end_id

    @cached_property
    def digest(self) -> str:
        """Digest of what determines the token ids of messages: with theirs, that of the ids."""
        size, some = len(self.tokenizer), 4096
        parts = (range(start, min(start + some, size)) for start in range(0, size, some))
        vocabulary = [digest(self.tokenizer.convert_ids_to_tokens(list(ids))) for ids in parts]
        template = {"chat_template": self.tokenizer.chat_template, "system_role": self.system_role}
        return digest({**template, "vocabulary": vocabulary})

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
        ids = whole[len(asked) :] if whole[: len(asked)] == asked else self._ids(response)
        return (*ids, self._turn.end_id) if finish == "stop" and not self._turn.behind else ids

    def checked_ids(self, messages: tuple[Message, ...]) -> tuple[int, ...] | str:
        """`prompt_ids`, or why this conversation must not be rendered (its text contains special tokens)."""
        roles = tuple(message["role"] for message in messages)
        try:
            rendered = self.prompt_ids(messages)
        except TemplateError as error:
            return f"refused by the chat template: {error.message}"
        if roles not in self._expected_specials:
            harmless = tuple(Message(role=role, content=_HARMLESS) for role in roles)
            self._expected_specials[roles] = self._specials(self.prompt_ids(harmless))
        return rendered if self._specials(rendered) == self._expected_specials[roles] else "special tokens in the text"

    def quarantine_reason(self, messages: tuple[Message, ...]) -> str | None:
        """Why this conversation must not be rendered, or None."""
        found = self.checked_ids(messages)
        return found if isinstance(found, str) else None

    def contains_special(self, text: str) -> bool:
        """Whether a completion's text would be read as containing special tokens."""
        return not self.special_ids.isdisjoint(self._ids(text))

    def _render(self, messages: tuple[Message, ...]) -> str:
        conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
        return cast(str, self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def _specials(self, ids: tuple[int, ...]) -> list[int]:
        return [token_id for token_id in ids if token_id in self.special_ids]

    def without_end(self, text: str) -> str:
        """A completion without the end token that some data sets write at its very end: the token is trained anyway."""
        stripped = text.rstrip()
        for end in {str(self.tokenizer.eos_token), str(self.tokenizer.convert_ids_to_tokens(self._turn.end_id))}:
            if stripped.endswith(end):
                return stripped.removesuffix(end).rstrip()
        return text

    def whole(self) -> Self:
        """Itself. Raises ValueError for a template that leaves out what the user says: nothing could be asked with it."""
        if _MARKER not in self._render((Message(role="user", content=_MARKER),)):
            raise ValueError(
                "the chat template leaves out what the user says (it may want the content as a list of parts); name another"
                " with policy.chat_template: FILE.jinja"
            )
        return self

    def _controls(self) -> frozenset[int]:
        """Added tokens that are marked special, and those that the template writes: they open and close turns, too."""
        user, assistant = Message(role="user", content=_MARKER), Message(role="assistant", content=_HARMLESS)
        written = ""
        for messages in ((user,), (user, assistant, user), (Message(role="system", content=_HARMLESS), user)):
            with suppress(TemplateError):  # what it refuses it can't write
                written += self._render(messages)
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(token_id for token_id, token in added if token.special or token.content in written)

    def _detect_system_role(self) -> Literal["system", "user"]:
        try:
            text = self._render((Message(role="system", content=_MARKER), Message(role="user", content=_HARMLESS)))
        except TemplateSyntaxError as error:
            raise ValueError(
                f"policy.chat_template: line {error.lineno} of the template can't be read: {error.message}. Mend it, or "
                "name another in the recipe."
            ) from error
        except TemplateError:
            text = ""
        if _MARKER in text:
            return "system"
        log.warning("the chat template knows no system role: principles go before the user's first turn")
        return "user"


def _before_first_user_turn(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The conversation, which may begin with the assistant's greeting, with a text before what the user says first."""
    at = next(number for number, message in enumerate(messages) if message["role"] == "user")
    first = Message(role="user", content=f"{text}\n\n{messages[at]['content']}")
    return (*messages[:at], first, *messages[at + 1 :])
