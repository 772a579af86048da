"""An API key that a server was sent must not come back in a log, a file or a message, in whatever form it is repeated.

Only forms that anybody can read off are looked for. Left out on purpose: hashes and ciphers of a key, which give it away to
nobody.
"""

import base64
import codecs
import html
import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache
from urllib.parse import unquote_plus

EXCERPT = 300
"""Characters of a server's own words in a message of ours."""


def excerpt(said: bytes, secret: str | None = None, *, limit: int = EXCERPT) -> str:
    """The beginning of a server's own words in one printable line, without the secret should the server repeat it.

    Everything from a server that gets into a message of ours comes through here.
    """
    text = said[: 16 * EXCERPT].decode("utf-8", "replace")
    if secret:
        text = text.replace(secret, "[key]")
        if reveals(text, secret):
            return "[withheld: it repeats the API key, or a part of it]"
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."


_PART = 8
"""Letters and digits of a key in a row that are a part of it; fewer may stand anywhere."""

_ESCAPES = re.compile(r"\\+(?:u\{?|x)0*([0-9a-fA-F]{2,4})\}?|\\+([0-7]{3})")
"""Of JSON, of Python's bytes (so do the errors of HTTP libraries quote them) and of other languages."""


def reveals(text: str, secret: str) -> bool:
    """Whether a part of the secret stands in the text: plainly, broken by spaces and marks, backwards, escaped (percent,
    JSON, HTML, Python), in base64, base32, base85, ROT13, or the numbers of its characters in any base that people print."""
    return _contains(text, _parts(secret))


def repeats(text: str, secret: str) -> bool:
    """Whether all of the secret does; one that may be a word ("not-needed") only as it is: texts are full of words."""
    return secret in text or (len(_squeezed(secret)) >= _NO_WORD and _contains(text, frozenset(_forms(secret))))


_NO_WORD = 16
"""Letters and digits of a key that is no word."""


def _contains(text: str, parts: Collection[str]) -> bool:
    return any(part in plain for plain in map(_squeezed, dict.fromkeys(_unescaped(text))) for part in parts)


@lru_cache(maxsize=8)
def _parts(secret: str) -> frozenset[str]:
    """What must not be seen: all runs of `_PART` of the secret's letters and digits, as they are and as they are encoded; a
    short one is looked for as a whole."""
    if len(_squeezed(secret)) < _PART:
        raw = secret.encode()
        whole = {_squeezed(secret), raw.hex(), _squeezed(base64.b64encode(raw).decode())}
        return frozenset(form for form in whole if len(form) >= _PART // 2)
    return frozenset(form[i : i + _PART] for form in _forms(secret) for i in range(len(form) - _PART + 1))


@lru_cache(maxsize=8)
def _forms(secret: str) -> tuple[str, ...]:
    """The secret's letters and digits, as they are and as they are encoded."""
    raw, plain = secret.encode(), _squeezed(secret)
    numbers = ("{}", "{:03}", "{:x}", "0x{:x}", "{:o}", "{:03o}", "0o{:o}", "{:b}", "{:07b}", "{:08b}", "0b{:b}")
    forms = [plain, codecs.encode(plain, "rot13"), *("".join(map(number.format, raw)) for number in numbers)]
    # base64 of three bytes is four characters, base32 of five is eight, base85 of four is five: by where it begins in what
    # was encoded, a secret has three forms, or five, or four.
    encodings = ((base64.b64encode, 3, 4), (base64.b32encode, 5, 8), (base64.b85encode, 4, 5), (base64.a85encode, 4, 5))
    for encode, bytes_, characters in encodings:
        for before in range(bytes_):
            encoded = encode(b"\0" * before + raw + b"\0" * bytes_).decode()
            forms.append(_squeezed(encoded[characters if before else 0 : -2 * characters]))
    return (*forms, *(form[::-1] for form in forms))


def _squeezed(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _unescaped(text: str) -> Iterator[str]:
    """The text, and what is left of it when each kind of escape is undone, twice over: a proxy may have quoted a server."""
    yield text
    for _ in range(2):
        text = _ESCAPES.sub(lambda found: chr(int(found[1], 16) if found[1] else int(found[2], 8)), html.unescape(text))
        yield text
        text = unquote_plus(text)
        yield text
