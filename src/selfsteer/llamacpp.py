"""GGUF files: their header, checked against the file, and their tokenizer as llama.cpp defines it.

A GGUF names the way its text is split before the merges (`tokenizer.ggml.pre`); what a name means is defined in llama.cpp
(src/llama-vocab.cpp). transformers knows a few of the names and takes the plain byte-level BPE of GPT-2 for all others
without a word, so the tokenizer is built here, and an unknown name is refused: tokens that the model never met are a
silent loss. A header is data of strangers: every length in it is held against the file before anything is allocated.

Left out on purpose: the weights, which transformers reads; tokenizers of encoders (WordPiece, T5's unigrams).
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""struct formats of GGUF's value types; besides them 8 is a string and 9 an array."""
_STRING, _ARRAY = 8, 9

_CONTROL, _USER_DEFINED = 3, 4
"""Of `tokenizer.ggml.token_type`: special tokens, and other text that is always one token."""

# --- pre-tokenizers --------------------------------------------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALISED, _CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CAPITALISED}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CAPITALISED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_MINICPM5 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


class _Splitting(NamedTuple):
    """How text is split before the merges."""

    regexes: tuple[str, ...]
    """One after the other, each upon the pieces that the one before left; what matches and what lies between are pieces."""
    whole_words: bool = False
    """A piece that is a token by itself is taken as it is, whatever the merges say (llama.cpp: ignore_merges)."""
    add_bos: bool = False
    """Where `tokenizer.ggml.add_bos_token` is missing."""


