"""What texts look like: words, near-duplicates, writing systems, refusals, leaked principles."""

import hashlib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

HASHES = 128
"""Bytes of a signature. The overlap of two texts is known from it to 0.026 (one standard error) at an overlap of 0.9."""

_CHUNK = 2048

# Chinese, Japanese, Thai, Lao, Burmese and Khmer are written without spaces: there a character counts as a word.
_CHARACTERS = (
    r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\u1780-\u17d3"
)

# Vowels and tones that stand above, below and beside letters, from Arabic to Thai: no letters to `re`, but parts of words.
_MARKS = "".join(character for code in range(0x300, 0x20000) if unicodedata.category(character := chr(code))[0] == "M")

# Runs of letters and runs of marks: letter by letter the same words take three times as long.
_WORD = re.compile(rf"[{_CHARACTERS}][{_MARKS}]*|[^\W{_CHARACTERS}]+(?:[{_MARKS}]+[^\W{_CHARACTERS}]*)*")

_ASCII_WORDS = bytes(
    ord(chr(byte).lower()) if chr(byte) in string.ascii_letters + string.digits + "_" else ord(" ") for byte in range(256)
)
"""Of ASCII what makes words, in small letters, and spaces for everything else."""

_BASE = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Fixed, so that measures repeat; odd, as multiply-shift hashing asks.
_MULTIPLIERS = _mixed(np.arange(1, HASHES + 1, dtype=np.uint64)) | np.uint64(1)


@lru_cache(maxsize=16)  # a pair's measures ask for the same few texts again and again
def words(text: str) -> tuple[str, ...]:
    """The lower-cased words of a text, without punctuation; however its letters are composed, wide or narrow (NFKC)."""
    if text.isascii():  # most are, and the same words come out in a seventieth of the time
        return tuple(text.encode().translate(_ASCII_WORDS).decode().split())
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def repetition(text_words: tuple[str, ...]) -> float | None:
    """The share of a text's word 3-grams that it has said before; None of fewer than three words."""
    count = len(text_words) - 2
    return 1 - len(_ngrams(text_words, 3)) / count if count > 0 else None


def ngram_hashes(text_words: Sequence[str], size: int) -> NDArray[np.uint64]:
    """64-bit hashes of the word n-grams, shape (n-grams,), in order and the same on every machine.

    A text with fewer than `size` words is one n-gram, the whole; one without words has none.
    """
    if not text_words:
        return np.empty(0, np.uint64)
    size = min(size, len(text_words))
    hashed = np.fromiter(map(_word_hash, text_words), np.uint64, len(text_words))
    # A polynomial in the words' hashes, the length folded in; sums wrap around at 2 ** 64.
    combined = np.full(len(text_words) - size + 1, size, np.uint64)
    for offset in range(size):
        combined = combined * _BASE + hashed[offset : len(hashed) - size + 1 + offset]
    return _mixed(combined)


def signature(text_words: Sequence[str]) -> bytes:
    """The MinHash signature of a text's word 3-grams (of the words, where there are fewer): HASHES bytes."""
    shingles = ngram_hashes(text_words, 3 if len(text_words) >= 3 else 1)
    least = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(shingles), _CHUNK):
        products = _MULTIPLIERS[:, None] * shingles[None, start : start + _CHUNK]  # (HASHES, chunk)
        least = np.minimum(least, products.min(axis=1))
    # The least product is small by being the least: its low bits are as good as random once mixed.
    return (_mixed(least) & np.uint64(0xFF)).astype(np.uint8).tobytes()


def near_repeats(signatures: bytes, threshold: float) -> int:
    """How many texts overlap with an earlier one by more than `threshold` (Jaccard), by their joined signatures."""
    rows = np.frombuffer(signatures, np.uint8).reshape(-1, HASHES)  # (texts, HASHES)
    repeats = np.zeros(len(rows), bool)
    # Eight hashes in a row that agree make two texts worth comparing: at an overlap of 0.9 that fails once in 10,000 times.
    for band in rows.view(np.uint64).T:  # (texts,)
        order = np.argsort(band, kind="stable")
        alike = band[order[:-1]] == band[order[1:]]
        earlier, later = order[:-1][alike], order[1:][alike]
        agreement = (rows[earlier] == rows[later]).mean(axis=1)
        # Hashes of one byte agree by chance in one of 256 cases.
        repeats[later[(agreement - 1 / 256) / (255 / 256) > threshold]] = True
    return int(repeats.sum())


@lru_cache(maxsize=2**17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest())


LETTERS = 10
"""With fewer letters a text has no script to speak of."""

MAIN = 0.8
"""Share of a query's letters that makes a script the query's own; mixed queries are not judged."""

LOST = 0.2
"""A response whose letters are to a smaller share of the query's script has left it; code and names may take the rest."""

_ASCII_LETTERS = string.ascii_letters.encode()


