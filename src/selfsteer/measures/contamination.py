"""Do the queries contain text of evaluation files? Overlap of word 13-grams, as for GPT-3 (arXiv 2005.14165, appendix C).

Evaluation files are read once into hashes, about twelve bytes an n-gram; the queries stream past them. All strings of a
row count, however deep: prompts, turns, answers. Texts shorter than 13 words are compared whole. Left out on purpose:
paraphrases and translations, and the removal of what is found, which is the caller's business.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from selfsteer.data.files import HUB, all_rows, check_source
from selfsteer.measures.estimates import share_estimate
from selfsteer.measures.metrics import Contamination
from selfsteer.measures.text import ngram_hashes, words
from selfsteer.records import Query

NGRAM = 13

SHORTEST = 4
"""Shorter texts ("Yes", a category, the number of a model) say nothing of where they come from."""


class Overlap(NamedTuple):
    """A query that shares text with a row of an evaluation file: the row it shares most n-grams with."""

    query_id: str
    file: str
    place: str
    """File and line or row."""
    ngrams: int
    """How many n-grams they share."""


class Evaluation(NamedTuple):
    """Evaluation files as hashed n-grams; `read_evaluation` makes it."""

    hashes: NDArray[np.uint64]
    """Sorted, shape (n-grams,); an n-gram of several rows stands there once for each."""
    rows: NDArray[np.int32]
    """The row that each n-gram is from, shape (n-grams,)."""
    places: Sequence[str]
    """Where each row stands."""
    files: Sequence[str]
    """The file of each row."""


def check_files(paths: Sequence[Path]) -> None:
    """Raises ValueError as `read_evaluation`, in the time of reading alone: before a run, not at the end of its round."""
    for path in _checked(paths):
        if sum(1 for _ in all_rows(path)) == 0:
            raise ValueError(_no_rows(path))


def _checked(paths: Sequence[Path]) -> Sequence[Path]:
    for path in paths:
        if str(path).startswith(HUB):
            raise ValueError(f"{path}: quality.evaluation_files takes files; save the data set as one")
        check_source(path, "quality.evaluation_files")
    return paths


def _no_rows(path: Path) -> str:
    return f"{path}: no rows; name another evaluation file"


def read_evaluation(paths: Sequence[Path]) -> Evaluation:
    """Hash every string of .jsonl, .json, .csv and .parquet files; a .json file is held in memory, the others stream.

    Of a CSV file the first line counts as well: it may have no header. Raises ValueError, naming file and place, for files
    that are missing, of another kind, malformed or without rows.
    """
    hashes, owners = array("Q"), array("i")
    places: list[str] = []
    files: list[str] = []
    for path in _checked(paths):
        for row in all_rows(path):
            found = _ngrams(_strings(row.fields))
            hashes.frombytes(found.tobytes())
            owners.extend([len(places)] * len(found))
            places.append(row.place)
            files.append(str(path))
        if not files or files[-1] != str(path):
            raise ValueError(_no_rows(path))
    unsorted = np.frombuffer(hashes, np.uint64)
    order = np.argsort(unsorted, kind="stable")
    return Evaluation(unsorted[order], np.frombuffer(owners, np.int32)[order], places, files)


def overlaps(query: Query, evaluation: Evaluation) -> Iterator[Overlap]:
    """For each file that shares text with any turn of the query, the row that shares most of it."""
    own = _ngrams(message["content"] for message in query.messages)
    first = np.searchsorted(evaluation.hashes, own, side="left")
    last = np.searchsorted(evaluation.hashes, own, side="right")
    shared = Counter(int(row) for start, stop in zip(first, last, strict=True) for row in evaluation.rows[start:stop])
    reported: set[str] = set()
    for row, ngrams in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
        file = evaluation.files[row]
        if file not in reported:
            reported.add(file)
            yield Overlap(query.id, file, evaluation.places[row], ngrams)


def contamination(found: Iterable[Sequence[Overlap]]) -> Contamination | None:
    """The measure over all queries, from the overlaps of each (most have none); None without queries."""
    queries, hits = 0, 0
    files: Counter[str] = Counter()
    for each in found:
        queries += 1
        hits += bool(each)
        files.update(overlap.file for overlap in each)
    share = share_estimate(hits, queries)
    return None if share is None else Contamination(share=share, files=dict(files))


def _ngrams(texts: Iterable[str]) -> NDArray[np.uint64]:
    """The different n-gram hashes of some texts, none across two of them; shape (n-grams,)."""
    split = (words(text) for text in texts)
    hashed = [ngram_hashes(each, NGRAM) for each in split if len(each) >= SHORTEST]
    return np.unique(np.concatenate(hashed)) if hashed else np.empty(0, np.uint64)


def _strings(fields: Mapping[str, object]) -> Iterator[str]:
    """However deep: a row may be nested further than a function may call itself."""
    pending: list[object] = [fields]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            pending.extend(cast("Mapping[str, object]", value).values())
        elif isinstance(value, list | tuple):
            pending.extend(cast("Sequence[object]", value))