_GROUPS: Sequence[tuple[_Splitting, str]] = (
    (
        _Splitting((_GPT2,)),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
    ),
    (_Splitting((r"\p{N}", _GPT2)), "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (_Splitting((_LLAMA3,), True, True), "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_Splitting((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (_Splitting((_QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (_Splitting((_QWEN35,)), "qwen35"),
    (_Splitting((_TEKKEN,), True, True), "tekken"),
    (_Splitting((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (_Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")), "deepseek-coder"),
    (_Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (_Splitting((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (_Splitting((_BLOOM, r"\p{N}")), "viking"),
    (_Splitting((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (_Splitting((_SEED,)), "seed-coder"),
    (_Splitting((r"\p{N}{1,3}", _MINICPM5), True), "minicpm5"),
    (_Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
)
_SPLITTINGS: Mapping[str, _Splitting] = {name: splitting for splitting, names in _GROUPS for name in names.split()}


# --- the header ------------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """Where the header says that a tensor lies."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands before the weights, checked against the size of the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def elements(self) -> int:
        """How many weights the file holds."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """How many layers the names of the tensors speak of."""
        numbers = {name.split(".")[1] for name, *_ in self.tensors if name.startswith("blk.")}
        return len(numbers)


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises ValueError, with the file and what is wrong, for a file that is none, is cut off, or can't be as it says.
    """
    if path.stat().st_size < 24:
        raise _broken(path, "it is too short to be a GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(path, content).header()


class _Reader:
    """Reads value after value; what would reach beyond the file is refused before it is allocated."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0

    def header(self) -> Header:
        magic = self._take(4)
        if magic != b"GGUF":
            raise _broken(self._path, f"it begins with {magic!r}, not with b'GGUF'")
        version = self._number("<I")
        if version not in (2, 3):
            raise _broken(self._path, f"it is of GGUF version {version}; versions 2 and 3 are read")
        tensors, entries = self._number("<Q"), self._number("<Q")
        metadata = {self._text(): self._value(self._number("<I")) for _ in self._counted(entries, least=13)}
        found = [self._tensor() for _ in self._counted(tensors, least=24)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise _broken(self._path, f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for tensor, offset in found:
            if start + offset + tensor.bytes > len(self._content):
                end = start + offset + tensor.bytes
                raise _broken(self._path, f"the tensor {tensor.name!r} would end at byte {end:,} of {len(self._content):,}")
        if len({tensor.name for tensor, _ in found}) != len(found):
            raise _broken(self._path, "two tensors have one name")
        return Header(path=self._path, metadata=metadata, tensors=tuple(tensor for tensor, _ in found))

    def _take(self, size: int) -> bytes:
        taken = self._content[self._at : self._at + size] if size <= len(self._content) - self._at else b""
        if len(taken) != size:
            raise _broken(self._path, f"{size:,} bytes should stand at byte {self._at:,} of {len(self._content):,}")
        self._at += size
        return taken

    def _number(self, how: str) -> Any:
        return struct.unpack(how, self._take(struct.calcsize(how)))[0]

    def _counted(self, count: int, *, least: int) -> range:
        """least: the fewest bytes that one of them takes."""
        if count * least > len(self._content) - self._at:
            raise _broken(self._path, f"it speaks of {count:,} entries at byte {self._at:,} of {len(self._content):,}")
        return range(count)

    def _text(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _broken(self._path, f"a text before byte {self._at:,} is not UTF-8 ({error.reason})") from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise _broken(self._path, f"there is no type {kind} of values (byte {self._at - 4:,})")
        item, count = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            size = struct.calcsize(_SCALARS[item])
            self._counted(count, least=size)
            return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", self._take(count * size)))
        if item != _STRING:
            raise _broken(self._path, f"there is no array of type {item} (byte {self._at - 12:,})")
        return [self._text() for _ in self._counted(count, least=8)]

    def _tensor(self) -> tuple[Tensor, int]:
        name, dimensions = self._text(), self._number("<I")
        if not 0 < dimensions <= 8:
            raise _broken(self._path, f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))
        kind, offset = self._number("<I"), self._number("<Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise _broken(self._path, f"the tensor {name!r} is of a type {kind}, which is not known") from error
        if shape[0] % block:
            raise _broken(self._path, f"the tensor {name!r} has rows of {shape[0]:,}, no multiple of {block}")
        return Tensor(name, shape, math.prod(shape) // block * size), offset


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: the GGUF file is damaged or cut off: {what}. Fetch it again, or take another file.")


# --- the tokenizer ---------------------------------------------------------------------------------------------------------


def byte_level_tokenizer(header: Header) -> PreTrainedTokenizerFast:
    """The tokenizer of a file whose `tokenizer.ggml.model` is "gpt2": byte-level BPE, split as `tokenizer.ggml.pre` says.

    Raises ValueError for a name that is not known here, and for a vocabulary that is none.
    """
    metadata = header.metadata
    splitting = _splitting(header)
    tokens, merges = _texts(header, "tokenizer.ggml.tokens"), _texts(header, "tokenizer.ggml.merges")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise _broken(header.path, "tokenizer.ggml.tokens names a token twice")
    pairs = [_merge(merge, vocabulary, header) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=splitting.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(regex), "isolated") for regex in splitting.regexes),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [0] * len(tokens))
    if not isinstance(kinds, list) or len(cast("list[Any]", kinds)) != len(tokens):
        raise _broken(header.path, f"tokenizer.ggml.token_type is no list of {len(tokens):,} numbers, one for each token")
    for token, kind in zip(tokens, cast("list[Any]", kinds), strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    named = {
        name: _named(header, tokens, f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", splitting.add_bos)) and named["bos"] is not None,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in named.items()},
    )
    template = metadata.get("tokenizer.chat_template")
    fast.chat_template = template if isinstance(template, str) else None
    assert len(fast) == len(tokens)
    return fast


def _splitting(header: Header) -> _Splitting:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITTINGS:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.pre is {name!r}, a way of splitting text that is not known here. Use the model "
            f"as a Hugging Face folder instead, with its own tokenizer.json. Known: {', '.join(sorted(_SPLITTINGS))}."
        )
    return _SPLITTINGS[name]


def _texts(header: Header, key: str) -> list[str]:
    found = header.metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in cast("list[Any]", found)):
        raise ValueError(
            f"{header.path}: {key} is no list of texts, so it has no tokenizer that can be read. Take another file."
        )
    return cast("list[str]", found)


def _merge(merge: str, vocabulary: Mapping[str, int], header: Header) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    if not {first, second, first + second} <= vocabulary.keys():
        raise _broken(header.path, f"the merge {merge!r} is of no tokens in tokenizer.ggml.tokens")
    return first, second


def _named(header: Header, tokens: Sequence[str], key: str) -> str | None:
    number = header.metadata.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise _broken(header.path, f"{key} is {number!r}; there are {len(tokens):,} tokens")
    return tokens[number]