def script_mismatch(query: str, response: str) -> bool | None:
    """Whether the response has left the query's script; None where the query mixes scripts or either has too few letters."""
    asked, answered = letters_by_script(query), letters_by_script(response)
    if asked.total() < LETTERS or answered.total() < LETTERS:
        return None
    [(script, letters)] = asked.most_common(1)
    if letters < MAIN * asked.total():
        return None
    return answered[script] < LOST * answered.total()


@lru_cache(maxsize=16)  # the query is asked about once for each of its responses
def letters_by_script(text: str) -> Counter[str]:
    """Letters of the text by script, kana taking the Chinese characters beside them; not to be changed."""
    found: Counter[str] = Counter()
    if text.isascii():  # most are, and counting bytes is fast
        letters = len(text) - len(text.encode().translate(None, _ASCII_LETTERS))
        return Counter(LATIN=letters) if letters else found
    # Full-width and mathematical letters count as what they look like. Each character is looked up once: texts are long.
    for character, count in Counter(unicodedata.normalize("NFKC", text)).items():
        if character.isalpha():
            found[script_of(character)] += count
    if "KANA" in found:  # Japanese is written in both; without kana the characters are Chinese
        found["KANA"] += found.pop("CJK", 0)
    return found


@lru_cache(maxsize=2**16)
def script_of(character: str) -> str:
    """The script by the character's name, as in LATIN SMALL LETTER A or CJK UNIFIED IDEOGRAPH-4E00."""
    first = unicodedata.name(character, "UNKNOWN").split(" ")[0].split("-")[0]
    return "KANA" if first in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else first


# --- filters: each answers "why not" ---------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"""^\W*(?:
        (?:(?:(?:i['’]?m|i\ am)\ )?(?:really\ |very\ |so\ )?(?:sorry|afraid)|i\ apologi[sz]e)\b
        [^.!?]{0,80}?\b(?:can(?:no|['’])?t|unable|not\ able)
      | (?:i['’]?m|i\ am)\ (?:unable|not\ able)\ to\b
      | i\ (?:can(?:no|['’])?t|won['’]?t|will\ not)\ (?:assist|help|provide|answer|fulfil|comply|do\ that|create|write)
      | (?:as\ an\ ai(?:\ language\ model|\ assistant)?|unfortunately),?
        \ i\ (?:can(?:no|['’])?t|am\ (?:unable|not\ able)|do\ not|don['’]t)
    )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
"""An opening that declines the request; "I'm sorry to hear that" is none."""

_LEAKAGE = re.compile(
    r"""\b(?:as|like)\ (?:i\ was\ |you\ |you['’]ve\ |you\ have\ )?(?:instructed|directed|told|required|requested|asked)\b
        .{0,40}\b(?:guideline|principle|instruction|system\ (?:prompt|message))
      | \b(?:according\ to|following|based\ on|in\ line\ with|per|under)\ (?:the|my|these|those|your)
        \ (?:given\ |provided\ |above\ |system\ )?(?:guidelines(?!\ (?:of|from|by|for|in|on|set|issued|published)\b)
          |principles?|system\ (?:prompt|message|instructions))\b
      | \bi\ (?:was|am|have\ been|['’]ve\ been)\ (?:instructed|told|directed|asked)\ (?:not\ )?to
        \ (?:be|give|answer|respond|write|keep|avoid)\b
      | \bmy\ (?:instructions|guidelines|system\ prompt)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""A response that speaks of having been given a principle."""

_LEAKS = ("guideline", "principle", "instruct", "system", "told", "directed", "asked")
"""One of these is in all that `_LEAKAGE` finds; most responses have none, and looking for that is fast."""

_QUOTED_WORDS = 8
"""A response that repeats this many consecutive words of its principle quotes it."""


def is_refusal(text: str) -> bool:
    """Whether a response opens by declining the request."""
    return _REFUSAL.match(text[:200]) is not None


def leaks_principle(text: str, principle: str | None = None) -> bool:
    """Whether a response speaks of its principle, or quotes eight words of it in a row."""
    folded = text.casefold()
    if any(word in folded for word in _LEAKS) and _LEAKAGE.search(text) is not None:
        return True
    if principle is None:
        return False
    quoted = words(principle)
    # A word of Chinese or Japanese is about two characters.
    size = _QUOTED_WORDS * 2 if 2 * sum(map(len, quoted)) < 3 * len(quoted) else _QUOTED_WORDS
    return not _ngrams(words(text), size).isdisjoint(_ngrams(quoted, size))


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the word 3-grams of two texts, 0 to 1; of the words where a text is shorter than that.

    Texts of signs alone, such as emoji, are compared by their signs.
    """
    first, second = words(a), words(b)
    if not first and not second:
        first, second = tuple("".join(a.split())), tuple("".join(b.split()))
    size = 3 if min(len(first), len(second)) >= 3 else 1
    one, other = _ngrams(first, size), _ngrams(second, size)
    return len(one & other) / len(one | other) if one or other else 1.0


@lru_cache(maxsize=16)
def _ngrams(text_words: tuple[str, ...], size: int) -> frozenset[tuple[str, ...]]:
    return frozenset(zip(*(text_words[start:] for start in range(size)), strict=False))
